"""Measures of the similarity of two rankings. They need no judgments, and do not show which ranking is better.

A ranking is a list of distinct document ids, best first.
"""

from __future__ import annotations

from collections.abc import Sequence


def overlap(one: Sequence[str], other: Sequence[str], depth: int = 10) -> float:
    """Return the share of documents that both rankings have among their first ``depth``, from 0 to 1.

    If both rankings are shorter, this is the share of the longer one. Two empty rankings are equal.
    """
    tops = set(one[:depth]), set(other[:depth])
    longest = max(map(len, tops))
    return len(tops[0] & tops[1]) / longest if longest else 1.0


def same_first(one: Sequence[str], other: Sequence[str]) -> float:
    """Return 1 if both rankings begin with the same document, else 0; two empty rankings are equal."""
    return float(list(one[:1]) == list(other[:1]))


def rank_biased_overlap(one: Sequence[str], other: Sequence[str], p: float = 0.9) -> float:
    """Return the extrapolated rank-biased overlap, from 0 to 1: RBO_EXT of Webber, Moffat & Zobel 2010, equation 32.

    It weights the overlap at every depth, deeper ranks less: with p = 0.9, the first ten ranks have 86 % of the weight.
    Ranks beyond the ends are assumed to agree as much as earlier ranks. The rankings may have different lengths. Two empty
    rankings are equal. An empty and a non-empty ranking have nothing in common.

    https://doi.org/10.1145/1852102.1852106

    Args:
        p: the probability that a reader continues to the next rank, between 0 and 1, both excluded.
    """
    shorter, longer = sorted((list(one), list(other)), key=len)
    if not shorter:
        return float(not longer)
    ends = len(shorter), len(longer)
    in_shorter: set[str] = set()
    in_longer: set[str] = set()
    common_at_shorter_end = common = 0
    total = 0.0
    for depth, document in enumerate(longer, start=1):
        in_longer.add(document)
        common += document in in_shorter
        if depth <= ends[0]:
            in_shorter.add(shorter[depth - 1])
            common += shorter[depth - 1] in in_longer
            common_at_shorter_end = common
        else:
            # Assume that the shorter ranking continues, and agrees as much as up to its end.
            total += common_at_shorter_end * (depth - ends[0]) / (ends[0] * depth) * p**depth
        total += common / depth * p**depth
    beyond = (common - common_at_shorter_end) / ends[1] + common_at_shorter_end / ends[0]
    return min(1.0, (1 - p) / p * total + beyond * p ** ends[1])
