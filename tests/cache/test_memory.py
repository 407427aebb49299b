"""The memory has a limit for all requests of clients, and used entries stay."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from gateway.cache.memory import ENTRY_BYTES, MemoryStore


def key(number: int) -> bytes:
    return number.to_bytes(24, "big")


def test_the_entry_that_was_not_used_for_longest_goes_first() -> None:
    store = MemoryStore(10 * (24 + 100 + ENTRY_BYTES))
    for number in range(10):
        store.put(key(number), bytes(100))
    assert store.get(key(0)) == bytes(100)
    store.put(key(1), bytes(50))
    store.put(key(10), bytes(120))
    assert [number for number in range(11) if store.get(key(number)) is not None] == [0, 1, *range(3, 11)]


def test_one_client_cannot_fill_it_beyond_its_limit() -> None:
    limit, changes = 100_000, list[int]()
    store = MemoryStore(limit, lambda change, _num_evicted: changes.append(change))
    chance = random.Random(1)
    for _ in range(2000):
        store.put(key(chance.randrange(500)), bytes(chance.choice([1, 100, 5_000, 50_000])))
        assert store.num_bytes <= limit
        assert sum(changes) == store.num_bytes
    assert store.num_bytes > limit * 0.8
    store.clear()
    assert (len(store), store.num_bytes, sum(changes)) == (0, 0, 0)


def test_an_entry_that_would_take_the_place_of_many_is_not_kept() -> None:
    store = MemoryStore(8 * 1000)
    store.put(key(1), bytes(1000 - 24 - ENTRY_BYTES))
    store.put(key(2), bytes(1001 - 24 - ENTRY_BYTES))
    assert (store.get(key(1)) is None, store.get(key(2)) is None) == (False, True)


GROWTH = """
import sys
from gateway.cache.memory import MemoryStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

size, number = map(int, sys.argv[1:])
store = MemoryStore(2**40)
before = resident()
for i in range(number):
    store.put(i.to_bytes(24, "big"), bytes(size))
print((resident() - before) / store.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("size", "number"), [(40, 90_000), (1540, 90_000), (1540, 60_000)])
def test_the_process_grows_by_no_more_than_it_counts(size: int, number: int) -> None:
    """90,000 entries are just beyond a growth of the table."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(size), str(number)], capture_output=True, text=True, check=True
    )
    assert 0.5 < float(done.stdout) < 1.02
