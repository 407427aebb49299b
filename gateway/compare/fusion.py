"""Rank documents by several similarities: by their ranks in each, or by a weighted mean. Pure, on numpy arrays.

Each query has an array of candidates (places of documents), and for each similarity an array of their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.compare.search import FloatMatrix, IntMatrix

CANDIDATES = 200
"""The number of documents that each similarity contributes."""

_RANK_CONSTANT = 60

Places: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float64]


def union(lists: Sequence[Places]) -> Places:
    """Return the places in any list, ascending; -1 is not a place."""
    together: Places = np.unique(np.concatenate(lists))
    return together[together >= 0]


def fuse_ranks(similarities: Sequence[Scores]) -> Scores:
    """Return the score of each candidate by reciprocal rank fusion with k = 60: the sum of 1 / (60 + rank).

    A candidate beyond the first 200 of a similarity, or with score -inf, gets nothing from it. (Cormack, Clarke & Büttcher
    2009, https://doi.org/10.1145/1571941.1572114)
    """
    fused = np.zeros(len(similarities[0]))
    for scores in similarities:
        order = np.argsort(-scores, kind="stable")[:CANDIDATES]
        order = order[scores[order] > -np.inf]
        fused[order] += 1.0 / (_RANK_CONSTANT + 1 + np.arange(len(order)))
    return fused


def fuse_scores(similarities: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """Return the weighted mean of the similarities, as ``/v1/rerank`` computes it; -inf counts as 0."""
    finite = [np.where(np.isfinite(scores), scores, 0.0) for scores in similarities]
    mean: Scores = np.average(finite, axis=0, weights=weights)
    return mean


def best(candidates: Sequence[Places], scores: Sequence[Scores], depth: int) -> tuple[IntMatrix, FloatMatrix]:
    """Return the places with the highest scores, as ``search`` does: among equal scores, the first place wins.

    Candidates with score -inf are left out.
    """
    indices = np.full((len(candidates), depth), -1, dtype=np.int64)
    values = np.full((len(candidates), depth), -np.inf, dtype=np.float32)
    for query, (places, all_scores) in enumerate(zip(candidates, scores, strict=True)):
        rounded = all_scores.astype(np.float32)
        order = np.argsort(-rounded, kind="stable")[:depth]
        order = order[rounded[order] > -np.inf]
        indices[query, : len(order)] = places[order]
        values[query, : len(order)] = rounded[order]
    return indices, values
