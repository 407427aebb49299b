"""Choose the vectors of a Qdrant collection that a job fills, and check that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qdrant_client import models

from gateway.bulk.rows import BulkError, SpaceNote
from gateway.config.wording import enumerate_names, quote

UNNAMED: Final = ""
"""Qdrant's name of the only vector of a point."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of the vectors that a job fills; ``None`` for an output that the job does not have."""

    dense: str | None
    sparse: str | None
    multivector: str | None

    @property
    def noted(self) -> str:
        """The name of the vector that has the note of the space."""
        return next(name for name in (self.dense, self.multivector, self.sparse) if name is not None)

    @property
    def names(self) -> set[str]:
        """The names of all vectors."""
        return {name for name in (self.dense, self.multivector, self.sparse) if name is not None}


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors that a collection has."""

    dense: Mapping[str, models.VectorParams]
    sparse: Mapping[str, models.SparseVectorParams]

    @staticmethod
    def of(info: models.CollectionInfo) -> Vectors:
        """Return the vectors of a collection."""
        params = info.config.params
        dense = params.vectors
        if isinstance(dense, models.VectorParams):
            dense = {UNNAMED: dense}
        return Vectors(dense or {}, params.sparse_vectors or {})

    @property
    def names(self) -> set[str]:
        """The names of all vectors."""
        return {*self.dense, *self.sparse}

    @property
    def single(self) -> dict[str, models.VectorParams]:
        """The fields with one vector per point."""
        return {name: params for name, params in self.dense.items() if params.multivector_config is None}

    @property
    def multiple(self) -> dict[str, models.VectorParams]:
        """The fields with several vectors per point."""
        return {name: params for name, params in self.dense.items() if params.multivector_config is not None}


def new_layout(note: SpaceNote, vector: str | None) -> Layout:
    """Return the layout of a new collection: an unnamed vector for dense vectors alone, otherwise one name per output.

    Args:
        vector: the user's name for the dense vector.
    """
    is_alone = not note.has_sparse and not note.token_width
    return Layout(
        dense=(vector if vector is not None else UNNAMED if is_alone else "dense") if note.dimensions else None,
        sparse="sparse" if note.has_sparse else None,
        multivector="multivector" if note.token_width else None,
    )


def layout_in(vectors: Vectors, note: SpaceNote, vector: str | None, where: str) -> Layout:
    """Return the layout in an existing collection.

    Raises:
        BulkError: the collection lacks a kind of vectors, has another width or distance, or several vectors match.
    """
    layout = Layout(
        dense=_choose("dense vector", vectors.single, vector, ("dense",), where) if note.dimensions else None,
        sparse=_choose("sparse vector", vectors.sparse, None, ("sparse",), where) if note.has_sparse else None,
        multivector=(
            _choose("multi-vector", vectors.multiple, None, ("multivector", "colbert"), where)
            if note.token_width
            else None
        ),
    )
    if layout.dense is not None:
        _check_dense(vectors.dense[layout.dense], note, _describe(layout.dense, where))
    if layout.multivector is not None:
        params = vectors.dense[layout.multivector]
        if params.size != note.token_width:
            raise BulkError(
                f"{_describe(layout.multivector, where)} has multi-vectors of width {params.size}, but this job's "
                f"have {note.token_width}"
            )
    return layout


def _choose(kind: str, known: Mapping[str, object], requested: str | None, usual: tuple[str, ...], where: str) -> str:
    names = list(known)
    if requested is not None:
        if requested in known:
            return requested
        raise BulkError(f"{where} has no {kind} {quote(requested)}; it has {_list(names)}")
    if len(names) == 1:
        return names[0]
    if not names:
        raise BulkError(
            f"{where} has no {kind}, but this job has one per item. Embed into a new collection, or leave that output "
            "out"
        )
    for name in usual:
        if name in known:
            return name
    hint = "name one with ?vector= in the URL" if kind == "dense vector" else f"name one of them {quote(usual[0])}"
    raise BulkError(f"{where} has several {kind}s, {_list(names)}: {hint}")


def _list(names: list[str]) -> str:
    return enumerate_names(name or "(unnamed)" for name in names) or "no vectors of that kind"


def _describe(vector: str, where: str) -> str:
    return f"the vector {quote(vector)} of {where}" if vector else where


def _check_dense(params: models.VectorParams, note: SpaceNote, where: str) -> None:
    if params.size != note.dimensions:
        raise BulkError(
            f"{where} has vectors of width {params.size}, but this job's have {note.dimensions}: embed into a new "
            f"collection, or request {params.size} dimensions if the model supports that"
        )
    allowed = [models.Distance.DOT]
    if note.is_normalized:
        # The order of neighbors is the same for these three if all vectors have norm 1.
        allowed += [models.Distance.COSINE, models.Distance.EUCLID]
    if params.distance not in allowed:
        why = "" if note.is_normalized else ", because its vectors are not normalized"
        raise BulkError(
            f"{where} uses the distance {params.distance.value}, but {note.model} needs "
            f"{' or '.join(distance.value for distance in allowed)}{why}: embed into a new collection"
        )


def dense_params(note: SpaceNote) -> models.VectorParams:
    """Return the settings of a dense vector: cosine, or the dot product if the space's vectors are not normalized."""
    distance = models.Distance.COSINE if note.is_normalized else models.Distance.DOT
    return models.VectorParams(size=note.dimensions, distance=distance)


def params_of(layout: Layout, note: SpaceNote) -> Vectors:
    """Return the settings of a new collection's vectors.

    The sparse weights are final, so Qdrant's own factor for rare tokens stays off. Multi-vectors next to dense vectors
    rerank the results of those, which needs no index; without dense vectors they get an index.
    """
    dense: dict[str, models.VectorParams] = {}
    if layout.dense is not None:
        dense[layout.dense] = dense_params(note)
    if layout.multivector is not None:
        dense[layout.multivector] = models.VectorParams(
            size=note.token_width,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0) if layout.dense is not None else None,
        )
    sparse = {layout.sparse: models.SparseVectorParams()} if layout.sparse is not None else {}
    return Vectors(dense, sparse)
