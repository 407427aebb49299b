"""The direction of a pass, and its counts."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from gateway.bulk.moving.decisions import Action, Base, Digest, decide
from gateway.bulk.rows import RowId, Sink
from gateway.bulk.stores.protocol import MovableStore, SinkOptions

MAX_NAMED: Final = 20
"""The maximum number of items that a pass names."""
NUM_DRAWN: Final = 50
"""The number of items whose vectors a check compares with the model's."""


@dataclass(slots=True)
class PassCounts:
    """The items that a pass found, and its changes.

    Attributes:
        items: the items of both collections.
        written: new and changed items that were embedded.
        deleted: items deleted from the second collection.
        equal: items that both collections already had.
        known: items that the ledger had before the pass.
        earlier: changes of earlier passes in the same step.
        kept: items of the second collection that the move did not write, or that were changed there since.
        missing: items that the move wrote, but that the second collection no longer has; a pass that does not compare all
            items finds at least some of them.
        refused: items without a text, with a text that the model rejects, or that the second collection cannot store.
        kept_ids: the ids of some items that were kept.
        drawn_ids: the ids of random items that were kept.
        newer_ids: the ids of the items that applications changed after the pass read them.
        problems: some refused items, each as its id and the problem.
    """

    items: int = 0
    written: int = 0
    deleted: int = 0
    equal: int = 0
    known: int = 0
    earlier: int = 0
    kept: int = 0
    missing: int = 0
    refused: int = 0
    kept_ids: list[RowId] = field(default_factory=list)
    drawn_ids: list[RowId] = field(default_factory=list)
    newer_ids: set[RowId] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def leave(self, row_id: RowId, *, is_missing: bool) -> None:
        """Count an item that is newer in the second collection, or missing there."""
        if is_missing:
            self.missing += 1
        else:
            self.keep([row_id])

    def keep(self, ids: Collection[RowId]) -> None:
        """Count items that were kept, and draw some of all of them at random."""
        self.kept_ids += islice(ids, MAX_NAMED - len(self.kept_ids))
        for row_id in ids:
            self.kept += 1
            if len(self.drawn_ids) < NUM_DRAWN:
                self.drawn_ids.append(row_id)
            elif (place := random.randrange(self.kept)) < NUM_DRAWN:  # noqa: S311  not a secret
                self.drawn_ids[place] = row_id

    def keep_newer(self, ids: Collection[RowId]) -> None:
        """Count items that applications changed after the pass read them, each once: rows may be written again."""
        self.keep(set(ids) - self.newer_ids)
        self.newer_ids |= set(ids)

    @property
    def changes(self) -> int:
        """The number of items that the pass changed."""
        return self.written + self.deleted


@dataclass(frozen=True, slots=True)
class Direction:
    """The direction of a pass: the collection that it reads, and the one that it writes.

    Attributes:
        reading, writing: the same store, opened twice, because different threads read and write.
        second: the same collection as the first one, if the new vectors are next to the old ones.
        text: the path of the text in an item.
        vector: the name of the vector that is written, where items have several.
        is_flipped: applications may use the second collection.
        creates: create the second collection like the first one; otherwise it exists, possibly without a note.
        changed_at: the field with the time of each item's last change.
        max_deletions: the number of deletions in the first collection that the user accepts.
        restores: write items again that the second collection no longer has.
        command: the command that repeats the pass.
    """

    reading: MovableStore
    writing: MovableStore
    first: str
    second: str
    text: str
    vector: str | None
    is_flipped: bool
    creates: bool = True
    changed_at: str | None = None
    max_deletions: int = 0
    restores: bool = False
    command: str = "gateway move sync"

    @property
    def is_one(self) -> bool:
        """Items get a further vector, instead of copies."""
        return self.first == self.second

    def decide(self, first: Digest | None, second: Digest | None, base: Base) -> Action:
        """Return the action for an item, as `decisions.decide`."""
        is_shared = self.is_flipped and not self.is_one and not (self.restores and second is None)
        return decide(first, second, base, is_flipped=is_shared)

    @property
    def target(self) -> str:
        """The name of the target, in words."""
        return f"{self.second}, vector {self.vector}" if self.is_one else self.second


def sink_of(direction: Direction) -> Sink:
    """Return the sink of the second collection."""
    like = None if direction.is_one else direction.first
    options = SinkOptions(
        direction.text, direction.vector, adopts=not direction.creates, updates=direction.is_one, like=like
    )
    return direction.writing.sink(direction.second, options)
