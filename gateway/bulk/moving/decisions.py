"""Choose the action for an item, by its content in both collections and at the time when they were last equal. Pure.

Both collections may change: the first until the last writer has switched to the second, and the second from then on. So
an item is overwritten only if the move itself wrote the second collection's version. This is a three-way merge; its
base is the content that the move wrote last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypeVar

from gateway.bulk.rows import RowId, closing_readings

T = TypeVar("T")
Digest: TypeAlias = bytes
"""A hash of an item's payload, text included."""
SortKey: TypeAlias = tuple[int, int | str]


class Action(Enum):
    """The action for an item."""

    NOTHING = "nothing"
    """Do nothing: both collections are up to date."""
    RECORD = "record"
    """Record the content, which both collections have, as the new base."""
    WRITE = "write"
    """Embed the first collection's item, and write it into the second."""
    DELETE = "delete"
    """Delete the item from the second collection, because it was deleted from the first."""
    FORGET = "forget"
    """Forget the item, because neither collection has it any longer."""
    KEEP = "keep"
    """Keep the second collection's own version, which the move must not touch."""


@dataclass(frozen=True, slots=True)
class Base:
    """The content of an item that the move wrote.

    Attributes:
        written: the digest that the second collection certainly has; ``None`` before the first write.
        pending: the digests that it may have: several processes may have ended while they wrote.
    """

    written: Digest | None = None
    pending: frozenset[Digest] = frozenset()


NEW = Base()


def decide(first: Digest | None, second: Digest | None, base: Base, *, is_flipped: bool) -> Action:
    """Return the action for an item.

    Args:
        first: the digest of the item in the collection that is read; ``None`` if it does not have the item.
        second: the digest of the item in the collection that is written.
        is_flipped: applications may use the second collection, so an item missing there was deleted there.
    """
    if first is None and second is None:
        # The last request of a killed process may still reach the store after this.
        return Action.NOTHING if base.pending else Action.FORGET
    if first is not None and first == second:
        return Action.NOTHING if base == Base(first) else Action.RECORD
    is_own = second in (base.written, *base.pending) if second is not None else base.written is None
    if first is None:
        return Action.DELETE if is_own else Action.KEEP
    if second is None and not is_flipped:
        return Action.WRITE
    if first == base.written and second not in base.pending:
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
    streams: Sequence[Iterator[tuple[RowId, T]]], sort_key: Callable[[RowId], SortKey]
) -> Iterator[tuple[RowId, list[T | None]]]:
    """Yield each id once, with the item of each stream.

    All streams are in the order of ``sort_key``, and only one item of each is in memory.
    """
    with closing_readings(*streams):
        heads = [next(stream, None) for stream in streams]
        while any(head is not None for head in heads):
            lowest = min((head[0] for head in heads if head is not None), key=sort_key)
            found: list[T | None] = [None] * len(heads)
            for number, head in enumerate(heads):
                if head is not None and sort_key(head[0]) == sort_key(lowest):
                    found[number] = head[1]
                    heads[number] = next(streams[number], None)
            yield lowest, found
