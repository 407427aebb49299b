"""A Qdrant collection that stores the vectors of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from qdrant_client import QdrantClient, models

from gateway.bulk.blocks import size_of
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Row, RowId, RowsRefused, SpaceNote, ids_of_parted
from gateway.bulk.stores.notes import check_note, read_notes, replaced, write_notes
from gateway.bulk.stores.protocol import SinkOptions
from gateway.bulk.stores.qdrant_connection import Connection
from gateway.bulk.stores.qdrant_errors import status_of
from gateway.bulk.stores.qdrant_layout import UNNAMED, Layout, Vectors, dense_params, layout_in, new_layout
from gateway.bulk.stores.qdrant_points import payload_of, point_id, problem_of
from gateway.bulk.stores.qdrant_settings import add_indexes, create, create_like, layout_like

Result = TypeVar("Result")

_Named: TypeAlias = dict[str, Any]
"""Vectors by name, with the types that Qdrant's client declares."""

_MAX_NUMBERS: Final = 400_000
"""Numbers per request: about 8 MB of JSON, while a server accepts 32 MB."""

_MAX_POINTS: Final = 256
_NUMBER_BYTES: Final = 20
"""The size of a number in JSON."""
_TOO_LARGE: Final = 413
"""The status of a request that exceeds the server's limit."""


class QdrantSink:
    """Writes rows as points. Writing replaces the whole point, so a shard may be written any number of times."""

    def __init__(self, connection: Connection, collection: str, options: SinkOptions) -> None:
        self._connection = connection
        self._collection = collection
        self._options = options
        self._layout: Layout | None = None
        self._held: SpaceNote | None = None
        self._others: list[str] = []

    @property
    def name(self) -> str:
        """The collection's URL, without secrets."""
        return self._connection.place.named(self._collection)

    def count(self) -> int:
        """Return the number of points; 0 if the collection does not exist."""
        if not self._call(lambda client: client.collection_exists(self._collection)):
            return 0
        return self._call(lambda client: client.count(self._collection, exact=True)).count

    def open(self, note: SpaceNote) -> None:
        """Create the collection if it does not exist, and check that it can take vectors of this space.

        Raises:
            BulkError: the collection has vectors of another space, an unknown model, another width or another distance.
        """
        like = None if self._options.like is None else self._connection.read_info(self._options.like)
        if not self._call(lambda client: client.collection_exists(self._collection)):
            if self._options.updates:
                self._connection.read_info(self._collection)  # raises
            self._create(note, like)
        self._check(note)
        if like is not None and self._layout is not None:
            theirs, ours = Vectors.of(like), Vectors.of(self._connection.read_info(self._collection))
            self._others = sorted((theirs.names & ours.names) - self._layout.names)
            if not self._options.adopts:
                self._call(lambda client: add_indexes(client, self._collection, like))

    def _check(self, note: SpaceNote) -> None:
        """Check an existing collection, and write the note into an empty one."""
        info = self._connection.read_info(self._collection)
        if self._options.updates and self._options.vector not in Vectors.of(info).dense:
            info = self._add_vector(note)
        notes = read_notes(info.config.metadata, self.name)
        layout = layout_in(Vectors.of(info), note, self._options.vector, self.name)
        held = notes.get(layout.noted)
        num_items = 0 if held else self._count(layout.noted)
        check_note(held, note, self.name, num_items, adopts=self._options.adopts)
        if held is None:
            self._write_notes({**notes, layout.noted: note})
        self._layout, self._held = layout, held or note

    def problem(self, row: Row) -> str:
        """Return the reason why Qdrant cannot store a row; empty if it can."""
        return problem_of(row)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Store a shard's points, and wait until they are on the server's disk.

        Raises:
            RowsRefused: some rows are too large for the server.
            BulkError: the server rejects the shard, or stays unavailable.
        """
        if self._layout is None:
            raise RuntimeError("a sink must be opened before the first write")
        for row in batch.rows:
            if problem := self.problem(row):
                raise BulkError(f"{row.place}: {problem}")
        notes = read_notes(self._connection.read_info(self._collection).config.metadata, self.name)
        if notes.get(self._layout.noted) != self._held:
            raise BulkError(replaced(self.name))
        bad: list[BadRow] = []
        for rows, points in _requests(batch, self._layout, self._options.text):
            bad += self._store(rows, points)
        if bad:
            self._remove(ids_of_parted(batch.rows, bad))
            raise RowsRefused(bad)

    def _remove(self, ids: Sequence[RowId]) -> None:
        points: list[models.ExtendedPointId] = [point_id(row_id) for row_id in ids]
        if points:
            self._call(lambda client: client.delete(self._collection, models.PointIdsList(points=points), wait=True))

    def _store(self, rows: Sequence[Row], points: list[models.PointStruct]) -> list[BadRow]:
        """Store points in one request, or in several smaller ones; return the rows that are too large for the server."""
        try:
            self._call(partial(self._update if self._options.updates else self._upsert, points))
        except BulkError as error:
            if status_of(error.__cause__) != _TOO_LARGE:
                raise
            if len(rows) == 1:
                return [BadRow(rows[0].place, str(error), rows[0].position, rows[0].id)]
            middle = len(rows) // 2
            return self._store(rows[:middle], points[:middle]) + self._store(rows[middle:], points[middle:])
        return []

    def close(self) -> None:
        """Close the connection, if it has no other users."""
        self._connection.close()

    def _create(self, note: SpaceNote, like: models.CollectionInfo | None) -> None:
        is_ours = False

        def make(client: QdrantClient) -> None:
            nonlocal is_ours
            # The previous attempt may have succeeded without a response, or another program has created it.
            if client.collection_exists(self._collection):
                return
            if like is None:
                create(client, self._collection, new_layout(note, self._options.vector), note)
            else:
                layout = layout_like(Vectors.of(like), note, self._options.vector)
                create_like(client, self._collection, layout, note, like)
            is_ours = True

        self._call(make)
        info = self._connection.read_info(self._collection)
        if is_ours and not read_notes(info.config.metadata, self.name):
            self._call(lambda client: client.delete_collection(self._collection))
            raise BulkError(
                f"{self._connection.place.store} does not store metadata of collections; this needs Qdrant 1.16 or "
                "later"
            )

    def _add_vector(self, note: SpaceNote) -> models.CollectionInfo:
        """Add the named vector to a collection that lacks it."""
        if self._options.vector is None or not note.dimensions:
            raise BulkError(f"name the vector to add to the items of {self.name} with ?vector= in the URL")
        params = dense_params(note)
        config = models.DenseVectorNameConfig(
            dense=models.DenseVectorConfig(size=params.size, distance=params.distance)
        )
        name = self._options.vector
        self._call(lambda client: client.create_vector_name(self._collection, name, config))
        return self._connection.read_info(self._collection)

    def _count(self, vector: str) -> int:
        """Return the number of points with a vector of this name."""
        having = models.Filter(must=[models.HasVectorCondition(has_vector=vector)]) if vector else None
        return self._call(lambda client: client.count(self._collection, count_filter=having, exact=True)).count

    def _write_notes(self, notes: dict[str, SpaceNote]) -> None:
        metadata = write_notes(notes)
        self._call(lambda client: client.update_collection(self._collection, metadata=metadata))
        if read_notes(self._connection.read_info(self._collection).config.metadata, self.name) != notes:
            raise BulkError(
                f"{self._connection.place.store} does not store metadata of collections; this needs Qdrant 1.16 or "
                "later"
            )

    def _upsert(self, points: list[models.PointStruct], client: QdrantClient) -> None:
        if self._others and self._options.like is not None:
            points = self._with_others(points, self._options.like, client)
        client.upsert(self._collection, points, wait=True)

    def _with_others(
        self, points: list[models.PointStruct], like: str, client: QdrantClient
    ) -> list[models.PointStruct]:
        """Return points with the vectors that this job does not compute, from the collection that this one copies."""
        found = client.retrieve(like, [point.id for point in points], with_payload=False, with_vectors=self._others)
        others = {point.id: _named(point.vector) for point in found}
        return [
            point.model_copy(update={"vector": {**others.get(point.id, {}), **_named(point.vector)}})
            for point in points
        ]

    def _update(self, points: list[models.PointStruct], client: QdrantClient) -> None:
        """Add vectors to existing points, skipping points that were deleted since they were read."""
        found = client.retrieve(self._collection, [point.id for point in points], with_payload=False)
        exist = {point.id for point in found}
        vectors = [models.PointVectors(id=point.id, vector=point.vector) for point in points if point.id in exist]
        if vectors:
            client.update_vectors(self._collection, vectors, wait=True)

    def _call(self, ask: Callable[[QdrantClient], Result]) -> Result:
        return self._connection.call(ask, self._collection)


def _requests(
    batch: EmbeddedRows, layout: Layout, text_field: str | None
) -> Iterator[tuple[Sequence[Row], list[models.PointStruct]]]:
    """Yield the rows of a batch and their points, as many at a time as fit into a request."""
    points: list[models.PointStruct] = []
    num_numbers = 0
    for index, row in enumerate(batch.rows):
        vectors, size = _vectors(batch, index, layout)
        size += (len(row.text) + size_of(row.payload)) // _NUMBER_BYTES
        if points and (num_numbers + size > _MAX_NUMBERS or len(points) == _MAX_POINTS):
            yield batch.rows[index - len(points) : index], points
            points, num_numbers = [], 0
        vector = vectors[UNNAMED] if list(vectors) == [UNNAMED] else vectors
        points.append(models.PointStruct(id=point_id(row.id), vector=vector, payload=payload_of(row, text_field)))
        num_numbers += size
    if points:
        yield batch.rows[len(batch.rows) - len(points) :], points


def _named(vector: object) -> dict[str, object]:
    """Return vectors by name."""
    if isinstance(vector, dict):
        return vector
    return {} if vector is None else {UNNAMED: vector}


def _vectors(batch: EmbeddedRows, index: int, layout: Layout) -> tuple[_Named, int]:
    """Return the vectors of a row by name, and the count of their numbers."""
    named: _Named = {}
    size = 0
    if layout.dense is not None and batch.dense is not None:
        named[layout.dense] = batch.dense[index].tolist()
        size += batch.dense.shape[1]
    if layout.multivector is not None and batch.multivectors is not None:
        tokens = batch.multivectors[index]
        named[layout.multivector] = tokens.tolist()
        size += tokens.size
    if layout.sparse is not None and batch.sparse is not None:
        weights = batch.sparse[index]
        named[layout.sparse] = models.SparseVector(indices=weights.indices.tolist(), values=weights.values.tolist())
        size += 2 * len(weights.indices)
    return named, size
