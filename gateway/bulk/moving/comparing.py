"""Compare a collection with its copy: counts, vectors, and the results of searches in both."""

from __future__ import annotations

from pathlib import Path

from gateway.bulk.moving.checking import (
    CheckReport,
    Query,
    Side,
    agree,
    draw,
    embed_texts,
    item_queries,
    wrong_vectors,
)
from gateway.bulk.moving.direction import NUM_DRAWN, PassCounts
from gateway.bulk.moving.losses import allowed_missing, describe_missing
from gateway.bulk.moving.state import Pair, Stage
from gateway.bulk.moving.work import Work, embedder_of, note_of, old_model_of, spec_of
from gateway.bulk.rows import BulkError, RowId
from gateway.compare.captured import read_captured

_NUM_QUERIES = 100


async def check_pair(
    work: Work, pair: Pair, counts: PassCounts, queries: Path | None, old_model: str | None
) -> CheckReport:
    """Compare a collection with its copy, or the vectors in it.

    Args:
        counts: of the pass before.
        queries: captured queries; ``None`` to search by items.
        old_model: its name, if the collection has no note.

    Raises:
        BulkError: a store or a model fails, or the old model is not known.
    """
    move, store = work.move, work.reading
    with work.ledger(pair) as ledger:
        ids = list(ledger.sample(_NUM_QUERIES))
    first, second = Side(pair.old, move.vector), Side(pair.new, move.new_vector)
    compared, wrong = await compare_vectors(work, pair, counts)
    if queries is None:
        drawn_queries = item_queries(store, first, second, move.text, ids)
    else:
        drawn_queries = await _captured(work, pair, queries, old_model)
    number = store.describe(pair.new).count
    if move.into_vector is not None:
        number = sum(1 for _ in store.filled(pair.new, move.into_vector))
    return CheckReport(
        store.describe(pair.old).count,
        number,
        counts,
        compared,
        wrong,
        agree(store, first, second, drawn_queries),
        queries is not None,
        move.into_vector,
        may_lack=move.refused <= move.left_behind,
        is_in_use=move.stage is Stage.FLIPPED,
        missing=describe_missing(pair.new, counts.missing, counts.known, move.name)
        if counts.missing > allowed_missing(counts.known)
        else "",
    )


async def compare_vectors(work: Work, pair: Pair, counts: PassCounts) -> tuple[int, list[RowId]]:
    """Compare vectors of the new collection with the model's: of items that the move wrote, and of those that others wrote.

    Returns:
        the number of sampled items, and the ids of those whose vectors differ.
    """
    with work.ledger(pair) as ledger:
        ids = [*ledger.sample(NUM_DRAWN), *counts.drawn_ids]
    side = Side(pair.new, work.move.new_vector)
    return await wrong_vectors(work.reading, side, work.move.text, list(dict.fromkeys(ids)), work.embedder)


async def _captured(work: Work, pair: Pair, path: Path, old_model: str | None) -> list[Query]:
    """Return captured queries with their vectors in both spaces.

    Raises:
        BulkError: the old model is not known.
    """
    move = work.move
    model = old_model or old_model_of(move, work.reading, pair)
    if model is None:
        raise BulkError("--queries needs the old model too: name it with --from-model")
    texts = draw(read_captured(path, []).texts, _NUM_QUERIES)
    vectors = []
    note = note_of(work.reading.describe(pair.old), move.vector)
    for name, task in ((model, note.task if note else None), (move.model, work.embedder.note.task)):
        spec = spec_of(move, name, for_queries=not move.has_default_task, task=task)
        async with embedder_of(move, spec, work.console) as embedder:
            vectors.append(await embed_texts(embedder, texts))
    return [Query(text, old, new) for text, old, new in zip(texts, *vectors, strict=True)]
