"""The rows of one version of a LanceDB table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, Final

import pyarrow as pa
from lancedb import DBConnection
from lancedb.table import Table

from gateway.bulk.fields import FieldNames, Fields, Record, resolve_fields
from gateway.bulk.files.columns import MULTIVECTOR, REST, SPARSE, VECTOR, row_of, with_rest
from gateway.bulk.files.tables import is_json
from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row
from gateway.bulk.stores.lancedb_tables import get_table, plain_errors
from gateway.bulk.stores.payloads import to_json
from gateway.bulk.stores.protocol import Place

_BATCH: Final = 512
_SAMPLE: Final = 64


class LanceSource:
    """Reads one version of a table, so concurrent changes do not matter. A position is a version and a row number."""

    has_unique_ids = False

    def __init__(self, database: DBConnection, place: Place, table: str, names: FieldNames) -> None:
        self._database = database
        self._place = place
        self._table = table
        self._names = names

    @property
    def name(self) -> str:
        """The table's URL."""
        return self._place.named(self._table)

    @property
    def text_field(self) -> str:
        """The column with the text.

        Raises:
            BulkError: the first rows lack the column.
        """
        return self.fields.text

    @cached_property
    def fields(self) -> Fields:
        """The columns that make a row.

        Raises:
            BulkError: the first rows lack the columns.
        """
        records = [record for _, record in islice(self._records(self._latest, 0), _SAMPLE)]
        if not records:
            return Fields(self._names.id or "id", self._names.text or "text", self._names.title, self._names.payload)
        fields = resolve_fields(self._names, records, self.name)
        if fields.id is None:
            raise BulkError(f"{self.name}: no column is called `id`: name the id column with --id COLUMN")
        return fields

    @cached_property
    def _latest(self) -> Table:
        return get_table(self._database, self._table, self._place.store)

    def fingerprint(self) -> str:
        """Return the table and the columns that are read.

        Raises:
            BulkError: it does not exist or cannot be read.
        """
        return f"{self.name} {self.fields}"

    def count(self) -> int | None:
        """Return how many rows the table has."""
        with plain_errors(self.name):
            return int(self._latest.count_rows())

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the rows after a position, or all rows.

        Raises:
            BulkError: the table does not exist, or the position's version has been cleaned up.
        """
        match after:
            case None:
                table, start = self._latest, 0
                version = int(table.version)
            case [int() as version, int() as last]:
                table, start = self._version(version), last + 1
            case _:
                raise BulkError(f"{after!r} is not a position in {self.name}")
        for index, record in self._records(table, start):
            yield row_of(self.fields, record, f"row {index + 1} of {self.name}", [version, index])

    def close(self) -> None:
        """Do nothing: a folder has no connection."""

    def _version(self, version: int) -> Table:
        table = get_table(self._database, self._table, self._place.store)
        try:
            table.checkout(version)
        except (ValueError, OSError, RuntimeError) as error:
            raise BulkError(
                f"version {version} of {self.name}, which the job reads, was cleaned up: start over with an empty sink"
            ) from error
        return table

    def _records(self, table: Table, start: int) -> Iterator[tuple[int, Record]]:
        """Yield the rows from a row number on, with their numbers."""
        schema = table.schema
        columns = [field.name for field in schema if not _is_vector(field)]
        jsons = [field.name for field in schema if is_json(field)]
        index = start
        with plain_errors(self.name):
            query = table.search().select(columns).offset(start).limit(None)
            for batch in query.to_batches(_BATCH):
                for values in batch.to_pylist():
                    yield index, _record(values, jsons)
                    index += 1


def _is_vector(field: Any) -> bool:
    """Return whether a column has vectors, which come from another model and are slow to read."""
    is_fixed = pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
    return is_fixed or (field.name in (VECTOR, SPARSE, MULTIVECTOR) and pa.types.is_nested(field.type))


def _record(values: dict[str, Any], jsons: list[str]) -> dict[str, Json]:
    """Return a row as JSON. In a table that the sink wrote, a field without a value was missing in the row."""
    for name in jsons:
        if isinstance(text := values.get(name), str):
            values[name] = json.loads(text)
    if REST not in jsons:
        return {name: to_json(value) for name, value in values.items()}
    rest = values.pop(REST) or {}
    return with_rest({name: to_json(value) for name, value in values.items() if value is not None}, rest)
