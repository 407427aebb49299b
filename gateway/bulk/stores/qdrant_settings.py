"""Create a Qdrant collection, with the server's default settings or with those of another collection."""

from __future__ import annotations

from collections.abc import Mapping

from qdrant_client import QdrantClient, models

from gateway.bulk.rows import Json, SpaceNote
from gateway.bulk.stores.notes import read_notes, write_notes
from gateway.bulk.stores.qdrant_layout import UNNAMED, Layout, Vectors, new_layout, params_of


def layout_like(other: Vectors, note: SpaceNote, vector: str | None) -> Layout:
    """Return the layout of a new collection that replaces another; an only dense vector keeps its name.

    Args:
        vector: the user's name for the dense vector.
    """
    if vector is None and note.dimensions and len(other.single) == 1:
        vector = next(iter(other.single))
    return new_layout(note, vector)


def create(client: QdrantClient, collection: str, layout: Layout, note: SpaceNote) -> None:
    """Create a collection with a note of its space."""
    vectors = params_of(layout, note)
    client.create_collection(
        collection,
        vectors_config=_config(vectors.dense),
        sparse_vectors_config=vectors.sparse or None,
        metadata=write_notes({layout.noted: note}),
    )


def create_like(
    client: QdrantClient, collection: str, layout: Layout, note: SpaceNote, like: models.CollectionInfo
) -> None:
    """Create a collection with the settings, other vectors and metadata of another collection."""
    config, params, theirs = like.config, like.config.params, Vectors.of(like)
    wanted = params_of(layout, note)
    dense = {**theirs.dense}
    for name, ours in wanted.dense.items():
        kept = {"size": ours.size, "distance": ours.distance, "multivector_config": ours.multivector_config}
        dense[name] = theirs.dense[name].model_copy(update=kept) if name in theirs.dense else ours
    client.create_collection(
        collection,
        vectors_config=_config(dense),
        sparse_vectors_config={**wanted.sparse, **theirs.sparse} or None,
        shard_number=params.shard_number,
        sharding_method=params.sharding_method,
        replication_factor=params.replication_factor,
        write_consistency_factor=params.write_consistency_factor,
        on_disk_payload=params.on_disk_payload,
        hnsw_config=models.HnswConfigDiff(**config.hnsw_config.model_dump(exclude_none=True)),
        optimizers_config=models.OptimizersConfigDiff(**config.optimizer_config.model_dump(exclude_none=True)),
        quantization_config=config.quantization_config,
        metadata=_metadata(config.metadata, {layout.noted: note}, collection),
    )


def add_indexes(client: QdrantClient, collection: str, like: models.CollectionInfo) -> None:
    """Create the payload indexes of another collection that this one lacks: a process may have ended before it did so."""
    ours = client.get_collection(collection).payload_schema
    for field, index in like.payload_schema.items():
        if field not in ours:
            schema = index.params or models.PayloadSchemaType(index.data_type.value)
            client.create_payload_index(collection, field, schema)


def _config(dense: Mapping[str, models.VectorParams]) -> Mapping[str, models.VectorParams] | models.VectorParams:
    return dense[UNNAMED] if list(dense) == [UNNAMED] else dense


def _metadata(theirs: Mapping[str, Json] | None, notes: Mapping[str, SpaceNote], where: str) -> dict[str, Json]:
    """Return the metadata of the other collection, with new notes for the recomputed vectors."""
    return {**(theirs or {}), **write_notes({**read_notes(theirs, where), **notes})}
