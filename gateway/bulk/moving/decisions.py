"""What to do with an item, by its content in both collections and that of the last time they were equal. Pure.

Both collections may change: the first one until the last writer has switched to the second, the second one from then on.
So an item is taken over only if the move itself has written what the second collection has. It is a three-way merge, whose
base is what the move wrote last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from gateway.bulk.rows import RowId

Digest: TypeAlias = bytes
"""A hash of an item's payload, text included."""
SortKey: TypeAlias = tuple[int, int | str]


class Action(Enum):
    """What to do with an item."""

    NOTHING = "nothing"
    """Both are as they should be."""
    RECORD = "record"
    """Both have the same content: that is the new base."""
    WRITE = "write"
    """Embed the first collection's item, and write it into the second."""
    DELETE = "delete"
    """Delete it in the second collection, as it was in the first."""
    FORGET = "forget"
    """Neither has it any more."""
    KEEP = "keep"
    """The second collection has its own version, which the move must not touch."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the move wrote of an item.

    Attributes:
        written: that the second collection has for certain; ``None`` before the first time.
        pending: that it may have: a process may have ended while it wrote.
    """

    written: Digest | None = None
    pending: Digest | None = None


NEW = Base()


def decide(first: Digest | None, second: Digest | None, base: Base, *, is_flipped: bool) -> Action:
    """Return the action for an item.

    Args:
        first: the digest of the item in the collection that is read; ``None`` if it does not have the item.
        second: in the collection that is written.
        is_flipped: applications may use the second collection, so an item that it lacks was deleted there.
    """
    if first is None and second is None:
        # What a killed process sent last may arrive in the store later than this.
        return Action.FORGET if base.pending is None else Action.NOTHING
    if first is not None and first == second:
        return Action.NOTHING if base == Base(first) else Action.RECORD
    is_own = second in (base.written, base.pending) if second is not None else base.written is None
    if first is None:
        return Action.DELETE if is_own else Action.KEEP
    if second is None and not is_flipped:
        return Action.WRITE
    if first == base.written:
        # Only the second collection has changed.
        return Action.KEEP if second is not None or is_flipped else Action.WRITE
    return Action.WRITE if is_own else Action.KEEP


@dataclass(frozen=True, slots=True)
class Item:
    """An item of either collection, or of the base."""

    id: RowId
    first: Digest | None
    second: Digest | None
    base: Base


def merge(
    first: Iterator[tuple[RowId, Digest]],
    second: Iterator[tuple[RowId, Digest]],
    bases: Iterator[tuple[RowId, Base]],
    sort_key: Callable[[RowId], SortKey],
) -> Iterator[Item]:
    """Yield each item once. All three are in the order of ``sort_key``, and only one item of each is in memory."""
    streams: list[Iterator[tuple[RowId, Digest | Base]]] = [first, second, bases]
    heads = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        lowest = min((head for head in heads if head is not None), key=lambda head: sort_key(head[0]))
        found: list[Digest | Base | None] = [None, None, None]
        for number, head in enumerate(heads):
            if head is not None and sort_key(head[0]) == sort_key(lowest[0]):
                found[number] = head[1]
                heads[number] = next(streams[number], None)
        in_first, in_second, base = found
        yield Item(
            lowest[0],
            in_first if isinstance(in_first, bytes) else None,
            in_second if isinstance(in_second, bytes) else None,
            base if isinstance(base, Base) else NEW,
        )
