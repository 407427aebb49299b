"""A Chroma collection that stores the dense vectors of a job."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Final, cast

from chromadb.api.models.Collection import Collection
from chromadb.api.types import Include

from gateway.bulk.rows import BulkError, EmbeddedRows, Json, Row, SpaceNote
from gateway.bulk.stores.chroma_connection import Connection
from gateway.bulk.stores.chroma_items import metadata_of, problem_of, row_id_of
from gateway.bulk.stores.notes import NOTE, check_note, note_from_json, note_to_json
from gateway.bulk.stores.payloads import KindOfIds
from gateway.bulk.stores.protocol import SinkOptions

_MAX_ITEMS: Final = 512


class ChromaSink:
    """Writes rows as items, with the text as their document. Items with the same id are replaced."""

    def __init__(self, connection: Connection, collection: str, options: SinkOptions) -> None:
        self._connection = connection
        self._name = collection
        self._options = options
        self._collection: Collection | None = None
        self._ids = KindOfIds()

    @property
    def name(self) -> str:
        """The collection's URL, without secrets."""
        return self._connection.place.named(self._name)

    def count(self) -> int:
        """Return the number of items; 0 if the collection does not exist."""
        found = self._connection.find(self._name)
        return 0 if found is None else self._connection.call(found.count, self.name)

    def open(self, note: SpaceNote) -> None:
        """Create the collection if it does not exist, and check that it can take vectors of this space.

        Raises:
            BulkError: the collection has vectors of another space, an unknown model, another width or another distance,
            or the job has other outputs than dense vectors.
        """
        if note.has_sparse or note.token_width or not note.dimensions:
            raise BulkError(
                f"{self.name} can store only dense vectors: leave out the other outputs, or embed into qdrant or milvus"
            )
        # A collection that another job creates in the meantime is returned as it is, so it is checked as well.
        found = self._connection.find(self._name) or self._create(note)
        num_items = self._connection.call(found.count, self.name)
        written = (found.metadata or {}).get(NOTE)
        held = None if written is None else note_from_json(_parse(written), self.name)
        # A collection has no width before its first item, so the note is compared first.
        check_note(held, note, self.name, num_items, adopts=self._options.adopts)
        self._check_width(found, note)
        if held is None:
            # Chroma replaces the metadata as a whole.
            metadata = {**(found.metadata or {}), NOTE: _dump(note)}
            self._connection.call(partial(found.modify, metadata=cast(Any, metadata)), self.name)
        self._ids.are_counted = self._are_counted(found)
        self._collection = found

    def _are_counted(self, collection: Collection) -> bool | None:
        """Return whether the items of a collection have numeric ids; ``None`` if it is empty."""
        found = self._connection.call(partial(collection.get, limit=1, include=cast(Include, ["metadatas"])), self.name)
        for item_id, metadata in zip(found["ids"], found["metadatas"] or (), strict=True):
            row_id, _rest = row_id_of(item_id, cast("dict[str, Json]", metadata or {}))
            return isinstance(row_id, int)
        return None

    def problem(self, row: Row) -> str:
        """Return the reason why Chroma cannot store a row; empty if it can."""
        problem = self._ids.problem(row, self.name)  # the number 5 and the string "5" would be one item
        if not problem:
            problem = "its id is empty, which Chroma does not allow" if row.id == "" else problem_of(row.payload)
        if not problem:
            self._ids.add(row)
        return problem

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Store a shard's items.

        Raises:
            BulkError: Chroma rejects them, or stays unavailable.
        """
        collection, dense = self._collection, batch.dense
        if collection is None or dense is None:
            raise RuntimeError("a sink must be opened before the first write, and needs dense vectors")
        size = min(_MAX_ITEMS, self._connection.call(self._connection.client.get_max_batch_size, self.name))
        for start in range(0, len(batch.rows), size):
            rows = batch.rows[start : start + size]
            for row in rows:
                if problem := self.problem(row):
                    raise BulkError(f"{row.place}: {problem}")
            ids = [str(row.id) for row in rows]
            earlier = self._earlier_fields(collection, ids)
            # Chroma merges the fields of an item with the earlier ones. A field without a value is removed.
            metadatas = [
                {**dict.fromkeys(earlier.get(item_id, ())), **metadata_of(row)} or None
                for item_id, row in zip(ids, rows, strict=True)
            ]
            upsert = partial(
                collection.upsert,
                ids=ids,
                embeddings=dense[start : start + size],
                documents=[row.text for row in rows] if self._options.text is not None else None,
                metadatas=cast(Any, metadatas),
            )
            self._connection.call(upsert, self.name)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _earlier_fields(self, collection: Collection, ids: list[str]) -> dict[str, list[str]]:
        """Return the names of the fields that items have already, by the id of the item."""
        found = self._connection.call(partial(collection.get, ids=ids, include=cast(Include, ["metadatas"])), self.name)
        return {
            item_id: list(metadata or ())
            for item_id, metadata in zip(found["ids"], found["metadatas"] or (), strict=True)
        }

    def _create(self, note: SpaceNote) -> Collection:
        def make() -> Collection:
            return self._connection.client.get_or_create_collection(
                self._name,
                metadata={NOTE: _dump(note)},
                configuration={"hnsw": {"space": "cosine" if note.is_normalized else "ip"}},
                embedding_function=None,
            )

        return self._connection.call(make, self.name)

    def _check_width(self, collection: Collection, note: SpaceNote) -> None:
        # Not part of the client's public interface, but in the responses of every version of the API.
        width = collection._model.dimension
        if width is not None and width != note.dimensions:
            raise BulkError(
                f"{self.name} has vectors of width {width}, but this job's have {note.dimensions}: embed into a new "
                f"collection, or request {width} dimensions if the model supports that"
            )
        configuration = collection.configuration_json
        index = configuration.get("hnsw") or configuration.get("spann") or {}
        space = index.get("space")
        if not note.is_normalized and space != "ip":
            raise BulkError(
                f"{self.name} uses the distance {space}, but {note.model} needs ip, because its vectors are not "
                "normalized: embed into a new collection"
            )


def _dump(note: SpaceNote) -> str:
    """Return a note as text, because Chroma's metadata cannot contain objects."""
    return json.dumps(note_to_json(note))


def _parse(written: object) -> object:
    try:
        return json.loads(written) if isinstance(written, str) else written
    except ValueError:
        return written
