"""The items of a Milvus collection: reading them in the order of their ids, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from gateway.bulk.blocks import size_of
from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Json, Row, RowId, RowsRefused, SpaceNote, ids_of_parted
from gateway.bulk.stores import milvus_collections
from gateway.bulk.stores.milvus_collections import (
    MAX_ID_BYTES,
    MAX_WIDTH,
    TIMEOUT_S,
    Collection,
    Field,
    after_id,
    find_collection,
    noted_properties,
    payload_of,
    refusals,
    selection,
)
from gateway.bulk.stores.notes import check_note, replaced
from gateway.bulk.stores.payloads import KindOfIds, has_nul, large_integer_problem, with_text
from gateway.bulk.stores.protocol import Since, SinkOptions
from gateway.bulk.stores.reading import Item, KeysetSource
from gateway.config.wording import quote

Connect: TypeAlias = Callable[[], MilvusClient]

PAGE: Final = 500
"""Items per read or write request."""
_MAX_BYTES: Final = 16_000_000
"""Bytes per request, while a server accepts 64 MB."""
_TOO_LARGE: Final = ("exceeds max length", "larger than max")
"""Parts of the messages about the JSON of a row, a text, and a whole request that exceed the server's limits."""
NO_FURTHER_VECTOR: Final = "Milvus adds no vectors to items that exist: choose a second collection"
_INT64: Final = range(-(2**63), 2**63)
_DENSE_NAME, _SPARSE_NAME = "vector", "sparse"
_DYNAMIC: Final = "$meta"
"""The field in which Milvus keeps the fields that a collection does not define."""


def read_page(client: MilvusClient, collection: Collection, after: RowId | None, limit: int = PAGE) -> list[Item]:
    """Return the ids and payloads of the next items, in ascending order of the ids."""
    return _query(
        client,
        collection,
        after_id(collection, after),
        # Ordered by id, requested in the same way as by Milvus' own iterator.
        limit=limit,
        iterator="True",
        reduce_stop_for_best="True",
    )


def read_some(client: MilvusClient, collection: Collection, ids: Sequence[RowId]) -> list[Item]:
    """Return the ids and payloads of the existing items among these."""
    return _query(client, collection, selection(collection, ids)) if ids else []


def _query(client: MilvusClient, collection: Collection, expression: str, **settings: Any) -> list[Item]:
    names = [field.name for field in collection.others]
    if collection.description.get("enable_dynamic_field"):
        names.append("$meta")
    with refusals(collection.place):
        found = client.query(
            collection.name,
            filter=expression,
            output_fields=[collection.id.name, *names],
            consistency_level="Strong",
            timeout=TIMEOUT_S,
            **settings,
        )
    return [(item[collection.id.name], payload_of(collection, item)) for item in found]


def open_source(connect: Connect, collection: Collection, names: FieldNames, since: Since | None) -> KeysetSource:
    """Return the items of a collection."""
    client = connect()
    return KeysetSource(
        collection.place,
        collection.number,
        names,
        since,
        read_page=partial(read_page, client, collection),
        count=partial(count_items, client, collection),
        close=client.close,
    )


def count_items(client: MilvusClient, collection: Collection) -> int:
    """Return the number of items in a collection."""
    with refusals(collection.place):
        [found] = client.query(
            collection.name, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=TIMEOUT_S
        )
    return int(found["count(*)"])


def delete_items(client: MilvusClient, collection: Collection, ids: Sequence[RowId]) -> None:
    """Delete items. Called within `refusals`."""
    for start in range(0, len(ids), PAGE):
        chosen = selection(collection, ids[start : start + PAGE])
        client.delete(collection.name, filter=chosen, timeout=TIMEOUT_S)


def _requests(rows: Sequence[Row], width: int) -> Iterator[range]:
    """Yield the numbers of rows, as many at a time as fit into a request."""
    start = size = 0
    for number, row in enumerate(rows):
        own = 4 * width + len(row.text) + size_of(row.payload)
        if number > start and (size + own > _MAX_BYTES or number - start == PAGE):
            yield range(start, number)
            start, size = number, 0
        size += own
    yield range(start, len(rows))


class MilvusSink:
    """Writes vectors into a collection, which it creates if necessary.

    Args:
        store: the collection's URL without its name.
        merges: an upsert keeps the fields of the old item that the new one lacks, as in Milvus Lite; but there, an insert
            replaces the old item, as a whole and in one step.
    """

    def __init__(self, connect: Connect, collection: str, store: str, options: SinkOptions, *, merges: bool) -> None:
        self.name = f"{store}{collection}"
        self._client = connect()
        self._wanted, self._store, self._options, self._merges = collection, store, options, merges
        self._note: SpaceNote | None = None
        self._collection: Collection | None = None
        self._like: Collection | None = None
        self._noted: dict[str, SpaceNote] = {}
        self._ids = KindOfIds()

    def count(self) -> int:
        """Return the number of items; 0 if the collection does not exist."""
        found = find_collection(self._client, self._wanted, self._store)
        if found is None:
            return 0
        with refusals(self.name):
            self._client.load_collection(found.name, timeout=TIMEOUT_S)
        return count_items(self._client, found)

    def open(self, note: SpaceNote) -> None:
        """Check that the collection can take vectors of this space. If it does not exist, the first write creates it.

        Raises:
            BulkError: the collection has vectors of another space, or Milvus cannot store these.
        """
        self._check_note(note)
        self._note = note
        with refusals(self.name):
            if self._options.like is not None:
                self._make_like(self._options.like, note)
            self._collection = find_collection(self._client, self._wanted, self._store)
            if self._collection is not None:
                self._ids.are_counted = self._collection.is_counted
                self._check(self._collection, note)
                self._client.load_collection(self._collection.name, timeout=TIMEOUT_S)

    def problem(self, row: Row) -> str:
        """Return the reason why Milvus cannot store a row; empty if it can."""
        if problem := self._ids.problem(row, self.name) or self._id_problem(row) or self._field_problem(row):
            return problem
        self._ids.add(row)
        return ""

    def _id_problem(self, row: Row) -> str:
        if isinstance(row.id, int):
            return "" if row.id in _INT64 else f"its id {row.id} is not a 64-bit integer, as Milvus requires"
        if has_nul(row.id):
            return "its id has the character U+0000, which Milvus cannot search for: remove it"
        most = (
            MAX_ID_BYTES if self._collection is None else self._collection.id.settings.get("max_length", MAX_ID_BYTES)
        )
        size = len(row.id.encode())
        return f"its id has {size:,} bytes, but those of {self.name} have at most {most:,}" if size > most else ""

    def _field_problem(self, row: Row) -> str:
        found = self._collection
        id_name = "id" if found is None else found.id.name
        vectors = (
            (self._options.vector or _DENSE_NAME, _SPARSE_NAME)
            if found is None
            else (one.name for one in found.vectors)
        )
        payload = self._payload(row)
        if name := next((name for name in (id_name, *vectors, _DYNAMIC) if name in payload), ""):
            return (
                f"it has a field {quote(name)}, a name that Milvus or {self.name} uses itself, so it would be lost: rename "
                "the field, or leave it out with --payload"
            )
        if problem := large_integer_problem(row, payload, "Milvus"):
            return problem
        for field in () if found is None else found.others:
            value, most = payload.get(field.name), field.settings.get("max_length")
            if isinstance(value, str) and most is not None and (size := len(value.encode())) > most:
                return (
                    f"its field {quote(field.name)} has {size:,} bytes, but those of {self.name} have at most {most:,}"
                )
        return ""

    def _check_note(self, note: SpaceNote) -> None:
        if note.token_width:
            raise BulkError(f"{self.name}: Milvus can store dense vectors and sparse weights, but no multi-vectors")
        if note.dimensions > MAX_WIDTH:
            raise BulkError(
                f"{self.name}: Milvus accepts dense vectors of at most {MAX_WIDTH:,} dimensions, got "
                f"{note.dimensions:,}"
            )
        if self._options.updates:
            raise BulkError(f"{self.name}: {NO_FURTHER_VECTOR}")

    def _make_like(self, like: str, note: SpaceNote) -> None:
        self._like = find_collection(self._client, like, self._store)
        if self._like is None:
            raise BulkError(f"there is no collection {quote(like)} in {self._store.rstrip('/#')}")
        if find_collection(self._client, self._wanted, self._store) is None:
            milvus_collections.create_like(
                self._client, self._wanted, self._like, note, self._like.vector(self._options.vector)
            )
        if not self._options.adopts:
            milvus_collections.add_indexes(
                self._client, self._wanted, milvus_collections.indexes_of(self._client, self._like)
            )

    def _check(self, collection: Collection, note: SpaceNote) -> None:
        """Check an existing collection, and write the note if it is missing."""
        noted = self._vector(collection).name if note.dimensions else self._sparse(collection)
        held = collection.notes.get(noted)
        number = count_items(self._client, collection) if held is None else 0
        check_note(held, note, self.name, number, adopts=self._options.adopts)
        width = self._vector(collection).width if note.dimensions else 0
        if width != note.dimensions:
            raise BulkError(
                f"the field {quote(noted)} of {self.name} requires vectors of {width} dimensions, but those of "
                f"{note.model} have {note.dimensions}: choose another collection"
            )
        sparse = self._sparse(collection) if note.has_sparse else ""
        if held is None:
            self._client.alter_collection_properties(
                collection.name, noted_properties({**collection.notes, noted: note}), timeout=TIMEOUT_S
            )
        if self._like is None:
            milvus_collections.add_indexes(
                self._client, collection.name, milvus_collections.usual_indexes(note, noted, sparse)
            )
        self._noted = {noted: held or note}

    def _vector(self, collection: Collection) -> Field:
        return collection.vector(self._options.vector)

    def _sparse(self, collection: Collection) -> str:
        names = [field.name for field in collection.vectors if not field.width and not field.is_computed]
        if len(names) != 1:
            raise BulkError(f"{self.name} has {len(names)} fields for sparse weights, but must have exactly one")
        return names[0]

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Insert items, or replace those with the same ids. Milvus responds after writing them to its log.

        Raises:
            RowsRefused: some rows are too large for the server, whose limit for the JSON of a row is 64 KiB by default.
            BulkError: Milvus rejects the shard, or has gone away.
        """
        if not batch.rows or self._note is None:
            return
        with refusals(self.name):
            if self._collection is None:
                self._collection = self._create(batch.rows)
            collection = self._collection
            self._check_same(collection)
            self._ids.are_counted = collection.is_counted
            for row in batch.rows:
                if problem := self.problem(row):
                    raise BulkError(f"{row.place}: {problem}")
            bad: list[BadRow] = []
            for numbers in _requests(batch.rows, self._note.dimensions):
                items = self._items(collection, batch, numbers)
                bad += self._store_rows(collection, batch.rows[numbers.start : numbers.stop], items)
            if parted := ids_of_parted(batch.rows, bad):
                delete_items(self._client, collection, parted)
        if bad:
            raise RowsRefused(bad)

    def _store_rows(self, collection: Collection, rows: Sequence[Row], items: list[dict[str, Any]]) -> list[BadRow]:
        """Store items in one request, or in several smaller ones; return the rows that are too large for the server."""
        try:
            write = self._client.insert if self._merges else self._client.upsert
            write(collection.name, items, timeout=TIMEOUT_S)
        except (MilvusException, grpc.RpcError) as error:
            message = " ".join(str(getattr(error, "message", error)).split())
            if not any(part in message for part in _TOO_LARGE):
                raise
            if len(rows) == 1:
                return [BadRow(rows[0].place, f"Milvus rejects it: {message}", rows[0].position, rows[0].id)]
            middle = len(rows) // 2
            return self._store_rows(collection, rows[:middle], items[:middle]) + self._store_rows(
                collection, rows[middle:], items[middle:]
            )
        return []

    def _check_same(self, collection: Collection) -> None:
        """Check that the collection is still the one that was opened."""
        now = find_collection(self._client, self._wanted, self._store)
        if now is None or now.number != collection.number or not self._noted.items() <= now.notes.items():
            raise BulkError(replaced(self.name))

    def _create(self, rows: Sequence[Row]) -> Collection:
        if self._note is None:
            raise ValueError("write before open")
        are_counted = all(isinstance(row.id, int) for row in rows)
        vector = self._options.vector or _DENSE_NAME
        collection = find_collection(self._client, self._wanted, self._store)
        if collection is None:
            milvus_collections.create_collection(
                self._client, self._wanted, self._note, are_counted, vector, _SPARSE_NAME
            )
            collection = find_collection(self._client, self._wanted, self._store)
        if collection is None:
            raise BulkError(f"{self.name} was deleted while it was being created")
        # Another job may have created it since `open`, and Milvus does not complain about a second creation of the same.
        self._check(collection, self._note)
        self._client.load_collection(collection.name, timeout=TIMEOUT_S)
        return collection

    def _items(self, collection: Collection, batch: EmbeddedRows, numbers: Sequence[int]) -> list[dict[str, Any]]:
        rows = [batch.rows[number] for number in numbers]
        others = self._other_vectors(collection, [row.id for row in rows])
        items = []
        for number, row in zip(numbers, rows, strict=True):
            item: dict[str, Any] = {**others.get(row.id, {}), **self._payload(row), collection.id.name: row.id}
            if batch.dense is not None:
                item[self._vector(collection).name] = batch.dense[number]
            if batch.sparse is not None:
                weights = batch.sparse[number]
                item[self._sparse(collection)] = dict(
                    zip(weights.indices.tolist(), weights.values.tolist(), strict=True)
                )
            items.append(item)
        return items

    def _payload(self, row: Row) -> Mapping[str, Json]:
        return row.payload if self._options.text is None else with_text(row, self._options.text)

    def _other_vectors(self, collection: Collection, ids: Sequence[RowId]) -> dict[RowId, dict[str, Any]]:
        """Return the items' vectors in other fields, from the collection that this one copies."""
        if self._like is None:
            return {}
        names = [
            field.name
            for field in self._like.vectors
            if not field.is_computed and field.name != self._vector(collection).name
        ]
        if not names:
            return {}
        id_name = self._like.id.name
        found = self._client.query(
            self._like.name,
            filter=selection(self._like, ids),
            output_fields=[id_name, *names],
            consistency_level="Strong",
            timeout=TIMEOUT_S,
        )
        return {item[id_name]: {name: item[name] for name in names} for item in found}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
