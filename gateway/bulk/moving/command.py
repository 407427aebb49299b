"""The steps of a move at the command line: print the result of each, and the next command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from gateway.bulk.moving.state import Move, Stage, find_move, read_moves
from gateway.bulk.moving.steps import check
from gateway.cli.console import make_console, say
from gateway.config.wording import count


def show(folder: Path, step: Callable[[Console], Coroutine[Any, Any, Move]]) -> None:
    """Run a step, and print the resulting state."""
    move = asyncio.run(step(make_console(is_error=True)))
    _print(make_console(), move)


def show_check(move: Move, folder: Path, queries: Path | None, old_model: str | None) -> bool:
    """Run the check, print it with its verdict, and return whether the new collection is ready."""
    console = make_console()
    move, reports = asyncio.run(check(move, folder, make_console(is_error=True), queries, old_model))
    is_ready = True
    for pair, report in zip(move.pairs, reports, strict=True):
        second = pair.new if move.into_vector is None else f"its vector {move.into_vector}"
        say(console, f"{pair.old} and {second}", "bold")
        for line in report.sentences():
            say(console, line)
        problems = report.problems()
        for problem in problems:
            say(console, f"not ready: {problem}", "red")
        is_ready = is_ready and not problems
    say(console, "ready: the new collection can be used" if is_ready else "not ready", "green" if is_ready else "red")
    if is_ready:
        say(console, f"next: {next_command(move)}")
    return is_ready


def show_status(folder: Path, name: str | None) -> None:
    """Print one move with its log, or all of them."""
    console = make_console()
    if name is not None:
        _print(console, find_move(folder, name), with_log=True)
        return
    moves = list(read_moves(folder).values())
    if not moves:
        say(console, "there are no moves; start one with: gateway move COLLECTION --from URL --to MODEL")
    for move in moves:
        _print(console, move, with_log=len(moves) == 1)


def _print(console: Console, move: Move, *, with_log: bool = False) -> None:
    pair = move.pairs[0]
    target = pair.new if move.into_vector is None else f"its vector {move.into_vector}"
    say(console, f"{move.name}: {pair.old} → {target} in {move.place.partition('?')[0]}", "bold")
    say(console, f"{_describe_stage(move)}; space {move.space}, {move.dimensions} dimensions, text in {move.text}")
    if move.refused:
        accepted = f" (leaving {move.left_behind:,} behind was accepted)" if move.left_behind else ""
        say(
            console,
            f"{count(move.refused, 'item')} could not be copied{accepted}, such as {'; '.join(move.problems)}",
            "red",
        )
    if move.missing:
        say(console, f"{count(move.missing, 'copied item')} missing from {target} in the last pass", "red")
    if with_log:
        for line in move.log:
            say(console, f"  {line}")
    if move.stage is Stage.FLIPPED and not move.is_redirecting:
        for line in _after_flip(move):
            say(console, line)
    if command := next_command(move):
        say(console, f"next: {command}")


_STAGES: Final = {
    Stage.COPYING: "copying: the new collection does not have all items yet",
    Stage.COPIED: "copied, but not compared since",
    Stage.CHECKED: "checked: the new collection can be used",
    Stage.FLIPPED: "flipped: applications use the new collection",
    Stage.FINISHED: "finished",
}


def _describe_stage(move: Move) -> str:
    if move.is_redirecting:
        name = f"the alias {move.alias}" if move.mem0 is None else str(move.mem0)
        return f"interrupted while {name} was changed: the next step finds out which collection it names"
    if move.is_returning:
        return "going back: items of the new collection are missing from the old one"
    return _STAGES[move.stage]


def _after_flip(move: Move) -> list[str]:
    """Return instructions for the applications after the flip."""
    new = move.pairs[0].new
    if move.mem0 is not None:
        return [
            f"{move.mem0} now names {new} and {move.model}: restart the programs that use Mem0. Until all of them "
            "have restarted, `gateway move sync` copies the writes of the others."
        ]
    if move.alias is not None:
        uses = f"the alias {move.alias} now points to {new}"
    elif move.into_vector is not None:
        uses = f"let applications search the vector {move.into_vector} of {new}, and write it with each item"
    else:
        uses = f"let applications search and write to {new}"
    return [
        f"{uses}; embed queries and new items with {move.model} from now on (x-gateway-expect-space: {move.space}). "
        "Until all writers do, `gateway move sync` copies their writes from the old collection."
    ]


def next_command(move: Move) -> str:
    """Return the next command, ready to be copied."""
    if move.is_returning or (move.is_redirecting and move.stage is Stage.FLIPPED):
        step = "back"
    elif move.is_redirecting:
        step = "flip"
    elif move.stage is Stage.FLIPPED:
        return (
            f"gateway move sync {move.name}, and finally gateway move finish {move.name} --delete-old; "
            f"or gateway move back {move.name}"
        )
    else:
        step = _NEXT.get(move.stage, "")
    return f"gateway move {step} {move.name}" if step else ""


_NEXT: Final = {Stage.COPYING: "sync", Stage.COPIED: "check", Stage.CHECKED: "flip"}
