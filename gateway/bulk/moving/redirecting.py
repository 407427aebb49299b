"""Point the names that applications use to the new collection, or back: an alias or view, and Mem0's configuration.

The state of a move does not contain these names, and a process may die, or lose the store, after it changes one and before
it changes the other. So it first writes that it will change the names. After an interruption, the next step checks the
store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from gateway.bulk.moving.mem0 import change_mem0, read_mem0, restore_mem0
from gateway.bulk.moving.planning import check_alias, target_of
from gateway.bulk.moving.state import Move, Stage, hold, write_move
from gateway.bulk.moving.work import store_of
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import MovableStore


@contextmanager
def begin(folder: Path, move: Move) -> Iterator[Move]:
    """Lock a move for a step, and yield its state.

    Raises:
        BulkError: another process works on it, it has finished, or the store cannot be read after an interrupted step.
    """
    with hold(folder, move) as held:
        yield settle(held, folder)


class _Meaning(Enum):
    """The collection that the names point to."""

    NEW = "new"
    OLD = "old"
    BOTH = "both"
    """One of two names was changed."""
    OTHER = "other"
    """An alias points to a third collection, or was deleted."""


def settle(move: Move, folder: Path) -> Move:
    """Return the move with its state corrected if a change of the names was interrupted, and write that state.

    The names may have pointed to the new collection since the interruption, even if a person has restored them: applications
    may have used it.

    Raises:
        BulkError: the store or Mem0's configuration cannot be read.
    """
    if not move.is_redirecting:
        return move
    return _written(_as_found(replace(move, was_flipped=True), _meaning(move)), folder)


def _as_found(move: Move, meaning: _Meaning) -> Move:
    match meaning:
        case _Meaning.NEW:
            return _flipped(move)
        case _Meaning.BOTH:  # the same step again changes the other name
            return move
        case _Meaning.OLD if move.stage is Stage.FLIPPED:
            return _returned(move)
    before = move.mem0_before if move.stage is Stage.FLIPPED else None
    return replace(move, is_redirecting=False, mem0_before=before).at(
        move.stage, "the names do not point to the new collection"
    )


def _meaning(move: Move) -> _Meaning:
    """Return the meaning of the names now.

    Raises:
        BulkError: the store or Mem0's configuration cannot be read.
    """
    pair = move.pairs[0]
    found: list[str | None] = []
    if move.alias is not None:
        with store_of(move) as store:
            found.append(target_of(store, move.alias))
    if move.mem0 is not None:
        named = read_mem0(move.mem0).collection
        found.append(pair.new if named == pair.new else pair.old)
    if all(collection == pair.new for collection in found):
        return _Meaning.NEW
    if pair.new in found:
        return _Meaning.BOTH
    return _Meaning.OLD if all(collection == pair.old for collection in found) else _Meaning.OTHER


def is_in_use(move: Move) -> bool:
    """Return whether all names of a move point to the new collection, which people may change; true without names."""
    return _meaning(move) is _Meaning.NEW


def _written(move: Move, folder: Path) -> Move:
    write_move(folder, move)
    return move


def _flipped(move: Move) -> Move:
    return replace(move, was_flipped=True, is_returning=False, is_redirecting=False).at(Stage.FLIPPED, "flipped")


def _returned(move: Move) -> Move:
    move = replace(move, was_flipped=True, is_returning=True, is_redirecting=False, mem0_before=None)
    return move.at(Stage.COPIED, "back to the old collection")


def redirect(move: Move, store: MovableStore, folder: Path, *, back: bool) -> Move:
    """Let the names point to the new collection, or to the old one again, and write the state.

    Raises:
        BulkError: a name cannot be changed. The state then says where the names point, or that this is unknown.
    """
    move = _written(replace(move, is_redirecting=True), folder)
    try:
        _change(move, store, back=back)
    except BulkError:
        meaning = None
        with suppress(BulkError):
            meaning = _meaning(move)
        if meaning is not (_Meaning.OLD if back else _Meaning.NEW):
            if meaning is not None:
                _written(_as_found(move, meaning), folder)
            raise
        # Only the response was lost.
    return _written(_returned(move) if back else _flipped(move), folder)


def _change(move: Move, store: MovableStore, *, back: bool) -> None:
    pair = move.pairs[0]
    if move.alias is not None:
        check_alias(store, move)
        store.flip(move.alias, pair.old if back else pair.new)
    if move.mem0 is None:
        return
    if back:
        if move.mem0_before is not None:
            restore_mem0(move.mem0, move.mem0_before)
        return
    try:
        change_mem0(move.mem0, pair.new, move.model, move.dimensions or 0, move.url)
    except BulkError:
        if move.alias is not None:  # Mem0 would use the new collection with the old model
            store.flip(move.alias, pair.old)
        raise
