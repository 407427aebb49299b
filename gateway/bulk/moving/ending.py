"""Delete the old collections at the end of a move, after the last checks: this cannot be undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from gateway.bulk.moving.comparing import compare_vectors
from gateway.bulk.moving.direction import PassCounts
from gateway.bulk.moving.losses import allowed_missing, describe_missing
from gateway.bulk.moving.passes import count_changes
from gateway.bulk.moving.results import accept
from gateway.bulk.moving.state import Move, Pair
from gateway.bulk.moving.work import Work, at_work
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import Mark
from gateway.config.wording import count


@dataclass(frozen=True, slots=True)
class Consent:
    """The problems despite which the user wants to delete the old collection.

    Attributes:
        max_missing: the number of copied items that the new collection may lack.
        max_mismatched: the number of sampled items that may have vectors of another model.
    """

    max_missing: int = 0
    max_mismatched: int = 0


NO_CONSENT: Final = Consent()


async def delete_old(move: Move, folder: Path, console: Console, consent: Consent) -> Move:
    """Copy the last changes, check the new collections, and delete the old collections or vectors.

    Raises:
        BulkError: a program writes into an old collection, or a new one is not complete. Nothing was deleted then, except
            collections whose own checks passed.
    """
    async with at_work(move, folder, console) as work:
        # Where the store has no order of all changes, the last look compares all items of the old collection.
        marks = {pair.old: work.reading.mark(pair.old, None) for pair in move.pairs}
        results = await work.passes(is_full=True)
        move = accept(work, results, skips=False)
        # A program that writes both vectors looks like one that writes the old one, which the store refuses later.
        changes = sum(counts.earlier + counts.changes for counts in results.values())
        if changes and move.into_vector is None:
            raise _still_written(changes, [pair.old for pair in move.pairs])
        for pair in move.pairs:
            await _check(work, pair, results[pair.old], consent)
        for pair in move.pairs:
            _delete(work, pair, marks[pair.old])
    return move


async def _check(work: Work, pair: Pair, counts: PassCounts, consent: Consent) -> None:
    """Check that the new collection has the items of the old one, with vectors of the new model.

    Raises:
        BulkError: it lacks more than a few, or a sampled item has a vector of another model.
    """
    if counts.missing > max(allowed_missing(counts.known), consent.max_missing):
        raise BulkError(
            f"nothing was deleted: {describe_missing(pair.new, counts.missing, counts.known, work.move.name)}"
        )
    compared, wrong = await compare_vectors(work, pair, counts)
    if len(wrong) > consent.max_mismatched:
        raise BulkError(
            f"nothing was deleted: {len(wrong)} of {count(compared, 'sampled item')} of {pair.new} have vectors that "
            f"differ from those of {work.move.model}, such as {', '.join(map(str, wrong[:5]))}: a program writes into it "
            "with another model, or embeds another text than the field. Find it, and let it write its items again. "
            f"To delete the old collection all the same, run `gateway move finish {work.move.name} --delete-old "
            f"--max-mismatched {compared}`"
        )


def _delete(work: Work, pair: Pair, since: Mark | None) -> None:
    """Delete an old collection or vector, unless an application has written into the collection since the last pass.

    Raises:
        BulkError: an application has.
    """
    if work.move.into_vector is not None:
        work.writing.delete_vector(pair.old, work.move.vector or "")
        return
    with work.ledger(pair) as ledger:

        def look() -> None:
            if changes := count_changes(work.direction(pair), ledger, since):
                raise _still_written(changes, [pair.old])

        work.writing.delete_collection(pair.old, look)


def _still_written(changes: int, collections: Sequence[str]) -> BulkError:
    names, were = " and ".join(collections), "was" if len(collections) == 1 else "were"
    return BulkError(
        f"{count(changes, 'item')} of {names} changed since the last pass, so a program may still write there. {names} "
        f"{were} not deleted. Find that program, and run the same command again until there are no changes"
    )
