"""One pass over a collection and its copy: embed and write new and changed items, and delete removed ones.

The pass is a job of ``gateway embed`` whose source contains only the changes, and whose sink records its writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from gateway.bulk.embedder import Embedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.job import Job, Options, Reporter
from gateway.bulk.manifest import Manifest
from gateway.bulk.moving.decisions import NEW, Action, Base, Digest, Item, merge
from gateway.bulk.moving.direction import MAX_NAMED, Direction, PassCounts
from gateway.bulk.moving.ledger import Ledger
from gateway.bulk.moving.writing import Recorded, delete_doomed
from gateway.bulk.rows import (
    BadRow,
    BulkError,
    Position,
    Row,
    RowId,
    closing_readings,
)
from gateway.bulk.stores.protocol import Mark

_BATCH = 256
_SHARD_ROWS = 1024


class _Changes:
    """The source of a pass: the items of the first collection that must be written into the second.

    Args:
        since: the moment at which an earlier pass began; ``None`` to compare all items.
    """

    has_unique_ids = True

    def __init__(self, direction: Direction, ledger: Ledger, counts: PassCounts, since: Mark | None) -> None:
        self._direction = direction
        self._ledger = ledger
        self._counts = counts
        self._since = since
        self.text_field = direction.text
        self.name = f"{direction.reading.name}: {direction.first}"

    def fingerprint(self) -> str:
        """Return the name of the collection, because its content changes."""
        return self.name

    def count(self) -> int | None:
        """Return ``None``: the number of changes is unknown before the pass."""
        return None

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the items to embed. An interrupted pass begins again, and skips finished items by comparing digests."""
        items = self._all_items() if self._since is None else self._changed_items(self._changes(self._since))
        with closing_readings(items):
            yield from self._to_embed(items)

    def _to_embed(self, items: Iterator[Item]) -> Iterator[Row | BadRow]:
        way, counts = self._direction, self._counts
        writes: dict[RowId, Digest | None] = {}
        equal: dict[RowId, Digest] = {}
        for item in items:
            counts.items += item.first is not None or item.second is not None
            match way.decide(item.first, item.second, item.base):
                case Action.NOTHING:
                    counts.equal += 1
                case Action.RECORD if item.first is not None:
                    counts.equal += 1
                    equal[item.id] = item.first
                case Action.WRITE:
                    writes[item.id] = item.first if item.base.written or way.is_flipped else None
                case Action.DELETE:
                    self._ledger.doom([item.id])
                case Action.FORGET:
                    self._ledger.forget([item.id])
                case Action.KEEP:
                    counts.leave(item.id, is_missing=item.second is None)
            if len(equal) == _BATCH:
                self._ledger.record(equal)
                equal = {}
            if len(writes) == _BATCH:
                yield from self._rows(writes)
                writes = {}
        self._ledger.record(equal)
        yield from self._rows(writes)

    def _all_items(self) -> Iterator[Item]:
        """Yield the items of both collections and the ledger."""
        way = self._direction
        store = way.reading
        if way.is_one:
            second: Iterator[tuple[RowId, object]] = ((row_id, True) for row_id in self._filled())
        else:
            second = store.digests(way.second) if way.second in store.collections() else iter(())
        streams: list[Iterator[tuple[RowId, object]]] = [store.digests(way.first), second, self._ledger.bases()]
        for row_id, (mine, theirs, base) in merge(streams, store.sort_key):
            known = base if isinstance(base, Base) else NEW
            held = known.written if way.is_one and theirs and not known.pending else theirs
            yield Item(row_id, _digest(mine), _digest(held), known)

    def _changes(self, since: Mark) -> Iterator[tuple[RowId, bool]]:
        return self._direction.reading.changes(self._direction.first, since)

    def late_changes(self) -> Iterator[Item]:
        """Yield the items that a pass would write or delete, without reading the second collection as a whole."""
        way = self._direction
        firsts = way.reading.digests(way.first) if self._since is None else self._changes(self._since)
        for item in self._changed_items(firsts):
            if way.decide(item.first, item.second, item.base) in (Action.WRITE, Action.DELETE):
                yield item

    def _changed_items(self, firsts: Iterator[tuple[RowId, bool | Digest]]) -> Iterator[Item]:
        """Yield the items that may have changed, or that have an unclear state; count the others.

        A pass over all items finds the changes that applications made in the second collection alone.

        Args:
            firsts: the items of the first collection, with their digests, or whether they may have changed.
        """
        way, counts = self._direction, self._counts
        streams: list[Iterator[tuple[RowId, object]]] = [firsts, self._ledger.bases()]
        if way.is_one:
            streams.append((row_id, True) for row_id in self._filled())
        unclear: dict[RowId, tuple[Base, bool]] = {}
        for row_id, (may_differ, base, *filled) in merge(streams, way.reading.sort_key):
            known = base if isinstance(base, Base) else NEW
            is_same = known.written is not None and may_differ in (False, known.written)
            if is_same and not known.pending and filled != [None]:
                counts.items += 1
                counts.equal += 1
                continue
            unclear[row_id] = known, filled != [None]
            if len(unclear) == _BATCH:
                yield from self._looked_up(unclear)
                unclear = {}
        yield from self._looked_up(unclear)

    def _looked_up(self, bases: Mapping[RowId, tuple[Base, bool]]) -> Iterator[Item]:
        way, ids = self._direction, list(bases)
        if not ids:
            return
        first = way.reading.digests_of(way.first, ids)
        second = {} if way.is_one else way.reading.digests_of(way.second, ids)
        for row_id, (base, is_filled) in bases.items():
            held = (base.written if is_filled and not base.pending else None) if way.is_one else second.get(row_id)
            yield Item(row_id, first.get(row_id), held, base)

    def _filled(self) -> Iterator[RowId]:
        """Yield the items that have the further vector, of any text."""
        way = self._direction
        return way.reading.filled(way.first, way.vector or "")

    def _rows(self, writes: Mapping[RowId, Digest | None]) -> Iterator[Row | BadRow]:
        """Yield the current version of items, leaving out those that were deleted in the meantime.

        Args:
            writes: items, with their digests if they were copied before, or if `count_changes` may need them.
        """
        if not writes:
            return
        # If such an item is refused now, later passes must read it again.
        self._ledger.plan({row_id: digest for row_id, digest in writes.items() if digest is not None})
        fields = FieldNames(text=self._direction.text)
        yield from self._direction.reading.read_ids(self._direction.first, list(writes), fields)

    def close(self) -> None:
        """Do nothing: the source opens nothing itself."""


def _digest(value: object) -> Digest | None:
    return value if isinstance(value, bytes) else None


async def run_pass(
    direction: Direction,
    ledger: Ledger,
    embedder: Embedder,
    folder: Path,
    reporter: Reporter,
    stop: asyncio.Event,
    *,
    is_full: bool,
) -> tuple[PassCounts, bool]:
    """Run a pass; return its counts, and whether it was completed.

    Args:
        is_full: compare all items, even if the store can report the changes since the last pass.
        folder: the folder of the move's files.
        stop: ends the pass in an orderly way when set.

    Raises:
        BulkError: a store or the model fails. Everything written before the error counts.
    """
    counts = PassCounts(known=ledger.num_items())
    ledger.spare()
    now = await asyncio.to_thread(direction.reading.mark, direction.first, direction.changed_at)
    source = _Changes(direction, ledger, counts, None if is_full or now is None else ledger.mark)
    manifest_path = folder / "pass.sqlite3"
    for suffix in ("", "-wal", "-shm", "-journal"):
        path = manifest_path.with_name(manifest_path.name + suffix)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise BulkError(f"the state of the move cannot be written: {path}: {error.strerror}") from error
    with (
        closing(Recorded(direction, ledger, counts)) as sink,
        closing(Manifest(manifest_path)) as manifest,
    ):
        options = Options(refused_file(ledger.path), on_error="skip", shard_rows=_SHARD_ROWS)
        job = Job(source, sink, manifest, embedder, options, reporter)
        outcome = await job.run(manifest.begin({"pass": source.name}), stop)
    counts.refused = outcome.total.skipped
    counts.problems = _some_problems(options.errors) if counts.refused else []
    if outcome.is_finished:
        await asyncio.to_thread(delete_doomed, direction, ledger, counts)
        if direction.is_flipped and not direction.is_one:
            number = (await asyncio.to_thread(direction.reading.describe, direction.second)).count
            counts.missing = max(counts.missing, ledger.num_items() - number)
        if direction.creates:
            ledger.mark = now
    return counts, outcome.is_finished


def count_changes(direction: Direction, ledger: Ledger, since: Mark | None) -> int:
    """Return the number of items that the next pass would write or delete, without versions that the last pass refused.

    Args:
        since: the moment before the last pass; ``None`` to compare all items of the first collection with the ledger.
    """
    refused = {item["id"] for item in _read_refused(refused_file(ledger.path))}
    changes = _Changes(direction, ledger, PassCounts(), since).late_changes()
    return sum(item.id not in refused or item.first not in item.base.pending for item in changes)


def refused_file(ledger: Path) -> Path:
    """Return the file that lists the items that the last pass refused, next to the ledger of their collection."""
    return ledger.with_suffix(".not_copied.jsonl")


def _some_problems(path: Path) -> list[str]:
    found = islice(_read_refused(path), MAX_NAMED)
    return [f"{item['place'] if item['id'] is None else item['id']}: {item['problem']}" for item in found]


def _read_refused(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open("rb") as file:
            yield from map(orjson.loads, file)
