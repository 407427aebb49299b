"""One pass over a collection and its copy: what is new or changed is embedded and written, what is gone is deleted.

The pass is a job of ``gateway embed`` whose source has only the changes, and whose sink notes what it has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gateway.bulk.embedder import Embedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.job import Job, Options, Reporter
from gateway.bulk.manifest import Manifest
from gateway.bulk.moving.decisions import Action, Digest, decide, merge
from gateway.bulk.moving.ledger import Ledger
from gateway.bulk.rows import BadRow, EmbeddedRows, Position, Row, RowId, Sink, SpaceNote
from gateway.bulk.stores.payloads import digest, with_field
from gateway.bulk.stores.protocol import Keeping, MovableStore

_BATCH = 256
_SHARD_ROWS = 1024
_MAX_NAMED = 20


@dataclass(slots=True)
class PassCounts:
    """What a pass has found, and done.

    Attributes:
        items: of both collections.
        written: new and changed items that were embedded.
        deleted: in the second collection.
        equal: items that both already had.
        kept: items of the second collection that the move did not write, or that were changed there since.
        refused: items without a text, or with one that the model refuses.
        kept_ids, refused_ids: some of them.
    """

    items: int = 0
    written: int = 0
    deleted: int = 0
    equal: int = 0
    kept: int = 0
    refused: int = 0
    kept_ids: list[RowId] = field(default_factory=list)
    refused_ids: list[RowId] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """How many items the pass has changed."""
        return self.written + self.deleted


@dataclass(frozen=True, slots=True)
class Direction:
    """Where a pass reads and writes.

    Attributes:
        reading, writing: the same store, opened twice: one is read in one thread while the other writes in another.
        text: the path of the text in an item.
        vector: the name of the vector that is replaced, where items have several.
        is_flipped: applications may use the second collection.
        creates: the second collection is made like the first one; otherwise it exists, maybe without a note.
    """

    reading: MovableStore
    writing: MovableStore
    first: str
    second: str
    text: str
    vector: str | None
    is_flipped: bool
    creates: bool = True


class _Changes:
    """The source of a pass: the items of the first collection that must be written into the second."""

    has_unique_ids = True

    def __init__(self, direction: Direction, ledger: Ledger, counts: PassCounts) -> None:
        self._direction = direction
        self._ledger = ledger
        self._counts = counts
        self.text_field = direction.text
        self.name = f"{direction.reading.name}: {direction.first}"

    def fingerprint(self) -> str:
        """Return the collection; its content changes."""
        return self.name

    def count(self) -> int | None:
        """Return nothing: only the pass itself tells."""
        return None

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the items to embed. A pass that was ended begins again, and skips what is done by comparing digests."""
        way, counts = self._direction, self._counts
        store = way.reading
        second = store.digests(way.second) if way.second in store.collections() else iter(())
        items = merge(store.digests(way.first), second, self._ledger.bases(), store.sort_key)
        writes: list[RowId] = []
        equal: dict[RowId, Digest] = {}
        for item in items:
            counts.items += item.first is not None or item.second is not None
            match decide(item.first, item.second, item.base, is_flipped=way.is_flipped):
                case Action.NOTHING:
                    counts.equal += 1
                case Action.RECORD if item.first is not None:
                    counts.equal += 1
                    equal[item.id] = item.first
                case Action.WRITE:
                    writes.append(item.id)
                case Action.DELETE:
                    self._ledger.doom([item.id])
                case Action.FORGET:
                    self._ledger.forget([item.id])
                case Action.KEEP:
                    counts.kept += 1
                    counts.kept_ids += [item.id] if len(counts.kept_ids) < _MAX_NAMED else []
            if len(equal) == _BATCH:
                self._ledger.record(equal)
                equal = {}
            if len(writes) == _BATCH:
                yield from self._rows(writes)
                writes = []
        self._ledger.record(equal)
        yield from self._rows(writes)

    def _rows(self, ids: Sequence[RowId]) -> Iterator[Row | BadRow]:
        """Yield items as they are now; one that was deleted meanwhile is left out."""
        if not ids:
            return
        for row in self._direction.reading.read_ids(self._direction.first, ids, FieldNames(text=self._direction.text)):
            if isinstance(row, BadRow):
                self._counts.refused += 1
                self._counts.refused_ids += [row.id or row.place] if len(self._counts.refused_ids) < _MAX_NAMED else []
            yield row

    def close(self) -> None:
        """Nothing of this source is open."""


class _Recorded:
    """The sink of a pass: writes rows, and notes in the ledger before and after what it has written."""

    def __init__(self, sink: Sink, ledger: Ledger, text: str, counts: PassCounts) -> None:
        self._sink = sink
        self._ledger = ledger
        self._text = text
        self._counts = counts
        self.name = sink.name

    def is_empty(self) -> bool:
        """Return whether the sink holds nothing."""
        return self._sink.is_empty()

    def open(self, note: SpaceNote) -> None:
        """Open the sink."""
        self._sink.open(note)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Write rows."""
        digests = {row.id: digest(with_field(row.payload, self._text, row.text)) for row in batch.rows}
        self._ledger.plan(digests)
        self._sink.write(shard, batch)
        self._ledger.record(digests)
        self._counts.written += len(batch.rows)

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def sink_of(direction: Direction) -> Sink:
    """Return the sink of the second collection."""
    like = direction.first if direction.creates else None
    keeping = Keeping(direction.text, direction.vector, adopts=not direction.creates, like=like)
    return direction.writing.sink(direction.second, keeping)


async def run_pass(
    direction: Direction, ledger: Ledger, embedder: Embedder, folder: Path, reporter: Reporter, stop: asyncio.Event
) -> tuple[PassCounts, bool]:
    """Run a pass; return what it did, and whether it came to its end.

    Args:
        folder: of the move, where its files are.
        stop: ends the pass in order when it is set.

    Raises:
        BulkError: a store or the model fails. What was written until then counts.
    """
    counts = PassCounts()
    ledger.spare()
    source = _Changes(direction, ledger, counts)
    manifest_path = folder / "pass.sqlite3"
    for suffix in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            manifest_path.with_name(manifest_path.name + suffix).unlink()
    with (
        closing(_Recorded(sink_of(direction), ledger, direction.text, counts)) as sink,
        closing(Manifest(manifest_path)) as manifest,
    ):
        options = Options(folder / "without_text.jsonl", on_error="skip", shard_rows=_SHARD_ROWS)
        job = Job(source, sink, manifest, embedder, options, reporter)
        outcome = await job.run(manifest.begin({"pass": source.name}), stop)
    counts.refused = outcome.total.skipped
    if outcome.is_finished:
        await asyncio.to_thread(_delete_doomed, direction, ledger, counts)
    return counts, outcome.is_finished


def _delete_doomed(direction: Direction, ledger: Ledger, counts: PassCounts) -> None:
    """Delete what the first collection does not have any more, after another look at it."""
    while ids := ledger.doomed():
        there = {row.id for row in direction.reading.read_ids(direction.first, ids, FieldNames(text=direction.text))}
        gone = [row_id for row_id in ids if row_id not in there]
        direction.writing.delete_ids(direction.second, gone)
        ledger.forget(gone)
        ledger.spare([row_id for row_id in ids if row_id in there])
        counts.deleted += len(gone)
