"""The resources of a move's steps: its store, opened twice, the ledgers of its collections, and the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from gateway.bulk.chunking import ModelTokens
from gateway.bulk.command import open_embedder, stop_on_signals
from gateway.bulk.embedder import Embedder, TextVectors
from gateway.bulk.model_spec import PASSAGE_TASK, ModelSpec, read_spec
from gateway.bulk.moving.checking import allowed_changes
from gateway.bulk.moving.direction import Direction, PassCounts, sink_of
from gateway.bulk.moving.ledger import Ledger
from gateway.bulk.moving.mem0 import read_mem0
from gateway.bulk.moving.passes import refused_file, run_pass
from gateway.bulk.moving.state import Move, Pair, Stage
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.progress import show_progress
from gateway.bulk.rows import BulkError, SpaceNote
from gateway.bulk.stores.protocol import CollectionInfo, MovableStore, Place
from gateway.cli.console import say
from gateway.cli.models import models_at
from gateway.config.wording import count
from gateway.routing.spaces import is_same_space
from gateway.types import Truncate

_MAX_PASSES = 10


class Interrupted(BulkError):
    """The user interrupted a step. Everything done so far counts."""


class _Flattened:
    """An embedder that removes line breaks from texts first, as Mem0 does."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.note: SpaceNote = embedder.note
        self.max_texts = embedder.max_texts
        self.max_characters = embedder.max_characters
        self.num_calls = embedder.num_calls
        self.block_texts = embedder.block_texts

    async def tokens(self) -> ModelTokens:
        return await self._embedder.tokens()

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        return await self._embedder.embed([text.replace("\n", " ") for text in texts], is_late=is_late)


def place_of(move: Move) -> Place:
    """Return the place of a move's store, with the variables that hold its passwords.

    Raises:
        BulkError: Mem0's configuration can no longer be read.
    """
    named = None if move.mem0 is None else read_mem0(move.mem0).place
    if named is not None and (not named.location or Path(named.location).is_absolute()):
        return named
    place = read_place(move.place, has_collection=False)
    if place is None:
        raise BulkError(f"{move.place} is not the URL of a store")
    # A relative path in Mem0's configuration means the same folder in each step, wherever that is run.
    return place if named is None else replace(named, location=place.location)


def spec_of(move: Move, model: str | None = None, *, for_queries: bool = False, task: str | None = None) -> ModelSpec:
    """Return the request for a move's vectors.

    Args:
        model: another model, such as the old one.
        for_queries: request the vectors of queries, if the model embeds them differently from documents.
        task: the task for the documents.
    """
    spec = read_spec(model or move.model, None, Truncate.END)
    if for_queries and task == PASSAGE_TASK:
        name = spec.name.removesuffix(f":{PASSAGE_TASK}")
        return replace(spec, name=f"{name}:retrieval.query")
    return replace(spec, prefers_passages=not move.has_default_task)


@asynccontextmanager
async def embedder_of(move: Move, spec: ModelSpec, console: Console) -> AsyncIterator[Embedder]:
    """Load a model, or find it at the move's gateway."""
    async with open_embedder(spec, models_at(move.url, move.api_key_env, move.models), console) as embedder:
        yield _Flattened(embedder) if move.flattens else embedder


@contextmanager
def store_of(move: Move) -> Iterator[MovableStore]:
    """Open the store of a move."""
    with closing(open_movable(place_of(move))) as store:
        yield store


def pairs_left(move: Move) -> list[Pair]:
    """Return the pairs whose old collection, vector or note still exists: an interrupted last step may have deleted some."""
    with store_of(move) as store:
        # A vector is deleted before its note.
        return [pair for pair in move.pairs if _has_old(move, pair, store, or_note=True)]


def check_way_back(move: Move, store: MovableStore) -> None:
    """Check that the old collections and vectors exist.

    Raises:
        BulkError: an interrupted last step, or another program, has deleted one.
    """
    if not all(_has_old(move, pair, store) for pair in move.pairs):
        raise BulkError(
            f"the old {'vector' if move.into_vector else 'collection'} was deleted, so there is no way back: `gateway move "
            f"finish {move.name} --delete-old` completes the move"
        )


def _has_old(move: Move, pair: Pair, store: MovableStore, *, or_note: bool = False) -> bool:
    if pair.old not in store.collections():
        return False
    if move.into_vector is None:
        return True
    info = store.describe(pair.old)
    return move.vector in info.widths or (or_note and move.vector in info.notes)


@dataclass(frozen=True, slots=True)
class Work:
    """A move with its open store and loaded model.

    Attributes:
        folder: the folder of all moves.
        max_deletions, restores: see `Direction`.
    """

    move: Move
    folder: Path
    reading: MovableStore
    writing: MovableStore
    embedder: Embedder
    console: Console
    max_deletions: int = 0
    restores: bool = False

    @property
    def files(self) -> Path:
        """The move's folder."""
        return self.folder / self.move.name

    def _ledger_path(self, pair: Pair, *, back: bool) -> Path:
        path = self.files / pair.ledger
        return old_ledger(path) if back and self.move.into_vector else path

    def refused_file(self, pair: Pair, *, back: bool = False) -> Path:
        """Return the file that lists the items that the last pass over a collection could not copy."""
        return refused_file(self._ledger_path(pair, back=back))

    @contextmanager
    def ledger(self, pair: Pair, *, back: bool = False) -> Iterator[Ledger]:
        """Open the ledger of a collection: of its new vectors, or of old ones in the same collection."""
        with closing(Ledger(self._ledger_path(pair, back=back), self.reading.sort_key)) as ledger:
            exists = pair.new in self.reading.collections()
            info = self.reading.describe(pair.new) if exists else None
            target = [pair.new, self.move.new_vector]
            ledger.belong_to(json.dumps([*target, info and info.identity]), former=json.dumps(target))
            if info is None or self._is_foreign(info):  # the first pass, or it was deleted since, or created again
                ledger.clear()
            yield ledger

    def _is_foreign(self, info: CollectionInfo) -> bool:
        """Return whether a collection lacks the note of the move, or items although only the move has written into it."""
        space = self.move.space or ""
        is_noted = any(is_same_space(note.space, space) for note in info.notes.values())
        return not is_noted or not (info.count or self.move.may_be_in_use)

    def direction(self, pair: Pair, *, back: bool = False) -> Direction:
        """Return where a pass reads and writes: from the old collection to the new one, or back."""
        first, second = (pair.new, pair.old) if back else (pair.old, pair.new)
        move = self.move
        return Direction(
            self.reading,
            self.writing,
            first,
            second,
            move.text,
            move.vector if back or move.into_vector is None else move.into_vector,
            move.may_be_in_use or back,
            creates=not back,
            changed_at=pair.changed_at,
            max_deletions=self.max_deletions,
            restores=self.restores,
            command=f"gateway move {'back' if back else 'sync'} {move.name}",
        )

    def make_copies(self) -> None:
        """Create the new collections, or check that existing ones can take the vectors.

        Raises:
            BulkError: a collection has vectors of another space.
        """
        for pair in self.move.pairs:
            with self.ledger(pair), closing(sink_of(self.direction(pair))) as sink:
                sink.open(self.embedder.note)

    def _check_in_use(self) -> None:
        """Check that the collections that applications use exist, rather than creating them again.

        Raises:
            BulkError: one was deleted.
        """
        is_in_use = self.move.stage is Stage.FLIPPED or self.move.is_redirecting
        names = self.reading.collections() if is_in_use else []
        for pair in self.move.pairs:
            if is_in_use and pair.new not in names:
                raise BulkError(
                    f"{pair.new}, which applications use since the flip, was deleted: `gateway move finish "
                    f"{self.move.name}` ends the move and keeps {pair.old}"
                )

    async def passes(self, *, back: bool = False, is_full: bool = False) -> dict[str, PassCounts]:
        """Run passes over each collection until a pass changes few items; return the last pass of each.

        Args:
            is_full: each pass compares all items.

        Raises:
            Interrupted: the user interrupted it.
            BulkError: a store or the model fails.
        """
        self._check_in_use()
        stop = asyncio.Event()
        stop_on_signals(stop, self.console)
        found = {}
        is_full = is_full or back or self.restores
        for pair in self.move.pairs:
            earlier = 0
            with self.ledger(pair, back=back) as ledger:
                way = self.direction(pair, back=back)
                for _number in range(_MAX_PASSES):
                    with show_progress(self.console) as reporter:
                        counts, is_finished = await run_pass(
                            way, ledger, self.embedder, self.files, reporter, stop, is_full=is_full
                        )
                    say(self.console, describe(way, counts))
                    found[pair.old] = counts
                    counts.earlier = earlier
                    earlier += counts.changes
                    if not is_finished:
                        raise Interrupted("interrupted; written items are kept, and the same command continues")
                    # A refused item may fit now, after another one has changed or gone.
                    if counts.changes <= allowed_changes(counts.items) and not (counts.refused and counts.changes):
                        break
        return found


def note_of(info: CollectionInfo, vector: str | None) -> SpaceNote | None:
    """Return the note of a vector; without a name, of the only one."""
    notes = info.notes
    return notes.get(vector) if vector is not None else next(iter(notes.values()), None)


def old_model_of(move: Move, store: MovableStore, pair: Pair) -> str | None:
    """Return the name of the old collection's model, from its note or Mem0's configuration."""
    if (note := note_of(store.describe(pair.old), move.vector)) is not None:
        return note.model
    if move.mem0_before is not None:
        return move.mem0_before.get("model")
    return read_mem0(move.mem0).model if move.mem0 is not None else None


def old_ledger(path: Path) -> Path:
    """Return the file of the ledger of old vectors that are in the same collection as the new ones."""
    return path.with_name(f"old_{path.name}")


def describe(way: Direction, counts: PassCounts) -> str:
    """Describe the results of a pass."""
    parts = [f"{counts.written:,} embedded", f"{counts.deleted:,} deleted", f"{counts.equal:,} already equal"]
    parts += [f"{counts.kept:,} newer in {way.second} and left unchanged"] if counts.kept else []
    parts += [f"{counts.missing:,} missing from {way.second}"] if counts.missing else []
    parts += [f"{counts.refused:,} that cannot be copied"] if counts.refused else []
    return f"{way.first} → {way.target}: {count(counts.items, 'item')}, {', '.join(parts)}"


@asynccontextmanager
async def at_work(move: Move, folder: Path, console: Console, model: str | None = None) -> AsyncIterator[Work]:
    """Open the store and the model of a move.

    Args:
        model: a model to use instead of the new one.

    Raises:
        BulkError: they cannot be opened, or the new model is no longer in the space of the move.
    """
    with store_of(move) as reading, store_of(move) as writing:
        async with embedder_of(move, spec_of(move, model), console) as embedder:
            space = embedder.note.space
            if model is None and move.space is not None and not is_same_space(space, move.space):
                raise BulkError(
                    f"{move.model} is now in the space {space}, but the vectors of this move are of {move.space}. Restore "
                    f"the model's earlier weights and settings, or end this move with `gateway move finish {move.name}` "
                    "and start another"
                )
            yield Work(move, folder, reading, writing, embedder, console)
