"""Compare the gateway with what one would use instead, side by side, and check its goals.

Infinity's own server, sentence-transformers in a loop, and the gateway's own encoder in a loop serve the bundled model in
turns (A B A B) on the same texts, none of which is sent twice to the same one; the table shows medians over the rounds,
and ratios are medians of the ratios of neighbors. The first run installs Infinity's server, with an environment of its
own, under ``build/``. Everything is bound to 127.0.0.1.

    python -m bench.compare              about 10 minutes
    python -m bench.compare --quick      two to three minutes: one short round
    python -m bench.compare --update     also writes the result into docs/performance.md
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol

import orjson

from bench.bare import BareLoop
from bench.load import Group, Load, LoadGenerator, Sample, raise_file_limit
from bench.machine import describe_machine
from bench.processes import RESULTS
from bench.report import Goal, goals_table, number, table, update_page
from bench.servers import (
    INFINITY,
    Server,
    clean_environ,
    install_infinity,
    start_debug_infinity,
    start_fake_gateway,
    start_gateway,
    start_gateway_float32,
    start_infinity,
)
from bench.stats import median, median_ratio, percentile
from bench.texts import Sentences

# More texts than any of these can take in a second; those of one run are made before it.
_MOST_TEXTS_PER_S = 3000
_SEED = 20
_LIMIT_S = 1200


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
    """What is measured."""

    name: str
    shapes: Sequence[Shape]

    def measure(self, shape: Shape, texts: Sequence[str], seconds: float) -> Sample:
        """Measure for so many seconds, with texts that are new to it."""


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
    """An encoder without a server: a text at a time, or as many at once as all clients have on their way."""

    name: str
    loop: BareLoop
    shapes: Sequence[Shape] = (SINGLE, FULL)

    def measure(self, shape: Shape, texts: Sequence[str], seconds: float) -> Sample:
        return self.loop.in_blocks(texts, seconds, shape.num_clients * shape.texts_per_request)


@dataclass(slots=True)
class Results:
    """The samples of each subject and shape, one a round, in the order of the rounds."""

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

GATEWAY = "gateway"
GATEWAY_FLOAT32 = "gateway, float32"
OUR_LOOP = "bare loop: our encoder"
THEIR_LOOP = "bare loop: sentence-transformers"
FAKE_GATEWAY = "gateway, no model"
FAKE_INFINITY = f"{INFINITY}, debug engine"
AS_BASE64 = ", base64"

# ----------------------------------------------------------------------------------------------------- measurements


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
                    _note(f"{shape}, {subject.name}: {number(sample.texts_per_s)} texts/s")
                    results.add(subject.name, shape, sample)
    return results


@dataclass(frozen=True, slots=True)
class Bulk:
    """One text at a time beside a bulk client: what the single client and the bulk client saw."""

    single: Sample
    bulk: Sample
    max_batch_tokens: int
    num_replicas: int

    @property
    def batch_ms(self) -> float:
        """How long a full batch takes while the queue is full; replicas compute side by side, each at its share."""
        num_tokens = max(1, self.single.num_tokens + self.bulk.num_tokens)
        return 1000 * self.max_batch_tokens * self.num_replicas * self.bulk.seconds / num_tokens


def run_bulk(subject: Served, bare: BareLoop, effort: Effort, sentences: Sentences) -> Bulk:
    """Send single texts while four requests of 256 are always on their way, ten or more batches."""
    count = round(_MOST_TEXTS_PER_S * effort.bulk_seconds)
    single, bulk = subject.load(
        effort.bulk_seconds, Group(1, 1, sentences.take(count // 10)), Group(4, 256, sentences.take(count))
    )
    return Bulk(single, bulk, bare.max_batch_tokens, bare.num_replicas)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Two bursts of very many clients, and the memory before, between and after."""

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


# ----------------------------------------------------------------------------------------------------------- report


@dataclass(slots=True)
class Findings:
    """Everything that was measured."""

    model: Results
    front_end: Results
    bulk: Bulk
    crowd: Crowd
    about: str

    def goals(self) -> list[Goal]:
        return [*self._goals_against_infinity(), *self._goals_against_limits()]

    def _goals_against_infinity(self) -> list[Goal]:
        def ratio(shape: Shape, subject: str = GATEWAY) -> float:
            return self.model.rate_ratio(subject, INFINITY, shape)

        return [
            Goal("throughput, 16 x 32, default against default", ">=", 4, "x", ratio(FULL)),
            Goal("throughput, 16 x 32, both float32", ">=", 1.5, "x", ratio(FULL, GATEWAY_FLOAT32)),
            Goal("many small requests, 16 x 1", ">=", 4, "x", ratio(Shape(16, 1))),
            Goal("many small requests, 64 x 1", ">=", 6, "x", ratio(Shape(64, 1))),
            Goal("one text, one client", ">=", 4, "x", ratio(SINGLE)),
            Goal(
                "front end alone, 16 x 32, 1,024 floats each",
                ">=",
                5,
                "x",
                self.front_end.rate_ratio(FAKE_GATEWAY, FAKE_INFINITY, FULL),
            ),
        ]

    def _goals_against_limits(self) -> list[Goal]:
        batch_ms = self.bulk.batch_ms
        single_ms = percentile(self.bulk.single.latencies_ms, 0.99)
        before, between, after = self.crowd.memory_mib
        num_failures = self.crowd.num_failures
        return [
            Goal(
                "one text, one client, p50 against the bare forward of that text",
                "<=",
                1.25,
                "x",
                self.model.p50_ratio(GATEWAY, OUR_LOOP, SINGLE),
            ),
            Goal(
                "full load, 16 x 32, share of the bare loop's throughput",
                ">=",
                0.85,
                "%",
                self.model.rate_ratio(GATEWAY, OUR_LOOP, FULL),
            ),
            Goal(
                "one text beside a bulk client: p99 against the time of a batch",
                "<=",
                3,
                "x",
                single_ms / batch_ms,
                note=f"{number(single_ms)} ms, a batch takes {number(batch_ms)} ms",
            ),
            Goal(
                "1,000 clients, twice: memory after the second time against the first",
                "<=",
                1.05,
                "x",
                after / between,
                note=f"{num_failures} errors but 429; {before:.0f}, {between:.0f}, {after:.0f} MiB",
                is_sound=num_failures == 0,
            ),
        ]

    def markdown(self, effort: Effort) -> str:
        """Return what the documentation shows."""
        rounds = f"medians of {effort.rounds} rounds of {effort.seconds:g} s" if effort.rounds > 1 else "one round"
        return "\n\n".join(
            (
                describe_machine(),
                self.about,
                f"### Goals\n\n{goals_table(self.goals())}",
                f"### Over HTTP: clients x texts, {rounds}\n\n{results_table(self.model, INFINITY)}",
                f"### Front end alone: 1,024 ready-made numbers a text\n\n{results_table(self.front_end, FAKE_INFINITY)}",
                "### One text beside a bulk client of 4 x 256\n\n" + _bulk_table(self.bulk),
                "### 1,000 clients of one text\n\n" + _crowd_table(self.crowd),
            )
        )

    def as_json(self) -> Mapping[str, object]:
        return {
            "machine": describe_machine(),
            "about": self.about,
            "goals": [{**asdict(goal), "is_met": goal.is_met} for goal in self.goals()],
            "model": self.model.as_json(),
            "front_end": self.front_end.as_json(),
            "bulk": asdict(self.bulk),
            "crowd": asdict(self.crowd),
        }


def results_table(results: Results, reference: str) -> str:
    """Return the medians of each shape and subject, with the throughput in multiples of the reference's."""
    rows = []
    for (subject, shape), samples in sorted(results.samples.items(), key=lambda item: SHAPES.index(item[0][1])):
        is_server = not subject.startswith("bare loop")
        rows.append(
            (
                str(shape),
                subject,
                number(median([sample.requests_per_s for sample in samples])) if is_server else "",
                number(median(results.rates(subject, shape))),
                number(median(results.percentiles(subject, shape, 0.5))),
                number(median(results.percentiles(subject, shape, 0.99))),
                number(results.rate_ratio(subject, reference, shape)),
                _failures(samples) if is_server else "",
            )
        )
    header = ("load", "", "requests/s", "texts/s", "p50, ms", "p99, ms", f"x {reference}", "failures")
    return table(header, rows)


def _bulk_table(bulk: Bulk) -> str:
    return table(
        ("", "p50, ms", "p99, ms", "texts/s", "failures"),
        [
            (
                name,
                number(percentile(sample.latencies_ms, 0.5)),
                number(percentile(sample.latencies_ms, 0.99)),
                number(sample.texts_per_s),
                _failures([sample]),
            )
            for name, sample in (("one text", bulk.single), ("bulk", bulk.bulk))
        ]
        + [(f"a batch of {bulk.max_batch_tokens:,} tokens", number(bulk.batch_ms), "", "", "")],
    )


def _crowd_table(crowd: Crowd) -> str:
    return table(
        ("", "texts/s", "p50, ms", "p99, ms", "failures", "memory after, MiB"),
        [("before", "", "", "", "", f"{crowd.memory_mib[0]:.0f}")]
        + [
            (
                name,
                number(burst.texts_per_s),
                number(percentile(burst.latencies_ms, 0.5)),
                number(percentile(burst.latencies_ms, 0.99)),
                _failures([burst]),
                f"{memory:.0f}",
            )
            for name, burst, memory in zip(
                ("first time", "second time"), crowd.bursts, crowd.memory_mib[1:], strict=True
            )
        ],
    )


def _failures(samples: Sequence[Sample]) -> str:
    counts: dict[str, int] = {}
    for sample in samples:
        for status, count in sample.failures.items():
            counts[status] = counts.get(status, 0) + count
    return ", ".join(f"{count} of {status}" for status, count in sorted(counts.items())) or "0"


# -------------------------------------------------------------------------------------------------------------- main


def compare(effort: Effort) -> Findings:
    """Start everything, measure it, and end it."""
    install_infinity()
    sentences = Sentences(_SEED)
    with ExitStack() as running:
        generator = running.enter_context(LoadGenerator(clean_environ()))
        _note("starting: the servers")
        infinity = Served(INFINITY, running.enter_context(start_infinity()), generator)
        gateway = Served(GATEWAY, running.enter_context(start_gateway()), generator)
        float32 = Served(GATEWAY_FLOAT32, running.enter_context(start_gateway_float32()), generator)
        _note("starting: the bare loops")
        ours = running.enter_context(BareLoop("gateway", clean_environ()))
        theirs = running.enter_context(BareLoop("sentence-transformers", clean_environ(), ours.num_threads))
        subjects = (infinity, gateway, float32, Bare(OUR_LOOP, ours), Bare(THEIR_LOOP, theirs))
        model = run_rounds(subjects, SHAPES, effort, sentences)
        _note("one text beside a bulk client")
        bulk = run_bulk(gateway, ours, effort, sentences)
        _note("1,000 clients")
        crowd = run_crowd(gateway, effort, sentences)
    return Findings(
        model=model,
        front_end=_compare_front_ends(effort, sentences),
        bulk=bulk,
        crowd=crowd,
        about=(
            f"all-MiniLM-L6-v2, sentences of 3 to 60 words. Gateway: {ours.about}, {_count_threads(ours)}. "
            f"{INFINITY} and sentence-transformers: float32; the former with its own defaults, the latter with as many "
            "threads as the gateway."
        ),
    )


def _count_threads(loop: BareLoop) -> str:
    return (
        "1 thread"
        if loop.num_threads == 1
        else f"{loop.num_threads} threads for {loop.num_replicas} forward(s) at a time"
    )


def _compare_front_ends(effort: Effort, sentences: Sentences) -> Results:
    with ExitStack() as running:
        generator = running.enter_context(LoadGenerator(clean_environ()))
        _note("starting: the servers without a model")
        infinity, gateway = (running.enter_context(start()) for start in (start_debug_infinity, start_fake_gateway))
        subjects = [
            Served(name + suffix, server, generator, repeats=True, encoding=encoding, shapes=shapes)
            for encoding, suffix, shapes in (("float", "", (Shape(16, 1), FULL)), ("base64", AS_BASE64, (FULL,)))
            for name, server in ((FAKE_INFINITY, infinity), (FAKE_GATEWAY, gateway))
        ]
        return run_rounds(subjects, (Shape(16, 1), FULL), effort, sentences)


def _note(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr)


@contextmanager
def bounded(limit_s: int) -> Iterator[None]:
    """End what runs inside, in order, when the time is up or the process is told to stop."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Results in full: bench/results/compare-*.json"
    )
    parser.add_argument("--quick", action="store_true", help="one short round: two to three minutes, and less certain")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--limit-s", type=int, default=_LIMIT_S, help="stop after so many seconds (%(default)s)")
    options = parser.parse_args()
    effort = QUICK_EFFORT if options.quick else FULL_EFFORT
    raise_file_limit()
    with bounded(options.limit_s):
        findings = compare(effort)
    path = RESULTS / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_bytes(orjson.dumps({"effort": asdict(effort), **findings.as_json()}))
    markdown = findings.markdown(effort)
    print(markdown)
    if options.update:
        update_page("bench.compare", markdown)


if __name__ == "__main__":
    main()
