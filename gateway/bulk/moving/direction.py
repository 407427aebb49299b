"""The direction of a pass, and its counts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from gateway.bulk.rows import RowId, Sink
from gateway.bulk.stores.protocol import MovableStore, SinkOptions

MAX_NAMED: Final = 20
"""The maximum number of items that a pass names."""


@dataclass(slots=True)
class PassCounts:
    """The items that a pass found, and its changes.

    Attributes:
        items: the items of both collections.
        written: new and changed items that were embedded.
        deleted: items deleted from the second collection.
        equal: items that both collections already had.
        kept: items of the second collection that the move did not write, or that were changed there since.
        refused: items without a text, with a text that the model rejects, or that the second collection cannot store.
        kept_ids: the ids of some items that were kept.
        newer_ids: the ids of the items that applications changed after the pass read them.
        problems: some refused items, each as its id and the problem.
    """

    items: int = 0
    written: int = 0
    deleted: int = 0
    equal: int = 0
    kept: int = 0
    refused: int = 0
    kept_ids: list[RowId] = field(default_factory=list)
    newer_ids: set[RowId] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def keep(self, ids: Collection[RowId]) -> None:
        """Count items that were kept."""
        self.kept += len(ids)
        self.kept_ids += islice(ids, MAX_NAMED - len(self.kept_ids))

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

    @property
    def is_one(self) -> bool:
        """Items get a further vector, instead of copies."""
        return self.first == self.second

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
