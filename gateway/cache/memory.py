"""Entries in memory, within a limit; the least recently used entry is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

# The cost of an entry besides the bytes of its key and value: two objects, a list node, a share of the growing table,
# and the allocator's rounding. A test measures it.
ENTRY_BYTES = 256


class MemoryStats(NamedTuple):
    """The content of a store."""

    num_entries: int
    num_bytes: int


class MemoryStore:
    """Bytes by key, the least recently used first.

    An ``OrderedDict`` is enough. The library cachetools would keep the sizes of entries in a second dictionary, for 100
    bytes each, although the entries know their sizes.

    Args:
        max_bytes: the limit of all entries, including Python's overhead. An entry larger than an eighth of it is not
            stored.
        on_change: called with the change in bytes, and the number of dropped entries.
    """

    def __init__(
        self, max_bytes: int, on_change: Callable[[int, int], None] = lambda _change, _num_evicted: None
    ) -> None:
        self._max_bytes = max_bytes
        self._on_change = on_change
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self.num_bytes = 0

    def holds(self, num_bytes: int) -> bool:
        """Return whether an entry of this many bytes, with its key, is stored at all."""
        return num_bytes + ENTRY_BYTES <= self._max_bytes // 8

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        """Return an entry, and mark it as the most recently used."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Store an entry, dropping others until there is room."""
        if not self.holds(len(key) + len(value)):
            return
        before, num_evicted = self.num_bytes, 0
        if (old := self._entries.pop(key, None)) is not None:
            self.num_bytes -= _size(key, old)
        self._entries[key] = value
        self.num_bytes += _size(key, value)
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _size(*self._entries.popitem(last=False))
            num_evicted += 1
        self._on_change(self.num_bytes - before, num_evicted)

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self._on_change(-self.num_bytes, 0)
        self.num_bytes = 0


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
