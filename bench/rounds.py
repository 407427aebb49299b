"""Measure servers and loops in rounds: the subjects, the shapes of their requests, and the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from bench.bare import BareLoop
from bench.load import Group, Load, LoadGenerator, Sample
from bench.report import note, number
from bench.servers import Server
from bench.stats import median_ratio, percentile
from bench.texts import Sentences

# More texts per second than any subject can take; those of a run are made before it starts.
_MOST_TEXTS_PER_S = 3000


@dataclass(frozen=True, slots=True)
class Shape:
    """How many clients send how many texts in each request."""

    num_clients: int
    texts_per_request: int

    def __str__(self) -> str:
        return f"{self.num_clients} x {self.texts_per_request}"


SINGLE = Shape(1, 1)
FULL = Shape(16, 32)
SHAPES = (SINGLE, Shape(1, 32), Shape(16, 1), Shape(64, 1), FULL)


class Subject(Protocol):
    """Anything that can be measured."""

    name: str
    shapes: Sequence[Shape]

    def measure(self, shape: Shape, texts: Sequence[str], seconds: float) -> Sample:
        """Measure for this many seconds, with texts that are new to the subject."""


@dataclass(slots=True)
class Served:
    """A server under load."""

    name: str
    server: Server
    generator: LoadGenerator
    repeats: bool = False
    encoding: str = "float"
    shapes: Sequence[Shape] = SHAPES

    def measure(self, shape: Shape, texts: Sequence[str], seconds: float) -> Sample:
        [sample] = self.load(seconds, Group(shape.num_clients, shape.texts_per_request, texts, self.repeats))
        return sample

    def load(self, seconds: float, *groups: Group) -> list[Sample]:
        server = self.server
        return self.generator.run(Load(server.port, server.path, server.model, seconds, groups, self.encoding))


@dataclass(slots=True)
class Bare:
    """An encoder without a server: one text at a time, or as many as all clients send at once."""

    name: str
    loop: BareLoop
    shapes: Sequence[Shape] = (SINGLE, FULL)

    def measure(self, shape: Shape, texts: Sequence[str], seconds: float) -> Sample:
        return self.loop.in_blocks(texts, seconds, shape.num_clients * shape.texts_per_request)


@dataclass(slots=True)
class Results:
    """The samples of each subject and shape, one per round."""

    samples: dict[tuple[str, Shape], list[Sample]] = field(default_factory=dict)

    def add(self, subject: str, shape: Shape, sample: Sample) -> None:
        self.samples.setdefault((subject, shape), []).append(sample)

    def rates(self, subject: str, shape: Shape) -> list[float]:
        return [sample.texts_per_s for sample in self.samples[subject, shape]]

    def percentiles(self, subject: str, shape: Shape, share: float) -> list[float]:
        return [percentile(sample.latencies_ms, share) for sample in self.samples[subject, shape]]

    def rate_ratio(self, subject: str, reference: str, shape: Shape) -> float:
        return median_ratio(self.rates(subject, shape), self.rates(reference, shape))

    def p50_ratio(self, subject: str, reference: str, shape: Shape) -> float:
        return median_ratio(self.percentiles(subject, shape, 0.5), self.percentiles(reference, shape, 0.5))

    def as_json(self) -> list[Mapping[str, object]]:
        return [
            {"subject": subject, "shape": str(shape), "rounds": [asdict(sample) for sample in samples]}
            for (subject, shape), samples in self.samples.items()
        ]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    bulk_seconds: float
    crowd_seconds: float


FULL_EFFORT = Effort(rounds=3, seconds=4.0, bulk_seconds=12.0, crowd_seconds=8.0)
QUICK_EFFORT = Effort(rounds=1, seconds=1.5, bulk_seconds=5.0, crowd_seconds=3.0)


def run_rounds(subjects: Sequence[Subject], shapes: Sequence[Shape], effort: Effort, sentences: Sentences) -> Results:
    """Measure each shape in rounds, the subjects of a round one after the other on the same texts."""
    results = Results()
    count = round(_MOST_TEXTS_PER_S * effort.seconds)
    for shape in shapes:
        for turn in range(effort.rounds + 1):
            is_warm_up = turn == 0
            texts = sentences.take(count if not is_warm_up else max(64, shape.num_clients * shape.texts_per_request))
            for subject in subjects:
                if shape not in subject.shapes:
                    continue
                sample = subject.measure(shape, texts, effort.seconds)
                if not is_warm_up:
                    note(f"{shape}, {subject.name}: {number(sample.texts_per_s)} texts/s")
                    results.add(subject.name, shape, sample)
    return results


@dataclass(frozen=True, slots=True)
class Bulk:
    """The samples of a client with single texts, and of the bulk client next to it."""

    single: Sample
    bulk: Sample
    max_batch_tokens: int
    num_replicas: int

    @property
    def batch_ms(self) -> float:
        """The time of a full batch while the queue is full, in milliseconds; replicas share the machine."""
        num_tokens = max(1, self.single.num_tokens + self.bulk.num_tokens)
        return 1000 * self.max_batch_tokens * self.num_replicas * self.bulk.seconds / num_tokens


def run_bulk(subject: Served, bare: BareLoop, effort: Effort, sentences: Sentences) -> Bulk:
    """Send single texts while four requests of 256 texts are always in flight: ten batches or more."""
    count = round(_MOST_TEXTS_PER_S * effort.bulk_seconds)
    single, bulk = subject.load(
        effort.bulk_seconds, Group(1, 1, sentences.take(count // 10)), Group(4, 256, sentences.take(count))
    )
    return Bulk(single, bulk, bare.max_batch_tokens, bare.num_replicas)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Two bursts of 1,000 clients, and the memory before, between and after them."""

    bursts: Sequence[Sample]
    memory_mib: Sequence[float]

    @property
    def num_failures(self) -> int:
        return sum(count for burst in self.bursts for status, count in burst.failures.items() if status != "429")


def run_crowd(subject: Served, effort: Effort, sentences: Sentences) -> Crowd:
    """Send single texts from 1,000 connections at once."""
    bursts, memory = [], [subject.server.memory_mib]
    for _ in range(2):
        texts = sentences.take(round(_MOST_TEXTS_PER_S * effort.crowd_seconds))
        bursts += subject.load(effort.crowd_seconds, Group(1000, 1, texts))
        memory.append(subject.server.memory_mib)
    return Crowd(bursts, memory)
