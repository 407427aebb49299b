"""Collections of Milvus: their fields, the expressions that select items, and their creation."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pymilvus
from pymilvus import DataType, MilvusClient
from pymilvus.milvus_client import IndexParams

from gateway.bulk.rows import BulkError, Json, RowId, SpaceNote
from gateway.bulk.stores.notes import NOTE, note_to_json, read_notes
from gateway.bulk.stores.payloads import to_json
from gateway.config.wording import enumerate_names, quote
from gateway.telemetry.tracebacks import chain

# Errors are also raised as exceptions, with instructions. Milvus Lite's server also logs that it lacks a method.
for _name in ("pymilvus", "milvus_lite", "grpc._server"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

TIMEOUT_S: Final = 60.0
MAX_WIDTH: Final = 32_768
"""The largest number of dimensions of a vector."""
_DENSE: Final = (DataType.FLOAT_VECTOR, DataType.FLOAT16_VECTOR, DataType.BFLOAT16_VECTOR)
MAX_ID_BYTES: Final = 4_096
_FOLDER_EXISTS: Final = re.compile(r"File exists: '(.+/collections/[^/']+)'")
"""A message of Milvus Lite, with the folder of a collection."""
_NO_COLLECTION: Final = 100
"""Milvus' error code."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a collection.

    Attributes:
        settings: its size and other arguments of `add_field`.
        is_computed: Milvus computes the field from other fields.
    """

    name: str
    kind: DataType
    settings: Mapping[str, Any]
    is_computed: bool

    @property
    def width(self) -> int:
        """The dimensions of its vectors; 0 for other fields."""
        return int(self.settings.get("dim", 0)) if self.kind in _DENSE else 0

    @property
    def is_vector(self) -> bool:
        """The values are vectors of any kind."""
        return self.kind in (*_DENSE, DataType.SPARSE_FLOAT_VECTOR, DataType.BINARY_VECTOR)


@dataclass(frozen=True, slots=True)
class Collection:
    """The description of a collection.

    Attributes:
        name: the real name, even if the collection was looked up by an alias.
        others: the fields that are neither the id nor vectors.
    """

    name: str
    place: str
    number: int
    id: Field
    vectors: Sequence[Field]
    others: Sequence[Field]
    notes: Mapping[str, SpaceNote]
    description: Mapping[str, Any]

    @property
    def is_counted(self) -> bool:
        """The ids are integers."""
        return bool(self.id.kind == DataType.INT64)

    @property
    def dense(self) -> Mapping[str, Field]:
        """The fields of dense vectors, by name."""
        return {field.name: field for field in self.vectors if field.width}

    def vector(self, name: str | None) -> Field:
        """Return the field of the dense vectors.

        Raises:
            BulkError: there is no such field, or there are several and no name was given.
        """
        if name in self.dense:
            return self.dense[str(name)]
        names = enumerate_names(self.dense)
        if name is not None:
            raise BulkError(f"{self.place} has no vector {quote(name)}; it has {names or 'none'}")
        if len(self.dense) != 1:
            problem = f"several vectors: name one of {names} with ?vector=NAME" if names else "no dense vectors"
            raise BulkError(f"{self.place} has {problem}")
        return next(iter(self.dense.values()))


@contextmanager
def refusals(place: str) -> Iterator[None]:
    """Turn Milvus' errors within the context into a `BulkError`.

    Raises:
        BulkError: Milvus rejects the request, or has gone away.
    """
    try:
        yield
    except pymilvus.exceptions.MilvusException as error:
        message = " ".join(str(error.message).split())
        is_away = error.code in (pymilvus.exceptions.ErrorCode.UNEXPECTED_ERROR, 2, 4) and "connect" in message.lower()
        raise BulkError(
            f"{place} cannot be reached, or has gone away: {message}"
            if is_away
            else f"{place}: Milvus rejects the request: {message}"
        ) from error
    except (grpc.RpcError, ConnectionError) as error:
        reason = str(error.details()) if isinstance(error, grpc.Call) else str(error) or type(error).__name__
        raise BulkError(f"{place} cannot be reached, or has gone away: {reason}") from error


def is_unauthenticated(error: BaseException) -> bool:
    """Return whether a server rejected the token: pymilvus says only that it cannot connect."""
    return any(
        isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNAUTHENTICATED
        for cause, _is_context in chain(error)
    )


def find_collection(client: MilvusClient, name: str, store: str) -> Collection | None:
    """Return a collection by its name or an alias; ``None`` if it does not exist.

    Raises:
        BulkError: the collection's note cannot be read.
    """
    place = f"{store}{name}"
    with refusals(place):
        try:
            description = client.describe_collection(name, timeout=TIMEOUT_S)
        except pymilvus.exceptions.MilvusException as error:
            if error.code == _NO_COLLECTION:
                return None
            raise
    fields = [_field(field) for field in description["fields"]]
    [id_field] = [mine for mine, theirs in zip(fields, description["fields"], strict=True) if theirs.get("is_primary")]
    note = (description.get("properties") or {}).get(NOTE)
    return Collection(
        name=description["collection_name"],
        place=f"{store}{description['collection_name']}",
        number=int(description.get("collection_id", 0)),
        id=id_field,
        vectors=[field for field in fields if field.is_vector],
        others=[field for field in fields if not field.is_vector and field is not id_field],
        notes={} if note is None else read_notes({NOTE: _loads(note)}, place),
        description=description,
    )


def _loads(text: str) -> Json:
    try:
        value: Json = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value


def _field(described: Mapping[str, Any]) -> Field:
    settings = dict(described.get("params") or {})
    for name in ("nullable", "element_type", "default_value", "description", "is_partition_key", "is_clustering_key"):
        if described.get(name) not in (None, "", False):
            settings[name] = described[name]
    kind, is_computed = DataType(described["type"]), bool(described.get("is_function_output"))
    return Field(described["name"], kind, settings, is_computed)


def selection(collection: Collection, ids: Sequence[RowId]) -> str:
    """Return the expression for these ids, leaving out ids of another type than the collection's."""
    known = [_literal(id_) for id_ in ids if isinstance(id_, int) == collection.is_counted]
    return f"{collection.id.name} in [{', '.join(known)}]"


def after_id(collection: Collection, row_id: RowId | None) -> str:
    """Return the expression for the items after an id."""
    return "" if row_id is None else f"{collection.id.name} > {_literal(row_id)}"


def _literal(row_id: RowId) -> str:
    return str(row_id) if isinstance(row_id, int) else json.dumps(row_id, ensure_ascii=False)


def payload_of(collection: Collection, item: Mapping[str, Any]) -> dict[str, Json]:
    """Return the fields of an item except its id and vectors, converted to JSON."""
    hidden = {collection.id.name, *(field.name for field in collection.vectors)}
    return {name: to_json(value) for name, value in item.items() if name not in hidden}


def create_collection(
    client: MilvusClient, name: str, note: SpaceNote, has_counted_ids: bool, vector: str, sparse: str
) -> None:
    """Create a collection with an id, the vectors of a job, and dynamic fields for the payload, without indexes."""
    schema = client.create_schema(enable_dynamic_field=True)
    if has_counted_ids:
        schema.add_field("id", DataType.INT64, is_primary=True)
    else:
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
    if note.dimensions:
        schema.add_field(vector, DataType.FLOAT_VECTOR, dim=note.dimensions)
    if note.has_sparse:
        schema.add_field(sparse, DataType.SPARSE_FLOAT_VECTOR)
    noted = vector if note.dimensions else sparse
    _create(client, name, schema=schema, properties=noted_properties({noted: note}))


def _create(client: MilvusClient, name: str, **settings: Any) -> None:
    """Create a collection, also if a process was killed while Milvus Lite created it, which leaves an empty folder."""
    create = partial(client.create_collection, name, timeout=TIMEOUT_S, **settings)
    try:
        create()
    except pymilvus.exceptions.MilvusException as error:
        folder = _FOLDER_EXISTS.search(str(error.message))
        if folder is None or not _remove_empty(Path(folder[1])):
            raise
        create()


def _remove_empty(folder: Path) -> bool:
    """Remove the folder of a collection that has no schema yet, and so no items; return whether it was one."""
    try:
        (folder / "schema.json.tmp").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # it has other content
        return False
    return True


def usual_indexes(note: SpaceNote, vector: str, sparse: str) -> IndexParams:
    """Return the indexes of a new collection."""
    indexes = IndexParams()
    if note.dimensions:
        metric = "COSINE" if note.is_normalized else "IP"
        indexes.add_index(field_name=vector, index_type="AUTOINDEX", metric_type=metric)
    if note.has_sparse:
        indexes.add_index(field_name=sparse, index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    return indexes


def add_indexes(client: MilvusClient, name: str, wanted: IndexParams) -> None:
    """Create those of the indexes whose field has none: a process may have ended after it created the collection."""
    found = client.list_indexes(name, timeout=TIMEOUT_S)
    fields = {client.describe_index(name, index, timeout=TIMEOUT_S)["field_name"] for index in found}
    if missing := [index for index in wanted if index.field_name not in fields]:
        client.create_index(name, IndexParams(missing), timeout=TIMEOUT_S)


def create_like(client: MilvusClient, name: str, other: Collection, note: SpaceNote, vector: Field) -> None:
    """Create a collection with the fields, functions and settings of another, without indexes, for vectors of another space.

    The ids are always given by the writer, even if Milvus generated them in the other collection.
    """
    schema = client.create_schema(enable_dynamic_field=bool(other.description.get("enable_dynamic_field")))
    for field in (other.id, *other.vectors, *other.others):
        settings = dict(field.settings)
        if field.name == vector.name:
            settings["dim"] = note.dimensions
        schema.add_field(field.name, field.kind, is_primary=field.name == other.id.name, **settings)
    for function in other.description.get("functions") or ():
        schema.add_function(
            pymilvus.Function(
                name=function["name"],
                function_type=function["type"],
                input_field_names=list(function["input_field_names"]),
                output_field_names=list(function["output_field_names"]),
                params=function.get("params") or {},
            )
        )
    properties = dict(other.description.get("properties") or {})
    others = {name: own for name, own in other.notes.items() if name != vector.name}
    _create(
        client,
        name,
        schema=schema,
        consistency_level=other.description.get("consistency_level_name", "Strong"),
        properties={**properties, **noted_properties({**others, vector.name: note})},
    )


def indexes_of(client: MilvusClient, other: Collection) -> IndexParams:
    """Return the indexes of a collection, for its copy."""
    indexes = IndexParams()
    for index in client.list_indexes(other.name, timeout=TIMEOUT_S):
        described = client.describe_index(other.name, index, timeout=TIMEOUT_S)
        indexes.add_index(
            **{key: value for key, value in described.items() if key in ("field_name", "index_type", "metric_type")},
            index_name=described["index_name"],
            params={key: value for key, value in described.items() if key not in _OF_INDEXES},
        )
    return indexes


_OF_INDEXES: Final = (
    "index_type", "metric_type", "field_name", "index_name", "total_rows", "indexed_rows", "pending_index_rows", "state",
)  # fmt: skip


def noted_properties(notes: Mapping[str, SpaceNote]) -> dict[str, str]:
    """Return notes, by the names of their vectors, in the form of a collection's property."""
    return {NOTE: json.dumps({name: note_to_json(note) for name, note in notes.items()})}
