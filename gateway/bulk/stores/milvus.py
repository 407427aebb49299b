"""Milvus, a server or a Milvus Lite file, as a source, a sink, and a store whose collections can move to another model.

The note of the space is a property of the collection.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pymilvus import MilvusClient

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BadRow, BulkError, Row, RowId
from gateway.bulk.stores import milvus_rows
from gateway.bulk.stores.milvus_collections import (
    TIMEOUT_S,
    Collection,
    find_collection,
    is_unauthenticated,
    refusals,
    selection,
)
from gateway.bulk.stores.payloads import digest
from gateway.bulk.stores.protocol import CollectionInfo, Guard, Hit, Mark, Place, Since, SinkOptions, not_kept
from gateway.bulk.stores.reading import KeysetSource, clock_mark, fields_named, is_later, since_mark
from gateway.config.wording import quote
from gateway.types import SparseVector

_LITE_SUFFIX = ".db"
# Milvus Lite is a server in this process. pymilvus pings it every ten seconds, which gRPC's server takes for an attack
# when a call lasts longer than half a minute: it closes the connection, and the call fails (too many pings).
_NEVER_MS = 2**31 - 1
_OF_LITE = {"grpc_options": {"grpc.keepalive_time_ms": _NEVER_MS}}


def open_store(place: Place) -> MilvusStore:
    """Open the server or file of a place.

    Raises:
        BulkError: the server cannot be reached, or the file cannot be opened.
    """
    return MilvusStore(place)


class MilvusStore:
    """A Milvus server, or a file of Milvus Lite."""

    def __init__(self, place: Place) -> None:
        self.name = place.store
        self._place = place
        self._vector = place.options.get("vector")
        self._prefix = place.named("")
        self._client = self._connect()

    def _connect(self) -> MilvusClient:
        place = self._place
        if place.location:
            if not place.location.endswith(_LITE_SUFFIX):
                raise BulkError(f"{self.name}: the name of a Milvus Lite file must end in {_LITE_SUFFIX}")
            uri, token = place.location, ""
        else:
            host = f"[{place.host}]" if ":" in place.host else place.host
            uri = f"{'https' if place.is_secure else 'http'}://{host}:{place.port}"
            token = os.environ.get(place.key or "", "")
            if place.user:
                token = f"{place.user}:{token}"
        try:
            with refusals(self.name):
                options = _OF_LITE if place.location else {}
                return MilvusClient(uri=uri, token=token, db_name=place.path, timeout=TIMEOUT_S, **options)
        except BulkError as error:
            if is_unauthenticated(error):
                has_token = bool(os.environ.get(place.key or ""))
                problem = f"rejects the token in {place.secret}" if has_token else f"needs a token: {place.remedy}"
                raise BulkError(f"{self.name} {problem}") from error
            if not place.location:
                raise
            why = "only one process at a time can use a Milvus Lite file"
            if not os.access(os.path.dirname(os.path.realpath(place.location)), os.W_OK):  # noqa: PTH120
                why = "its folder does not exist, or cannot be written"
            raise BulkError(f"{self.name} cannot be opened; {why}: {error}") from error

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> KeysetSource:
        """Return the items of a collection."""
        return milvus_rows.open_source(self._connect, self._find(collection), names, since)

    def sink(self, collection: str, options: SinkOptions) -> milvus_rows.MilvusSink:
        """Return a sink for a collection, also by an alias: one that is redirected meanwhile does not redirect the job."""
        found = find_collection(self._client, collection, self._prefix)
        name = collection if found is None else found.name
        return milvus_rows.MilvusSink(self._connect, name, self._prefix, options, merges=bool(self._place.location))

    def _find(self, collection: str) -> Collection:
        found = find_collection(self._client, collection, self._prefix)
        if found is None:
            raise BulkError(f"there is no collection {quote(collection)} in {self.name}")
        with refusals(found.place):
            self._client.load_collection(found.name, timeout=TIMEOUT_S)
        return found

    def collections(self) -> Sequence[str]:
        """Return the names of all collections."""
        with refusals(self.name):
            return sorted(self._client.list_collections(timeout=TIMEOUT_S))

    def describe(self, collection: str) -> CollectionInfo:
        """Return a collection's info."""
        found = self._find(collection)
        widths = {name: field.width for name, field in found.dense.items()}
        number = milvus_rows.count_items(self._client, found)
        has_auto_id = bool(found.description.get("auto_id"))
        return CollectionInfo(found.name, number, widths, found.notes, str(found.number), has_auto_id)

    def read_ids(self, collection: str, ids: Sequence[RowId], names: FieldNames) -> Iterator[Row | BadRow]:
        """Yield the items with these ids."""
        found = self._find(collection)
        fields = fields_named(names)
        for start in range(0, len(ids), milvus_rows.PAGE):
            for row_id, payload in milvus_rows.read_some(self._client, found, ids[start : start + milvus_rows.PAGE]):
                yield fields.row(payload, f"id {row_id} of {found.place}", row_id, row_id)

    def digests(self, collection: str) -> Iterator[tuple[RowId, bytes]]:
        """Yield ids and hashes of payloads, in ascending order of the ids."""
        found = self._find(collection)
        last: RowId | None = None
        while page := milvus_rows.read_page(self._client, found, last):
            for row_id, payload in page:
                last = row_id
                yield row_id, digest(payload)

    def digests_of(self, collection: str, ids: Sequence[RowId]) -> Mapping[RowId, bytes]:
        """Return the hashes of the payloads of those of these items that exist."""
        found = self._find(collection)
        return {
            row_id: digest(payload)
            for start in range(0, len(ids), milvus_rows.PAGE)
            for row_id, payload in milvus_rows.read_some(self._client, found, ids[start : start + milvus_rows.PAGE])
        }

    def mark(self, collection: str, changed_at: str | None) -> Mark | None:
        """Return the present moment by the clock; Milvus shows no order of changes."""
        return None if changed_at is None else clock_mark(changed_at)

    def changes(self, collection: str, since: Mark) -> Iterator[tuple[RowId, bool]]:
        """Yield the id of each item, and whether its field says that it has changed.

        Payloads are read, since a field of JSON can only be read whole.
        """
        condition, found = since_mark(since), self._find(collection)
        last: RowId | None = None
        while page := milvus_rows.read_page(self._client, found, last):
            for row_id, payload in page:
                last = row_id
                yield row_id, is_later(payload, condition)

    def sort_key(self, row_id: RowId) -> tuple[int, int | str]:
        """Return an id's sort key: integers sort by value, strings by code points."""
        return (0, row_id) if isinstance(row_id, int) else (1, row_id)

    def filled(self, collection: str, vector: str) -> Iterator[RowId]:
        """Raise an error, because Milvus cannot add a vector to existing items."""
        raise BulkError(f"{self._find(collection).place}: {milvus_rows.NO_FURTHER_VECTOR}")

    def delete_vector(self, collection: str, vector: str) -> None:
        """Raise an error, like `filled`."""
        raise BulkError(f"{self._find(collection).place}: {milvus_rows.NO_FURTHER_VECTOR}")

    def delete_ids(self, collection: str, ids: Sequence[RowId], guard: Guard | None = None) -> None:
        """Delete items."""
        found = self._find(collection)
        if guard is not None:
            ids = not_kept(ids, self.digests_of(collection, ids), guard)
        with refusals(found.place):
            milvus_rows.delete_items(self._client, found, ids)

    def search(
        self, collection: str, query: npt.NDArray[np.float32] | SparseVector, limit: int, vector: str | None = None
    ) -> Sequence[Hit]:
        """Return the nearest items, by the metric of the field's index."""
        found = self._find(collection)
        if isinstance(query, SparseVector):
            name = vector or next(
                (field.name for field in found.vectors if not field.width and not field.is_computed), ""
            )
            data: object = dict(zip(query.indices.tolist(), query.values.tolist(), strict=True))
        else:
            name, data = found.vector(vector or self._vector).name, query
        with refusals(found.place):
            metric = next(
                (
                    described["metric_type"]
                    for index in self._client.list_indexes(found.name, timeout=TIMEOUT_S)
                    if (described := self._client.describe_index(found.name, index, timeout=TIMEOUT_S))["field_name"]
                    == name
                ),
                "COSINE",
            )
            [hits] = self._client.search(
                found.name,
                data=[data],
                anns_field=name,
                limit=limit,
                output_fields=[found.id.name],
                consistency_level="Strong",
                timeout=TIMEOUT_S,
            )
        sign = -1.0 if metric == "L2" else 1.0
        return [Hit(hit["entity"][found.id.name], sign * float(hit["distance"])) for hit in hits]

    def vectors(
        self, collection: str, ids: Sequence[RowId], vector: str | None = None
    ) -> Mapping[RowId, npt.NDArray[np.float32]]:
        """Return the vectors of items."""
        found = self._find(collection)
        name = found.vector(vector or self._vector).name
        with refusals(found.place):
            items = self._client.query(
                found.name,
                filter=selection(found, ids),
                output_fields=[found.id.name, name],
                consistency_level="Strong",
                timeout=TIMEOUT_S,
            )
        return {item[found.id.name]: np.asarray(item[name], np.float32) for item in items if item.get(name) is not None}

    def aliases(self) -> Mapping[str, str]:
        """Return the collection that each alias points to."""
        with refusals(self.name):
            return {
                alias: collection
                for collection in self._client.list_collections(timeout=TIMEOUT_S)
                for alias in self._client.list_aliases(collection, timeout=TIMEOUT_S)["aliases"]
            }

    def why_not_flip(self, name: str) -> str:
        """Return the reason why a name cannot become an alias; empty if it can, or already is one."""
        if name in self.collections():
            return (
                f"{quote(name)} is the name of an existing collection, which an alias cannot have. Let applications "
                "use an alias: choose a name for it, and set it once in their configuration"
            )
        return ""

    def flip(self, name: str, collection: str) -> None:
        """Point an alias to a collection, in one step; create the alias if it does not exist."""
        if reason := self.why_not_flip(name):
            raise BulkError(reason)
        found = self._find(collection)
        with refusals(self.name):
            change = self._client.alter_alias if name in self.aliases() else self._client.create_alias
            change(found.name, name, timeout=TIMEOUT_S)

    def delete_alias(self, name: str) -> None:
        """Delete an alias, but not its collection."""
        if name not in self.aliases():
            raise BulkError(f"{self.name} has no alias {quote(name)}")
        with refusals(self.name):
            self._client.drop_alias(name, timeout=TIMEOUT_S)

    def delete_collection(self, collection: str, look: Callable[[], None] | None = None) -> None:
        """Delete a collection by its real name, right after the look."""
        aliases = self.aliases()
        if collection in aliases:
            raise BulkError(f"{quote(collection)} is an alias of {quote(aliases[collection])}, not a collection")
        if meaning := sorted(name for name, real in aliases.items() if real == collection):
            raise BulkError(
                f"the alias {quote(meaning[0])} still points to the collection {quote(collection)}; point it to "
                "another one "
                "first"
            )
        name = self._find(collection).name
        if look is not None:
            look()
        with refusals(self.name):
            self._client.drop_collection(name, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
