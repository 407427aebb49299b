"""The result of each request, by second and target: small enough to send from workers, exact enough for percentiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from loadtest.histogram import bucket_of

STAGES = ("tokenize", "queue", "inference", "total")
"""The stages that an answer's ``server-timing`` names."""

Key: TypeAlias = tuple[int, str]
"""Second since the epoch, label of the target."""


@dataclass(slots=True)
class Tally:
    """Some requests.

    Attributes:
        offered: how many were to be sent; those that were not sent, or not answered yet, are in no other figure.
        latencies: of those that were answered right; counted from when they were to be sent.
        failures: the others, by cause.
        client_ms: sum of the latencies; the stages are sums as well, over ``num_timed`` answers that named them.
    """

    offered: int = 0
    latencies: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    tokens: int = 0
    client_ms: float = 0.0
    num_timed: int = 0
    stages_ms: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> int:
        """How many were answered right."""
        return self.latencies.total()

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def fail_ratio(self) -> float:
        """The share of failures among all that came to an end; 0 when none has."""
        ended = self.answered + self.failed
        return self.failed / ended if ended else 0.0

    def add(self, other: Tally) -> Self:
        """Take in the counts of another."""
        self.offered += other.offered
        self.latencies.update(other.latencies)
        self.failures.update(other.failures)
        self.texts += other.texts
        self.tokens += other.tokens
        self.client_ms += other.client_ms
        self.num_timed += other.num_timed
        self.stages_ms.update(other.stages_ms)
        return self

    def stage_ms(self, stage: str) -> float:
        """Return the mean time of a stage in milliseconds; 0 when no answer named it."""
        return self.stages_ms[stage] / self.num_timed if self.num_timed else 0.0


class Recorder:
    """Tallies by second and target."""

    def __init__(self) -> None:
        self._tallies: dict[Key, Tally] = {}

    def offer(self, second: int, label: str) -> None:
        """Count a request that is about to be sent."""
        self._at(second, label).offered += 1

    def answer(
        self, second: int, label: str, *, milliseconds: float, texts: int, tokens: int, stages_ms: Mapping[str, float]
    ) -> None:
        """Count a request that was answered right."""
        tally = self._at(second, label)
        tally.latencies[bucket_of(milliseconds)] += 1
        tally.client_ms += milliseconds
        tally.texts += texts
        tally.tokens += tokens
        if stages_ms:
            tally.num_timed += 1
            tally.stages_ms.update({stage: stages_ms.get(stage, 0.0) for stage in STAGES})

    def fail(self, second: int, label: str, cause: str) -> None:
        """Count a request that was not answered, or not right."""
        self._at(second, label).failures[cause] += 1

    def seconds(self, label: str) -> dict[int, Tally]:
        """Return the tally of a target for each second."""
        return {second: tally for (second, of), tally in sorted(self._tallies.items()) if of == label}

    def between(self, label: str, start: float, end: float) -> Tally:
        """Return the tally of a target over the whole seconds from ``start`` to ``end``, since the epoch."""
        return total(tally for second, tally in self.seconds(label).items() if start <= second and second + 1 <= end)

    def take(self) -> list[list[Any]]:
        """Return everything since the last call, in a form for any serializer, and start again from nothing."""
        taken = [
            [
                *key,
                [t.offered, dict(t.latencies), dict(t.failures), t.texts, t.tokens, t.client_ms, t.num_timed],
                dict(t.stages_ms),
            ]
            for key, t in self._tallies.items()
        ]
        self._tallies = {}
        return taken

    def merge(self, taken: Iterable[list[Any]]) -> None:
        """Add the data of another recorder."""
        for second, label, counts, stages in taken:
            offered, latencies, failures, texts, tokens, client_ms, num_timed = counts
            # Keys of mappings may have become texts on the way.
            buckets = Counter({int(bucket): count for bucket, count in latencies.items()})
            tally = Tally(offered, buckets, Counter(failures), texts, tokens, client_ms, num_timed, Counter(stages))
            self._at(second, label).add(tally)

    def _at(self, second: int, label: str) -> Tally:
        return self._tallies.setdefault((second, label), Tally())


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of some tallies."""
    summed = Tally()
    for tally in tallies:
        summed.add(tally)
    return summed
