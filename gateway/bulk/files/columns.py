"""The columns of a file of vectors: the id, the text, the payload's fields, and the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from gateway.bulk.fields import Fields
from gateway.bulk.rows import BadRow, Json, Position, Row, RowId

ID, VECTOR, SPARSE, MULTIVECTOR, REST = "id", "vector", "sparse", "multivector", "_rest"
"""The columns that the sink fills itself. A payload field with one of these names goes into ``_rest``."""

_OLD = frozenset({VECTOR, SPARSE, MULTIVECTOR, REST})
_RESERVED = frozenset({ID, VECTOR, SPARSE, MULTIVECTOR, REST})
Flat: TypeAlias = tuple[dict[str, Json], dict[str, Json]]


class FlatRows:
    """Flattens rows: puts the text and the payload's fields next to the id.

    Args:
        text_field: the path of the text in the source; ``None`` leaves the text out.
    """

    def __init__(self, text_field: str | None) -> None:
        self.text_column = None if text_field is None else _text_column(text_field)

    def flatten(self, row: Row) -> Flat:
        """Return the columns of a row, without those that the sink fills itself, and the fields that have no column."""
        columns: dict[str, Json] = {} if self.text_column is None else {self.text_column: row.text}
        rest: dict[str, Json] = {}
        for name, value in row.payload.items():
            (rest if name in _RESERVED or name == self.text_column else columns)[name] = value
        return columns, rest


def restored(record: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return a record of a file as its original row: without vectors, and with the fields from ``_rest``.

    A record written by another program may also have vectors, which come from another model.
    """
    if _OLD.isdisjoint(record):
        return record
    vectors = (VECTOR, SPARSE, MULTIVECTOR)
    fields = {
        name: value for name, value in record.items() if name not in vectors or not isinstance(value, list | dict)
    }
    rest = fields.get(REST)
    if isinstance(rest, Mapping):
        del fields[REST]
        return with_rest(fields, rest)
    return fields


def with_rest(fields: Mapping[str, Json], rest: Mapping[str, Json]) -> dict[str, Json]:
    """Return the fields of columns and those that have none. Fields with the name of a column stay under ``_rest``."""
    same = {name: value for name, value in rest.items() if name in fields or name == REST}
    others = {name: value for name, value in rest.items() if name not in same}
    return {**fields, **others, **({REST: same} if same else {})}


def row_of(
    fields: Fields, record: Mapping[str, Json], place: str, position: Position, row_id: RowId | None = None
) -> Row | BadRow:
    """Return the row of a record of `with_rest`, whose payload may have a field with the name of the id's column."""
    same = record.get(REST)
    if not isinstance(same, Mapping) or fields.payload is not None:
        return fields.row(record, place, position, row_id)
    row = fields.row({name: value for name, value in record.items() if name != REST}, place, position, row_id)
    if isinstance(row, BadRow):
        return row
    # Sinks would replace a field with the name of the text by the text.
    kept = {name: value for name, value in same.items() if name in (fields.text, REST) and fields.text in same}
    others = {name: value for name, value in same.items() if name not in kept}
    return replace(row, payload={**row.payload, **others, **({REST: kept} if kept else {})})


def _text_column(path: str) -> str:
    """Return the last part of the text's path, or ``text`` if the sink needs that name itself."""
    last = path.rpartition(".")[2]
    return "text" if last in _RESERVED or not last else last
