"""Write the rows of a pass: record each write in the ledger, and overwrite nothing that applications wrote meanwhile.

The pass has decided what to write when it read both collections, and embeds before it writes. So it looks at the items of
the second collection again before each write. If the store has transactions, both happen in one. Otherwise, the write of
an application is lost if it comes between these two requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gateway.bulk.fields import FieldNames
from gateway.bulk.moving.decisions import NEW, Action, Digest
from gateway.bulk.moving.direction import Direction, PassCounts, sink_of
from gateway.bulk.moving.ledger import Ledger
from gateway.bulk.moving.losses import allowed_deletions, refuse_deletions
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Row, RowId, RowsRefused, RowValidator, SpaceNote
from gateway.bulk.stores.payloads import digest, with_text
from gateway.bulk.stores.protocol import Guard, GuardedSink

_GUARDED_ROWS: Final = 64
"""Rows per check of a collection that applications write into: few, so that little time passes before the write."""


class Recorded:
    """The sink of a pass: writes rows, and records each write in the ledger before and after it."""

    def __init__(self, direction: Direction, ledger: Ledger, counts: PassCounts) -> None:
        self._sink = sink_of(direction)
        self._direction = direction
        self._ledger = ledger
        self._counts = counts
        self.name = self._sink.name

    def open(self, note: SpaceNote) -> None:
        """Open the sink."""
        self._sink.open(note)

    def problem(self, row: Row) -> str:
        """Return the reason why the sink cannot store a row; empty if it can."""
        return self._sink.problem(row) if isinstance(self._sink, RowValidator) else ""

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Write rows, unless an application has written their items into the second collection since they were read.

        Raises:
            RowsRefused: the store rejects some rows. The job then writes the others again.
        """
        size = _GUARDED_ROWS if _is_shared(self._direction) else len(batch.rows)
        bad: list[BadRow] = []
        num_written = 0
        for start in range(0, len(batch.rows), size):
            some = batch.only(range(start, min(start + size, len(batch.rows))))
            try:
                num_written += self._write(shard, some)
            except RowsRefused as error:
                bad += error.rows
        if bad:
            raise RowsRefused(bad)
        self._counts.written += num_written

    def _write(self, shard: int, batch: EmbeddedRows) -> int:
        """Write the rows that no application has changed in the meantime, and return their number."""
        digests: dict[RowId, Digest | None] = {
            row.id: digest(with_text(row, self._direction.text)) for row in batch.rows
        }
        newer: set[RowId] = set()
        guard = _guard(self._direction, self._ledger, digests, newer)
        is_shared = _is_shared(self._direction)
        if is_shared and not isinstance(self._sink, GuardedSink):
            present = self._direction.writing.digests_of(self._direction.second, list(digests))
            guard({row_id: present.get(row_id) for row_id in digests})
            batch = batch.only([index for index, row in enumerate(batch.rows) if row.id not in newer])
        self._ledger.plan({row.id: value for row in batch.rows if (value := digests[row.id]) is not None})
        if is_shared and isinstance(self._sink, GuardedSink):
            self._sink.write_guarded(shard, batch, guard)
        elif batch.rows:
            self._sink.write(shard, batch)
        self._ledger.record({row.id: value for row in batch.rows if (value := digests[row.id]) and row.id not in newer})
        self._counts.keep_newer(newer)
        return sum(row.id not in newer for row in batch.rows)

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def _is_shared(direction: Direction) -> bool:
    """Return whether applications may write items of the second collection."""
    return direction.is_flipped and not direction.is_one


def _guard(direction: Direction, ledger: Ledger, firsts: Mapping[RowId, Digest | None], newer: set[RowId]) -> Guard:
    """Return a guard that keeps the items that applications changed after the pass read them.

    Args:
        firsts: the digests in the first collection; ``None`` for a deleted item.
        newer: the guard adds these items to it.
    """

    def guard(present: Mapping[RowId, Digest | None]) -> set[RowId]:
        bases = ledger.bases_of(present)
        found = {
            row_id
            for row_id, second in present.items()
            if direction.decide(firsts[row_id], second, bases.get(row_id, NEW)) is Action.KEEP
        }
        newer.update(found)
        return found

    return guard


def delete_doomed(direction: Direction, ledger: Ledger, counts: PassCounts) -> None:
    """Delete the items that the first collection no longer has, after checking that again.

    Raises:
        BulkError: they are many, and more than the user accepts. More likely than so many deletions is that a person or
            program has emptied the first collection.
    """
    num_doomed = ledger.num_doomed()
    # Items with both vectors are in one collection, from which an application has already deleted these.
    if not direction.is_one and num_doomed > max(allowed_deletions(counts.known), direction.max_deletions):
        raise BulkError(
            refuse_deletions(direction.first, direction.second, num_doomed, counts.known, direction.command)
        )
    while ids := ledger.doomed():
        there = {row.id for row in direction.reading.read_ids(direction.first, ids, FieldNames(text=direction.text))}
        gone = {row_id: None for row_id in ids if row_id not in there}
        newer: set[RowId] = set()
        guard = _guard(direction, ledger, gone, newer) if _is_shared(direction) else None
        direction.writing.delete_ids(direction.second, list(gone), guard)
        counts.keep_newer(newer)
        deleted = [row_id for row_id in gone if row_id not in newer]
        ledger.forget(deleted)
        ledger.spare([row_id for row_id in ids if row_id in there or row_id in newer])
        counts.deleted += len(deleted)
