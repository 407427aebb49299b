"""The results of passes in the state of a move: the items that could not be copied, and those that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gateway.bulk.moving.direction import PassCounts
from gateway.bulk.moving.state import Move, write_move
from gateway.bulk.moving.work import Work
from gateway.bulk.rows import BulkError
from gateway.config.wording import count, quote

_NAMED: Final = 3


def accept(work: Work, results: Mapping[str, PassCounts], *, skips: bool) -> Move:
    """Return the move with the items that the passes could not copy, and write them to its state.

    Raises:
        BulkError: they are more than the user has agreed to leave behind.
    """
    move = with_counts(work.move, results)
    write_move(work.folder, move)
    if skips:
        return replace(move, left_behind=move.refused)
    if move.refused > move.left_behind:
        more = f" ({move.left_behind:,} are accepted)" if move.left_behind else ""
        raise BulkError(
            f"{describe_refused(work, results, move)}. Correct the items and run the same command again, or leave "
            f"them behind with `gateway move sync {move.name} --skip`{more}. If the text is in another field than "
            f"{quote(move.text)}, finish this move and start another with --text"
        )
    return move


def with_counts(move: Move, results: Mapping[str, PassCounts]) -> Move:
    """Return the move with the numbers of the last pass of each collection."""
    problems = [problem for counts in results.values() for problem in counts.problems]
    refused = sum(counts.refused for counts in results.values())
    return replace(
        move,
        refused=refused,
        problems=problems[:_NAMED],
        left_behind=min(move.left_behind, refused),
        missing=sum(counts.missing for counts in results.values()),
    )


def describe_refused(work: Work, results: Mapping[str, PassCounts], move: Move, *, back: bool = False) -> str:
    """Describe the items that passes could not copy, with the files that list them."""
    files = [work.refused_file(pair, back=back) for pair in move.pairs if results[pair.old].refused]
    return (
        f"{count(move.refused, 'item')} cannot be copied, such as {'; '.join(move.problems)}. The others are copied; "
        f"{', '.join(map(str, files))} lists these"
    )
