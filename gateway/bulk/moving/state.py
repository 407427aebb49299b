"""The state of a move: a file for people and programs, in a folder with the ledgers of its collections."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from gateway.bulk.rows import BulkError
from gateway.config.files import write_whole
from gateway.config.wording import enumerate_names

_FILE: Final = "move.json"
_LOCK: Final = "lock"
_MAX_SLUG: Final = 60


class Stage(StrEnum):
    """The stage of a move."""

    COPYING = "copying"
    """The first pass has not finished."""
    COPIED = "copied"
    CHECKED = "checked"
    """The last check found no problems."""
    FLIPPED = "flipped"
    """Applications use the new collection."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Pair:
    """A collection and its copy.

    Attributes:
        old: the real name of the old collection.
        new: the same name, if the new vectors are next to the old ones.
        ledger: the name of the ledger's file in the move's folder.
        changed_at: the field with the time of each item's last change; ``None`` if there is no such field.
    """

    old: str
    new: str
    ledger: str
    changed_at: str | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A move.

    Attributes:
        place: the URL of the store, without secrets; with Mem0, only for messages.
        model: the name of the new model, in the syntax of `gateway embed`.
        space, dimensions: the space and size of the new vectors, once known.
        text: the path of the text in an item.
        vector: the name of the vector, if items have several.
        into_vector: the name of the new vector next to the old one; ``None`` for a second collection.
        flattens: replace line breaks in texts by spaces before embedding, as Mem0 does.
        has_default_task: embed texts without naming a task, as Mem0 does.
        alias: the name that applications use.
        mem0: the path of Mem0's configuration.
        mem0_before: the previous values of the settings that a flip changes in it.
        url: the gateway's URL; ``None`` to load the model in this process.
        models: the registry from which to load the model.
        api_key_env: the name of the environment variable with the gateway's key.
        left_behind: the number of items that cannot be copied and that the user agreed to leave behind.
        refused: the number of items that the last pass could not copy.
        problems: some of them, each as its id and the problem.
        missing: the number of copied items that the new collections lacked in the last pass.
        was_flipped: applications have been allowed to use the new collection.
        is_returning: applications use the old collection again, which lacks items that they wrote into the new one.
        is_redirecting: a step has begun to change the names that applications use, and may have been interrupted. Only the
            store knows which collection they point to.
        log: the history of the move, for people.
    """

    name: str
    place: str
    pairs: Sequence[Pair]
    model: str
    text: str
    stage: Stage = Stage.COPYING
    space: str | None = None
    dimensions: int | None = None
    vector: str | None = None
    into_vector: str | None = None
    flattens: bool = False
    has_default_task: bool = False
    alias: str | None = None
    mem0: Path | None = None
    mem0_before: dict[str, Any] | None = None
    url: str | None = None
    models: Path | None = None
    api_key_env: str = "EMBEDDINGS_API_KEY"
    left_behind: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)
    missing: int = 0
    was_flipped: bool = False
    is_returning: bool = False
    is_redirecting: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def new_vector(self) -> str | None:
        """The name of the new vector in the new collection."""
        return self.vector if self.into_vector is None else self.into_vector

    @property
    def may_be_in_use(self) -> bool:
        """Applications may have written into the new collection."""
        return self.was_flipped or self.is_redirecting

    def at(self, stage: Stage, what: str) -> Move:
        """Return the move at a stage, with a line in its log."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M} {what}"
        return replace(self, stage=stage, log=[*self.log, line])


_MOVE: Final = TypeAdapter(Move)


def slug_of(text: str) -> str:
    """Return a text in a form that can be part of the name of a file or collection."""
    return re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_").lower()


def new_name(collection: str, space: str) -> str:
    """Return a name for the copy of a collection, with the model and the hash of its space to make it unique.

    The name has at most 60 characters, because PostgreSQL cuts names longer than 63. If the collection's name must be
    changed for that, a hash of it is added: two collections must never have the same copy.
    """
    model, _, digest = space.rpartition("@")
    base = re.sub(r"[^0-9A-Za-z_]+", "_", collection)
    ending = f"_{slug_of(model)[:24]}_{digest[:12]}"
    if base != collection or len(base) + len(ending) > _MAX_SLUG:
        ending = f"_{_short_hash(collection)}{ending}"
    return base[: _MAX_SLUG - len(ending)] + ending


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def name_move(folder: Path, collection: str, place: str) -> str:
    """Return the name of a move: the collection's name, unless a move of another collection has it."""
    name = slug_of(collection)[:_MAX_SLUG] or "move"
    before = read_moves(folder).get(name)
    if before is None or (before.place == place and before.pairs[0].old == collection):
        return name
    return f"{name}_{_short_hash(place if before.place != place else f'{place} {collection}')}"


@contextmanager
def lock_move(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes from working on a move within the context.

    Raises:
        BulkError: another process works on it, or the folder cannot be written.
    """
    path = folder / name / _LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise BulkError(f"the state of the move cannot be written: {path}: {error.strerror}") from error
    with file:  # closing it, and the death of the process, ends the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BulkError(f"another process works on the move {name}; wait for it, or end it") from None
        except OSError as error:  # a network file system without locks
            raise BulkError(f"the move cannot be locked: {path}: {error.strerror}") from error
        yield


@contextmanager
def hold(folder: Path, move: Move) -> Iterator[Move]:
    """Lock a move that has not finished, and yield its state, which another process may have changed since it was read.

    Raises:
        BulkError: another process works on it, or it has finished.
    """
    with lock_move(folder, move.name):
        found = read_moves(folder).get(move.name, move)
        if found.stage is Stage.FINISHED:
            raise BulkError(f"the move {found.name} is finished: there are no further steps")
        yield found


def write_move(folder: Path, move: Move) -> None:
    """Write the whole state of a move.

    Raises:
        BulkError: it cannot be written.
    """
    path = folder / move.name / _FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _MOVE.dump_json(move, indent=2).decode() + "\n", 0o600)
    except OSError as error:
        raise BulkError(f"the state of the move cannot be written: {path}: {error.strerror}") from error


def read_moves(folder: Path) -> dict[str, Move]:
    """Return all moves by their names.

    Raises:
        BulkError: a state cannot be read.
    """
    found = {}
    for path in sorted(folder.glob(f"*/{_FILE}")):
        try:
            move = _MOVE.validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise BulkError(f"the state of a move cannot be read: {path}: {error}") from error
        found[move.name] = move
    return found


def find_move(folder: Path, name: str | None) -> Move:
    """Return a move by its name or that of its collection; without a name, the only one that is not finished.

    Raises:
        BulkError: there is no such move, or there are several.
    """
    moves = read_moves(folder)
    if name is not None:
        if name not in moves:
            same = [move for move in moves.values() if name in (move.pairs[0].old, move.pairs[0].new, move.alias)]
            same = [move for move in same if move.stage is not Stage.FINISHED] or same
            if len(same) == 1:
                return same[0]
            hint = f"; the moves are {enumerate_names(moves)}" if moves else "; there are no moves"
            raise BulkError(f"no move is called {name!r}{hint}")
        return moves[name]
    open_moves = [move for move in moves.values() if move.stage is not Stage.FINISHED]
    if len(open_moves) == 1:
        return open_moves[0]
    if open_moves:
        raise BulkError(f"there are several moves; name one of {enumerate_names(move.name for move in open_moves)}")
    raise BulkError(f"no move is under way in {folder}; start one with `gateway move COLLECTION --from URL --to MODEL`")
