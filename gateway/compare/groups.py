"""Groups of dependent queries, which tests and intervals must not count as independent.

Several queries about one document, or of one user, succeed and fail together. In a simulation of 300 queries about 30
topics (intraclass correlation 0.2), tests by query reported a difference in 22 % of comparisons of equal models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_NOTEWORTHY = 0.1
# A group with half of the queries would count as one query, so the queries are counted one by one instead, with a note.
_LARGEST_SHARE = 0.1


def group_queries(
    named: Mapping[str, str], judgments: Mapping[str, Mapping[str, int]], notes: list[str]
) -> Mapping[str, str]:
    """Return the group of each query that shares a group with others, and note the grouping.

    Args:
        named: groups from ``queries.jsonl``. Without them, queries that share a relevant document form groups, if more than
            a tenth of the queries do.
    """
    if named:
        sizes = Counter(named.values())
        groups = {query: group for query, group in named.items() if sizes[group] > 1}
        if groups:
            notes.append(
                f"{len(groups):,} queries belong to {len(set(groups.values())):,} groups, named in queries.jsonl. "
                "Intervals and tests count the queries of a group together."
            )
        return groups
    groups = _group_by_documents(judgments)
    if len(groups) <= _NOTEWORTHY * len(judgments):
        return {}
    found = f"{len(groups):,} of {len(judgments):,} queries share a relevant document with another query"
    if max(Counter(groups.values()).values()) > max(2, _LARGEST_SHARE * len(judgments)):
        notes.append(
            f"{found}. These links join most queries, so they are counted as independent. If several queries come "
            "from one document, topic or user, give them the same `group` in queries.jsonl: else differences may look "
            "clearer than they are."
        )
        return {}
    notes.append(
        f"{found}: intervals and tests count them together, as {len(set(groups.values())):,} groups. `group` in "
        "queries.jsonl names other groups."
    )
    return groups


def _group_by_documents(judgments: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Return a group for each query that shares a relevant document with another, directly or through others."""
    parents = {query: query for query in judgments}

    def root(query: str) -> str:
        while parents[query] != query:
            parents[query] = parents[parents[query]]
            query = parents[query]
        return query

    first_query: dict[str, str] = {}
    for query, scores in judgments.items():
        for document, score in scores.items():
            if score > 0:
                parents[root(query)] = root(first_query.setdefault(document, query))
    roots = {query: root(query) for query in judgments}
    sizes = Counter(roots.values())
    return {query: top for query, top in roots.items() if sizes[top] > 1}
