"""Rank the documents of a data set for its queries with one arm: by dense, sparse or token vectors, or a mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gateway.cache.files import CacheFolder, Ragged
from gateway.cli.client import GatewayClient
from gateway.compare.arms import PlannedArm
from gateway.compare.dataset import Dataset
from gateway.compare.embedding import Embedded, embed_side
from gateway.compare.fusion import CANDIDATES, Places, Scores, best, fuse_ranks, fuse_scores, union
from gateway.compare.progress import Reporter
from gateway.compare.search import Ranking, make_ranking
from gateway.compare.similarities import Dense, Found, Similarity, Sparse, Tokens
from gateway.types import Output

DEPTH = 100

_FIRST_STAGE = (Output.DENSE, Output.SPARSE)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The rankings of an arm.

    Attributes:
        bytes_per_document: average size of a stored document.
        num_cut: the number of documents of which the model read only the beginning.
        num_cut_queries: the number of such queries.
    """

    ranking: Ranking
    bytes_per_document: int
    num_cut: int = 0
    num_cut_queries: int = 0


async def rank(
    client: GatewayClient, arm: PlannedArm, dataset: Dataset, cache: CacheFolder, reporter: Reporter
) -> Ranked:
    """Embed both sides, and search.

    Dense and sparse vectors are compared with every document. Token vectors are compared with the first 200 documents by
    the model's dense or sparse vectors, or with all documents if the model has neither. Several outputs are combined on the
    documents that are among the first 200 of at least one output.
    """
    texts = list(dataset.documents.values())
    places = {document: place for place, document in enumerate(dataset.documents)}
    excluded = [places.get(query) if query in dataset.own_documents else None for query in dataset.queries]
    wanted = arm.mix.outputs
    is_late = Output.MULTIVECTOR in wanted
    first = [output for output in _FIRST_STAGE if output in (arm.card.outputs if is_late else wanted)]
    requested = [*first, Output.MULTIVECTOR] if is_late else first
    documents = await embed_side(client, arm, arm.passages, first, texts, cache, reporter, "documents")
    queries = await embed_side(
        client, arm, arm.queries, requested, list(dataset.queries.values()), cache, reporter, "queries"
    )
    similarities = _similarities(queries, documents, excluded)
    size = _bytes_per_document(arm, documents)
    num_cut = documents.num_cut
    if len(wanted) == 1 and not is_late:
        found = similarities[wanted[0]].nearest(DEPTH)
    else:
        candidates = [
            union(lists) for lists in zip(*(one.nearest(CANDIDATES)[0] for one in similarities.values()), strict=True)
        ]
        if is_late:
            chosen = np.unique(np.concatenate(candidates)) if candidates else np.arange(len(texts))
            some = [texts[place] for place in chosen]
            late = await embed_side(
                client, arm, arm.passages, [Output.MULTIVECTOR], some, cache, reporter, "documents, by token"
            )
            tokens = Tokens(_known(queries.multivectors), _known(late.multivectors), chosen, excluded)
            similarities[Output.MULTIVECTOR] = tokens
            size += _bytes_per_document(arm, late)
            num_cut = max(num_cut, late.num_cut)
        found = _reranked(arm, similarities, candidates)
    ranking = make_ranking(list(dataset.queries), list(dataset.documents), *found)
    return Ranked(ranking, max(1, size), num_cut, queries.num_cut)


def _similarities(queries: Embedded, documents: Embedded, excluded: Sequence[int | None]) -> dict[Output, Similarity]:
    found: dict[Output, Similarity] = {}
    if queries.dense is not None and documents.dense is not None:
        found[Output.DENSE] = Dense(queries.dense, documents.dense, excluded)
    if queries.sparse is not None and documents.sparse is not None:
        found[Output.SPARSE] = Sparse(queries.sparse, documents.sparse, excluded)
    return found


def _reranked(arm: PlannedArm, similarities: dict[Output, Similarity], candidates: Sequence[Places]) -> Found:
    mix = arm.mix
    if not candidates:
        return similarities[Output.MULTIVECTOR].nearest(DEPTH)
    scores = [similarities[output].of(candidates) for output in mix.outputs]
    by_query = list(zip(*scores, strict=True))
    if len(mix.outputs) == 1:
        fused: list[Scores] = scores[0]
    elif mix.weights:
        fused = [fuse_scores(one, mix.weights) for one in by_query]
    else:
        fused = [fuse_ranks(one) for one in by_query]
    return best(candidates, fused, DEPTH)


def _known(rows: Ragged | None) -> Ragged:
    if rows is None:
        raise ValueError("token vectors were not asked for")
    return rows


def _bytes_per_document(arm: PlannedArm, documents: Embedded) -> int:
    """Return the mean stored size of a document, only with the outputs by which the arm ranks."""
    size = 0.0
    if documents.dense is not None and Output.DENSE in arm.mix.outputs:
        size += arm.bytes_per_vector
    if documents.sparse is not None and Output.SPARSE in arm.mix.outputs:
        size += documents.sparse.bytes_per_text
    if documents.multivectors is not None:
        size += documents.multivectors.bytes_per_text
    return round(size)
