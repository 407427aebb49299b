"""The figures of a comparison, its goals, and the tables for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.load import Sample
from bench.machine import describe_machine
from bench.report import Goal, goals_table, number, table
from bench.rounds import FULL, SHAPES, SINGLE, Bulk, Crowd, Effort, Results, Shape
from bench.servers import INFINITY
from bench.stats import median, percentile

GATEWAY = "gateway"
GATEWAY_FLOAT32 = "gateway, float32"
OUR_LOOP = "bare loop: our encoder"
THEIR_LOOP = "bare loop: sentence-transformers"
FAKE_GATEWAY = "gateway, no model"
FAKE_INFINITY = f"{INFINITY}, debug engine"
AS_BASE64 = ", base64"


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
            Goal("throughput, 16 x 32, default against default", ">=", 6, "x", ratio(FULL)),
            Goal("throughput, 16 x 32, both float32", ">=", 2, "x", ratio(FULL, GATEWAY_FLOAT32)),
            Goal("many small requests, 16 x 1", ">=", 5, "x", ratio(Shape(16, 1))),
            Goal("many small requests, 64 x 1", ">=", 8, "x", ratio(Shape(64, 1))),
            Goal("one text, one client", ">=", 4, "x", ratio(SINGLE)),
            Goal(
                "front end alone, 16 x 32, 1,024 floats each",
                ">=",
                5,
                "x",
                self.front_end.rate_ratio(FAKE_GATEWAY, FAKE_INFINITY, FULL),
            ),
            Goal(
                "front end alone, 16 x 32, as base64 against its numbers",
                ">=",
                8,
                "x",
                self.front_end.rate_ratio(FAKE_GATEWAY + AS_BASE64, FAKE_INFINITY, FULL),
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
                1.35,
                "x",
                self.model.p50_ratio(GATEWAY, OUR_LOOP, SINGLE),
            ),
            Goal(
                "full load, 16 x 32, share of the bare loop's throughput",
                ">=",
                0.9,
                "%",
                self.model.rate_ratio(GATEWAY, OUR_LOOP, FULL),
            ),
            Goal(
                "one text next to a bulk client: p99 against the time of a batch",
                "<=",
                3,
                "x",
                single_ms / batch_ms,
                note=f"{number(single_ms)} ms, a batch takes {number(batch_ms)} ms",
                is_sound=not self.bulk.bulk.failures and batch_ms > 0,
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
        """Return the tables for the documentation."""
        rounds = f"medians of {effort.rounds} rounds of {effort.seconds:g} s" if effort.rounds > 1 else "one round"
        return "\n\n".join(
            (
                describe_machine(),
                self.about,
                f"### Goals\n\n{goals_table(self.goals())}",
                f"### Over HTTP: clients x texts, {rounds}\n\n{results_table(self.model, INFINITY)}",
                f"### Front end alone: 1,024 ready-made numbers per text\n\n{results_table(self.front_end, FAKE_INFINITY)}",
                "### One text next to a bulk client of 4 x 256\n\n" + _bulk_table(self.bulk),
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
