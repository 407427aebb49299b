"""The requests of each kind of user. Pure.

A user's turn is a few requests, each sent when the one before is answered. In open arrivals a turn begins when its time has
come, whether or not those before it have ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from loadtest.texts import Texts


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        kind: its name in tables.
        task: sent where the target has tasks.
    """

    kind: str
    texts: Sequence[str]
    task: str


Turn: TypeAlias = Iterator[Ask]


def search(texts: Texts, _random: random.Random) -> Turn:
    """A search: one short text."""
    yield Ask("search", [texts.query()], "retrieval.query")


def memory(texts: Texts, rng: random.Random) -> Turn:
    """A conversation stored by Mem0: a search, then a burst of facts, each in a separate request."""
    yield Ask("recall", [texts.sentence()], "retrieval.query")
    for _ in range(rng.randint(2, 8)):
        yield Ask("remember", [texts.sentence()], "retrieval.passage")


def ingest(texts: Texts, rng: random.Random) -> Turn:
    """Documents are brought in: 32 passages of mixed lengths, and now and then 256."""
    size = 256 if rng.random() < 0.1 else 32
    yield Ask(f"ingest {size}", [texts.passage() for _ in range(size)], "retrieval.passage")


def mixed(texts: Texts, rng: random.Random) -> Turn:
    """Many search, some remember, a few bring documents in."""
    draw = rng.random()
    yield from (search if draw < 0.75 else memory if draw < 0.95 else ingest)(texts, rng)


WORKLOADS: Final[Mapping[str, Callable[[Texts, random.Random], Turn]]] = {
    "search": search,
    "memory": memory,
    "ingest": ingest,
    "mixed": mixed,
}
