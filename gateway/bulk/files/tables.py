"""Embedded rows as Arrow tables, for Parquet files and LanceDB."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson

from gateway.bulk.files.columns import ID, MULTIVECTOR, REST, SPARSE, VECTOR, FlatRows
from gateway.bulk.rows import BulkError, EmbeddedRows, Json, Row, RowId, SpaceNote
from gateway.config.wording import cut
from gateway.types import MultiVector, SparseVector

IS_JSON = {b"format": b"json"}
"""The metadata of a column that holds JSON as text."""

_MAX_COLUMNS = 256
_INT64 = range(-(2**63), 2**63)
_EXACT = range(-(2**53), 2**53 + 1)
"""The integers that a floating-point number holds exactly."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column for a field of the payload.

    Attributes:
        kind: the name of its Arrow type; ``json`` for JSON as text, which can hold any value.
    """

    name: str
    kind: str

    def fits(self, value: Json) -> bool:
        match self.kind:
            case "bool":
                return isinstance(value, bool)
            case "int64":
                return isinstance(value, int) and not isinstance(value, bool) and value in _INT64
            case "double":
                return isinstance(value, float) or (type(value) is int and value in _EXACT)
            case "string":
                return isinstance(value, str)
        return True


class Tables:
    """Builds tables that all have the same columns.

    Sparse weights are a struct of ``indices`` and ``values``, multi-vectors a list of vectors of fixed size. Fields of the
    payload are columns. Their types are those of the first rows: text, whole numbers, numbers and booleans are columns of
    that type, and everything else is JSON as text. Later values that do not fit go into the column ``_rest``, as JSON.

    Args:
        pa: the module ``pyarrow``, which is imported only when needed.
        note: describes the vectors.
        text_field: the path of the text in the source; ``None`` leaves the text out.
        may_name: whether a column can have a name.
    """

    def __init__(
        self, pa: Any, note: SpaceNote, text_field: str | None, may_name: Callable[[str], bool] = lambda _name: True
    ) -> None:
        self._may_name = may_name
        self._pa = pa
        self._note = note
        self._flat = FlatRows(text_field)
        self._columns: Sequence[_Column] | None = None
        self._id_kind = ""
        self._has_texts = False
        self._deciding = threading.Lock()

    @property
    def has_columns(self) -> bool:
        """The columns are known."""
        return self._columns is not None

    def choose_columns(self, batch: EmbeddedRows) -> None:
        """Choose the columns for the fields of the first rows."""
        columns = _choose_columns(self._flat.flatten(row)[0] for row in batch.rows)
        self._columns = [column for column in columns if self._may_name(column.name)]
        with self._deciding:
            self._has_texts |= self._id_kind == "string" or not all(_is_whole(row.id) for row in batch.rows)
            self._id_kind = "string" if self._has_texts else "int64"

    def take_columns(self, schema: Any) -> None:
        """Adopt the columns of an existing table."""
        own = {ID, REST, VECTOR, SPARSE, MULTIVECTOR}
        self._columns = [
            _Column(field.name, "json" if is_json(field) else str(field.type))
            for field in schema
            if field.name not in own
        ]
        self._id_kind = str(schema.field(ID).type)

    def problem(self, row: Row) -> str:
        """Return the reason why the column of ids cannot hold a row's id; empty if it can.

        Until the first shard determines its type, a text makes it a column of texts: rows of later shards are read before
        the first one is written.
        """
        with self._deciding:
            if not self._id_kind:
                self._has_texts |= not _is_whole(row.id)
            if self._id_kind in ("", "string") or _is_whole(row.id):
                return ""
        return (
            f"its id {cut(repr(row.id))} does not fit into the id column, which holds 64-bit integers because earlier ids "
            "were integers: make the source's ids all text or all integers, or write JSON lines (a folder whose name "
            "ends in .jsonl)"
        )

    def table(self, batch: EmbeddedRows, metadata: Mapping[bytes, bytes]) -> Any:
        """Return the rows as a table whose schema has this metadata."""
        if self._columns is None:
            raise RuntimeError("the columns are not known")
        flat = [self._flat.flatten(row) for row in batch.rows]
        arrays: dict[str, Any] = {ID: self._ids(batch.rows)}
        fields = [self._pa.field(ID, self._id_type(), nullable=False)]
        for column in self._columns:
            values = [_take(columns, rest, column) for columns, rest in flat]
            fields.append(
                self._pa.field(
                    column.name, self._type(column.kind), metadata=IS_JSON if column.kind == "json" else None
                )
            )
            arrays[column.name] = self._pa.array(values, fields[-1].type)
        arrays[REST] = self._pa.array([_dump({**left, **rest}) for left, rest in flat], self._pa.string())
        fields.append(self._pa.field(REST, self._pa.string(), metadata=IS_JSON))
        for name, array in self._vectors(batch).items():
            arrays[name] = array
            fields.append(self._pa.field(name, array.type, nullable=False))
        return self._pa.table(arrays, schema=self._pa.schema(fields, metadata=dict(metadata)))

    def _type(self, kind: str) -> Any:
        makers: Mapping[str, Callable[[], Any]] = {
            "bool": self._pa.bool_,
            "int64": self._pa.int64,
            "double": self._pa.float64,
        }
        return makers.get(kind, self._pa.string)()

    def _id_type(self) -> Any:
        return self._type(self._id_kind)

    def _ids(self, rows: Sequence[Row]) -> Any:
        if self._id_kind == "string":
            return self._pa.array([str(row.id) for row in rows], self._pa.string())
        for row in rows:
            if problem := self.problem(row):
                raise BulkError(f"{row.place}: {problem}")
        return self._pa.array([row.id for row in rows], self._pa.int64())

    def _vectors(self, batch: EmbeddedRows) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        if batch.dense is not None:
            arrays[VECTOR] = self._fixed(batch.dense)
        if batch.sparse is not None:
            arrays[SPARSE] = self._sparse(batch.sparse)
        if batch.multivectors is not None:
            arrays[MULTIVECTOR] = self._multivectors(batch.multivectors)
        return arrays

    def _fixed(self, vectors: Any) -> Any:
        flat = self._pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        return self._pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])

    def _sparse(self, rows: Sequence[SparseVector]) -> Any:
        offsets = self._offsets([len(row.indices) for row in rows])
        indices = np.concatenate([row.indices for row in rows]).astype(np.int32)
        values = np.concatenate([row.values for row in rows]).astype(np.float32)
        lists = [self._pa.ListArray.from_arrays(offsets, self._pa.array(flat)) for flat in (indices, values)]
        return self._pa.StructArray.from_arrays(lists, names=["indices", "values"])

    def _multivectors(self, rows: Sequence[MultiVector]) -> Any:
        flat = np.concatenate([row.reshape(-1, self._note.token_width) for row in rows])
        return self._pa.ListArray.from_arrays(self._offsets([len(row) for row in rows]), self._fixed(flat))

    def _offsets(self, lengths: Sequence[int]) -> Any:
        return self._pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))


def _is_whole(row_id: RowId) -> bool:
    """Return whether an id is a 64-bit integer."""
    return isinstance(row_id, int) and row_id in _INT64


def is_json(field: Any) -> bool:
    """Return whether a column holds JSON as text. A store may have added other metadata."""
    return (field.metadata or {}).get(b"format") == b"json"


def _choose_columns(rows: Iterable[Mapping[str, Json]]) -> list[_Column]:
    """Return the columns for a first shard, chosen by the values of its rows."""
    kinds: dict[str, set[str]] = {}
    for name, value in chain.from_iterable(columns.items() for columns in rows):
        if value is not None:
            kinds.setdefault(name, set()).add(_kind(value))
        elif name not in kinds:
            kinds[name] = set()
    return [_Column(name, _common(found)) for name, found in list(kinds.items())[:_MAX_COLUMNS]]


def _kind(value: Json) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int64" if value in _INT64 else "json"
        case float():
            return "double"
        case str():
            return "string"
    return "json"


def _common(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "double" if kinds == {"int64", "double"} else "json"


def _take(columns: dict[str, Json], rest: dict[str, Json], column: _Column) -> Json:
    """Put a field into its column, or into the rest if its value does not fit."""
    value = columns.pop(column.name, None)
    if value is None:
        return None
    if not column.fits(value):
        rest[column.name] = value
        return None
    return _dump(value) if column.kind == "json" else value


def _dump(value: Json) -> str | None:
    """Return a value as JSON; ``None`` for an empty value."""
    if value is None or value == {}:
        return None
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
