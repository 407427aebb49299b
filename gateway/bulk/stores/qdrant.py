"""Qdrant, as a server or a folder: a source, a sink, and a store that `gateway move` supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
from qdrant_client import QdrantClient, models

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BadRow, BulkError, Row, RowId
from gateway.bulk.stores.notes import read_notes, write_notes
from gateway.bulk.stores.payloads import digest
from gateway.bulk.stores.protocol import CollectionInfo, Guard, Hit, Mark, Place, Since, SinkOptions, not_kept
from gateway.bulk.stores.qdrant_connection import Connection
from gateway.bulk.stores.qdrant_errors import status_of
from gateway.bulk.stores.qdrant_layout import Vectors
from gateway.bulk.stores.qdrant_points import ORIGINAL_ID, PointId, point_id, row_id_of, sort_key
from gateway.bulk.stores.qdrant_sink import QdrantSink
from gateway.bulk.stores.qdrant_source import QdrantSource
from gateway.bulk.stores.reading import clock_mark, fields_named, is_later, since_mark
from gateway.types import SparseVector

_PAGE: Final = 256


def open_store(place: Place) -> QdrantStore:
    """Return a server or a folder, which is opened on first use."""
    return QdrantStore(Connection.to(place))


class QdrantStore:
    """Qdrant as a store with collections. Names may be aliases, except where a method requires the real name."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def name(self) -> str:
        """The store's URL, without secrets."""
        return self._connection.place.store

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> QdrantSource:
        """Return the points of a collection as rows.

        Raises:
            BulkError: the folder does not contain a store, or the server cannot be reached.
        """
        self._connection.check_source()
        real = self._behind(collection)
        return QdrantSource(self._connection.again(), real, names, since)

    def sink(self, collection: str, options: SinkOptions) -> QdrantSink:
        """Return a sink for a collection.

        Raises:
            BulkError: the store cannot be opened.
        """
        real = self._behind(collection)
        return QdrantSink(self._connection.again(), real, self._with_vector(options))

    def _behind(self, collection: str) -> str:
        """Return the real name of a collection: an alias that is redirected meanwhile must not redirect a job."""
        try:
            return self.aliases().get(collection, collection)
        except BulkError as error:
            # The key may be for this collection alone; otherwise the next request says what is wrong.
            if status_of(error.__cause__) in (401, 403, 404):
                return collection
            raise

    def close(self) -> None:
        """Close the connection, unless a source or sink still uses it."""
        self._connection.close()

    def collections(self) -> Sequence[str]:
        """Return the real names of all collections."""
        found = self._connection.call(lambda client: client.get_collections(), "")
        return [description.name for description in found.collections]

    def describe(self, collection: str) -> CollectionInfo:
        """Return a collection's info."""
        info = self._connection.read_info(collection)
        counted = self._connection.call(lambda client: client.count(collection, exact=True), collection)
        return CollectionInfo(
            name=self.aliases().get(collection, collection),
            count=counted.count,
            widths={name: params.size for name, params in Vectors.of(info).single.items()},
            notes=read_notes(info.config.metadata, self._connection.place.named(collection)),
        )

    def read_ids(self, collection: str, ids: Sequence[RowId], names: FieldNames) -> Iterator[Row | BadRow]:
        """Yield the points of these rows that exist."""
        source = self.source(collection, names)
        try:
            yield from source.read_ids(ids, fields_named(names))
        finally:
            source.close()

    def digests(self, collection: str) -> Iterator[tuple[RowId, bytes]]:
        """Yield the id and the hash of the payload of each point, integers first, then UUIDs."""
        source = self.source(collection, FieldNames())
        try:
            for point, payload in source.read_payloads():
                row_id, rest = row_id_of(point, payload)
                yield row_id, digest(rest)
        finally:
            source.close()

    def digests_of(self, collection: str, ids: Sequence[RowId]) -> Mapping[RowId, bytes]:
        """Return the hashes of the payloads of the points of these rows that exist."""
        points: list[models.ExtendedPointId] = [point_id(row_id) for row_id in ids]
        found = self._connection.call(lambda client: client.retrieve(collection, points, with_payload=True), collection)
        rows = (row_id_of(_id(point.id), point.payload or {}) for point in found)
        return {row_id: digest(rest) for row_id, rest in rows}

    def mark(self, collection: str, changed_at: str | None) -> Mark | None:
        """Return the present moment by the clock; Qdrant has no order of changes."""
        return None if changed_at is None else clock_mark(changed_at)

    def changes(self, collection: str, since: Mark) -> Iterator[tuple[RowId, bool]]:
        """Yield the id of each point, and whether its field says that it has changed."""
        condition = since_mark(since)
        source = self.source(collection, FieldNames())
        try:
            for point, payload in source.read_payloads(None, [ORIGINAL_ID, condition.field.partition(".")[0]]):
                row_id, rest = row_id_of(point, payload)
                yield row_id, is_later(rest, condition)
        finally:
            source.close()

    def sort_key(self, row_id: RowId) -> tuple[int, int | str]:
        """Return a row's sort key in the order of `digests`."""
        return sort_key(point_id(row_id))

    def filled(self, collection: str, vector: str) -> Iterator[RowId]:
        """Yield the rows whose points have a vector of this name."""
        source = self.source(collection, FieldNames())
        try:
            for point, payload in source.read_payloads(None, [ORIGINAL_ID], vector):
                yield row_id_of(point, payload)[0]
        finally:
            source.close()

    def delete_vector(self, collection: str, vector: str) -> None:
        """Delete a vector of all points, and its note, unless an earlier attempt has done a part of that."""
        info = self._connection.read_info(collection)
        if not vector:
            raise BulkError(
                f"{self._connection.place.named(collection)}: Qdrant keeps a vector without a name as long as the "
                "collection; to end a move with both vectors kept, leave out --delete-old"
            )
        if vector in Vectors.of(info).names:
            self._connection.call(lambda client: client.delete_vector_name(collection, vector), collection)
        notes = read_notes(info.config.metadata, self._connection.place.named(collection))
        kept = write_notes({name: note for name, note in notes.items() if name != vector})
        self._connection.call(lambda client: client.update_collection(collection, metadata=kept), collection)

    def delete_ids(self, collection: str, ids: Sequence[RowId], guard: Guard | None = None) -> None:
        """Delete the points of these rows, and wait until the deletion is on disk."""
        if guard is not None and ids:
            ids = not_kept(ids, self.digests_of(collection, ids), guard)
        points: list[models.ExtendedPointId] = [point_id(row_id) for row_id in ids]
        if points:
            self._connection.call(
                lambda client: client.delete(collection, models.PointIdsList(points=points), wait=True), collection
            )

    def search(
        self, collection: str, query: npt.NDArray[np.float32] | SparseVector, limit: int, vector: str | None = None
    ) -> Sequence[Hit]:
        """Return the points nearest to a query vector."""
        vectors = Vectors.of(self._connection.read_info(collection))
        vector_query: models.SparseVector | list[float]
        if isinstance(query, SparseVector):
            vector_query = models.SparseVector(indices=query.indices.tolist(), values=query.values.tolist())
            known = list(vectors.sparse)
        else:
            vector_query = query.tolist()
            known = list(vectors.single)
        name = vector if vector is not None else self._connection.place.options.get("vector")
        if name is None:
            if len(known) != 1:
                raise BulkError(
                    f"{self._connection.place.named(collection)} has {len(known)} vectors to search: name one"
                )
            name = known[0]
        found = self._connection.call(
            lambda client: client.query_points(
                collection, query=vector_query, using=name or None, limit=limit, with_payload=[ORIGINAL_ID]
            ),
            collection,
        )
        is_distance = name in vectors.single and vectors.single[name].distance in (
            models.Distance.EUCLID,
            models.Distance.MANHATTAN,
        )
        return [
            Hit(row_id_of(_id(point.id), point.payload or {})[0], -point.score if is_distance else point.score)
            for point in found.points
        ]

    def vectors(
        self, collection: str, ids: Sequence[RowId], vector: str | None = None
    ) -> Mapping[RowId, npt.NDArray[np.float32]]:
        """Return the dense vectors of these rows' points, leaving out points without a vector."""
        name = self._vector_to_read(list(Vectors.of(self._connection.read_info(collection)).single), collection, vector)
        found: dict[RowId, npt.NDArray[np.float32]] = {}
        for start in range(0, len(ids), _PAGE):
            by_point = {point_id(row_id): row_id for row_id in ids[start : start + _PAGE]}
            retrieve = partial(_retrieve_vectors, collection, list(by_point), name)
            for point in self._connection.call(retrieve, collection):
                values = point.vector.get(name) if isinstance(point.vector, dict) else point.vector
                if values is not None:
                    found[by_point[_id(point.id)]] = np.array(values, np.float32)
        return found

    def aliases(self) -> Mapping[str, str]:
        """Return the collection that each alias points to."""
        found = self._connection.call(lambda client: client.get_aliases(), "")
        return {alias.alias_name: alias.collection_name for alias in found.aliases}

    def why_not_flip(self, name: str) -> str:
        """Return the reason why a name cannot become an alias; empty if it can, or already is one."""
        if name in self.collections():
            return (
                f"{name!r} is the name of an existing collection, which an alias cannot have. Let applications use an "
                "alias: choose a name for it, and set it once in their configuration"
            )
        return ""

    def flip(self, name: str, collection: str) -> None:
        """Point an alias to a collection, in one step; create the alias if it does not exist."""
        if reason := self.why_not_flip(name):
            raise BulkError(reason)
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=collection, alias_name=name)
        )
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name))
        self._connection.read_info(collection)

        def change(client: QdrantClient) -> None:
            # One request, which Qdrant applies as a whole, does both. The aliases are read again, because it may be
            # repeated.
            exists = any(alias.alias_name == name for alias in client.get_aliases().aliases)
            client.update_collection_aliases([delete, create] if exists else [create])

        self._connection.call(change, collection)

    def delete_alias(self, name: str) -> None:
        """Delete an alias, but not its collection."""
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name))
        self._connection.call(lambda client: client.update_collection_aliases([delete]), name)

    def delete_collection(self, collection: str, look: Callable[[], None] | None = None) -> None:
        """Delete a collection by its real name, right after the look."""
        aliases = self.aliases()
        if collection in aliases:
            raise BulkError(f"{collection!r} is an alias of {aliases[collection]!r}, not a collection")
        if meaning := sorted(name for name, real in aliases.items() if real == collection):
            raise BulkError(
                f"the alias {meaning[0]!r} still points to the collection {collection!r}; point it to another one first"
            )
        if look is not None:
            look()
        self._connection.call(lambda client: client.delete_collection(collection), collection)

    def _vector_to_read(self, known: Sequence[str], collection: str, requested: str | None) -> str:
        name = requested if requested is not None else self._connection.place.options.get("vector")
        if name is not None:
            return name
        if len(known) != 1:
            raise BulkError(
                f"{self._connection.place.named(collection)} has {len(known)} vectors: name one with ?vector= in the URL"
            )
        return known[0]

    def _with_vector(self, options: SinkOptions) -> SinkOptions:
        if options.vector is not None or "vector" not in self._connection.place.options:
            return options
        return replace(options, vector=self._connection.place.options["vector"])


def _retrieve_vectors(
    collection: str, points: list[models.ExtendedPointId], vector: str, client: QdrantClient
) -> list[models.Record]:
    return client.retrieve(collection, points, with_payload=False, with_vectors=[vector] if vector else True)


def _id(point: models.ExtendedPointId) -> PointId:
    return point if isinstance(point, int | str) else str(point)
