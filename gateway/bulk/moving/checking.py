"""Compare a collection with its copy before applications use it: counts, vectors, and search results."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from gateway.bulk.embedder import Embedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.moving.direction import PassCounts
from gateway.bulk.rows import BulkError, Row, RowId
from gateway.bulk.stores.protocol import MovableStore
from gateway.compare.agreement import overlap, rank_biased_overlap, same_first
from gateway.config.wording import count, cut
from gateway.types import Vectors

DEPTH: Final = 10
_MIN_COSINE: Final = 0.98
"""The minimum cosine between a text's vector and its stored vector; half precision and other devices change it less."""
_CALL_TEXTS: Final = 32
_UNRELATED: Final = 0.05
"""With more than a few hundred items, an overlap@10 below this means that the models have nothing in common."""
_FEW_ITEMS: Final = 500
_SHOWN: Final = 3
_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class Query:
    """A query to both collections.

    Attributes:
        text: the text to show to people.
        first, second: its vector in the space of each collection.
        left_out: the item that is the query itself, to be excluded from the results.
    """

    text: str
    first: Vectors
    second: Vectors
    left_out: RowId | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """The similarity of both collections' results, as means over queries from 0 to 1.

    Attributes:
        most_different: the texts of the queries with the least overlap, and that overlap.
    """

    num_queries: int
    overlap: float
    same_first: float
    rank_biased_overlap: float
    most_different: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The results of a check.

    Attributes:
        first, second: items of the collections, or those with the old and with the new vector.
        vector: the name of the new vector, if both are in one collection.
        may_lack: whether the user agreed to leave behind the items that cannot be copied.
        num_vectors: the number of stored vectors that were compared with the vectors of their texts.
        wrong_vectors: the ids of those items whose vectors differ.
        agreement: the similarity of the results; ``None`` if there were no queries.
        is_in_use: applications write into the second collection, as they should.
        missing: the description of the copied items that it lacks, if they are more than a few.
    """

    first: int
    second: int
    counts: PassCounts
    num_vectors: int
    wrong_vectors: Sequence[RowId]
    agreement: Agreement | None
    has_real_queries: bool
    vector: str | None = None
    may_lack: bool = True
    is_in_use: bool = False
    missing: str = ""

    def problems(self) -> list[str]:
        """Return the problems to solve before applications use the second collection."""
        problems = []
        if self.counts.changes > allowed_changes(self.first):
            problems.append(
                f"{count(self.counts.changes, 'item')} of the old collection changed during the check, too many for a "
                "reliable comparison: check again when there are fewer writes"
            )
        if self.missing:
            problems.append(self.missing)
        if self.counts.kept and not self.is_in_use:
            problems.append(
                f"the new collection has {count(self.counts.kept, 'item')} that the move did not write, such as "
                f"{_ids(self.counts.kept_ids)}. If applications write into it already, run `gateway move flip`; "
                "otherwise delete them"
            )
        if self.counts.refused and not self.may_lack:
            them = "it" if self.counts.refused == 1 else "them"
            problems.append(
                f"{count(self.counts.refused, 'item')} cannot be copied: correct {them}, or leave {them} behind with "
                "`gateway move sync --skip`"
            )
        if self.wrong_vectors:
            problems.append(
                f"{len(self.wrong_vectors)} of {count(self.num_vectors, 'sampled item')} have vectors that differ "
                f"from the model's vectors of their texts, such as {_ids(self.wrong_vectors)}: another program has "
                f"written into the new collection{' with another model' if self.is_in_use else ''}"
            )
        found = self.agreement
        if found is not None and found.overlap < _UNRELATED and self.second > _FEW_ITEMS:
            problems.append(
                f"the two collections return different items (overlap@{DEPTH} {found.overlap:.2f}). Likely causes: "
                "one of them mixes vectors of two models, or the text is in another field"
            )
        return problems

    def sentences(self) -> list[str]:
        """Describe the results, without the verdict."""
        where = ("old collection", "in the new one") if self.vector is None else ("collection", f"with {self.vector}")
        lines = [f"items: {self.first:,} in the {where[0]}, {self.second:,} {where[1]}"]
        if self.counts.refused:
            lines.append(
                f"{count(self.counts.refused, 'item')} not copied, such as "
                f"{'; '.join(self.counts.problems[:_SHOWN])}; the files *.not_copied.jsonl in the move's folder list them"
            )
        if self.is_in_use and self.counts.kept:
            lines.append(f"{count(self.counts.kept, 'item')} of the new collection were written by applications")
        if self.counts.missing:
            lines.append(f"{count(self.counts.missing, 'copied item')} missing from the new collection")
        lines.append(
            f"vectors: {self.num_vectors - len(self.wrong_vectors)} of {count(self.num_vectors, 'sampled item')} have "
            "the new model's vector of their text"
        )
        if self.agreement is not None:
            lines += self._agreement_sentences(self.agreement)
        return lines

    def _agreement_sentences(self, found: Agreement) -> list[str]:
        kind = "captured queries" if self.has_real_queries else "sampled items as queries"
        return [
            f"{found.num_queries} {kind}: overlap@{DEPTH} {found.overlap:.2f}, the same first item for "
            f"{found.same_first:.0%}, rank-biased overlap {found.rank_biased_overlap:.2f}",
            "This shows how much results will change. `gateway compare` shows whether they improve.",
            *(f"  overlap {value:.1f}: {cut(' '.join(text.split()), 70)}" for text, value in found.most_different),
        ]


def allowed_changes(num_items: int) -> int:
    """Return the number of changes in a pass up to which they count as few: the next pass, or the flip's, copies them."""
    return max(10, num_items // 100)


def _ids(ids: Sequence[RowId]) -> str:
    return ", ".join(map(str, ids[:_NAMED]))


async def embed_texts(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Return the dense vectors of texts, ``(n, dimensions)``.

    Raises:
        BulkError: the model returns no dense vectors.
    """
    found = []
    for start in range(0, len(texts), _CALL_TEXTS):
        answer = await embedder.embed(texts[start : start + _CALL_TEXTS])
        if answer.dense is None:
            raise BulkError(f"{embedder.note.model} has no dense vectors")
        found.append(answer.dense)
    return np.concatenate(found) if found else np.empty((0, embedder.note.dimensions), np.float32)


@dataclass(frozen=True, slots=True)
class Side:
    """Vectors of a collection.

    Attributes:
        vector: their name, where items have several.
    """

    collection: str
    vector: str | None


async def wrong_vectors(
    store: MovableStore, side: Side, text: str, ids: Sequence[RowId], embedder: Embedder
) -> tuple[int, list[RowId]]:
    """Compare stored vectors with the model's; return the number of items compared, and the ids of those that differ.

    This finds vectors of another model even if they have the same width, which no store would notice.
    """
    rows = [row for row in store.read_ids(side.collection, ids, FieldNames(text=text)) if isinstance(row, Row)]
    stored = store.vectors(side.collection, [row.id for row in rows], side.vector)
    rows = [row for row in rows if row.id in stored]
    made = await embed_texts(embedder, [row.text for row in rows])
    wrong = [
        row.id
        for row, own in zip(rows, made, strict=True)
        if not _cosine(stored[row.id], own) >= _MIN_COSINE  # or NaN
    ]
    return len(rows), wrong


def _cosine(one: Vectors, other: Vectors) -> float:
    if one.shape != other.shape:
        return 0.0
    with np.errstate(all="ignore"):  # a vector of zeros
        return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def item_queries(store: MovableStore, first: Side, second: Side, text: str, ids: Sequence[RowId]) -> list[Query]:
    """Return items as queries: each side is searched with the vector that it has of the item."""
    old, new = (store.vectors(side.collection, ids, side.vector) for side in (first, second))
    both = [row_id for row_id in ids if row_id in old and row_id in new]
    rows = store.read_ids(second.collection, both, FieldNames(text=text))
    return [Query(row.text, old[row.id], new[row.id], row.id) for row in rows if isinstance(row, Row)]


def agree(store: MovableStore, first: Side, second: Side, queries: Sequence[Query]) -> Agreement | None:
    """Search both sides for each query, and return the similarity of the results."""
    overlaps: list[tuple[str, float]] = []
    firsts: list[float] = []
    biased: list[float] = []
    for query in queries:
        rankings: list[list[str]] = []
        for side, side_query in ((first, query.first), (second, query.second)):
            hits = store.search(side.collection, side_query, DEPTH + (query.left_out is not None), side.vector)
            rankings.append([repr(hit.id) for hit in hits if hit.id != query.left_out][:DEPTH])
        overlaps.append((query.text, overlap(rankings[0], rankings[1], DEPTH)))
        firsts.append(same_first(rankings[0], rankings[1]))
        biased.append(rank_biased_overlap(rankings[0], rankings[1]))
    if not overlaps:
        return None
    most_different = sorted(overlaps, key=lambda found: found[1])[:_SHOWN]
    return Agreement(
        len(overlaps), fmean(value for _text, value in overlaps), fmean(firsts), fmean(biased), most_different
    )


def draw(texts: Mapping[str, str], number: int) -> list[str]:
    """Return some of the captured queries, the same in each check."""
    found = sorted(texts.values())
    return random.Random(0).sample(found, min(number, len(found)))  # noqa: S311  not a secret
