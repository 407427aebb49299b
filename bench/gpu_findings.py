"""The figures of a graphics card, the goals, and the tables for the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.machine import describe_machine
from bench.report import Goal, goals_table, number, table
from bench.stats import median


@dataclass(frozen=True, slots=True)
class Throughput:
    """Texts of one length, or of mixed ones.

    Attributes:
        tflops: the operations that the texts need, divided by their time.
        padded_tokens_per_s: of padded batches of 32 texts; NaN when they do not fit.
        ratio: to those.
        even_tokens_per_s: of padded batches with as many tokens as ours.
        padding: of the padded batches of 32, as a share of the real tokens.
        cosine: the smallest between our vectors and those of the padded batches.
        peak_mib: the peak of the allocated memory, with our model alone on the card.
    """

    lengths: str
    texts_per_s: float
    tokens_per_s: float
    tflops: float
    padded_tokens_per_s: float
    ratio: float
    even_tokens_per_s: float
    padding: float
    cosine: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Latency:
    """One request by itself, from token ids to vectors on the CPU.

    Attributes:
        busy_p50_ms: next to a thread that runs Python 60 % of the time; so is ``busy_p99_ms``.
    """

    count: int
    length: int
    p50_ms: float
    p99_ms: float
    busy_p50_ms: float
    busy_p99_ms: float


@dataclass(frozen=True, slots=True)
class Outputs:
    """Other outputs of the same forward.

    Attributes:
        cost: the time that they add to dense vectors, as a share of the time of these.
    """

    what: str
    length: int
    tokens_per_s: float
    cost: float


@dataclass(frozen=True, slots=True)
class Tasks:
    """Texts with tasks.

    Attributes:
        one_tflops: all texts have one task, whose weights are merged; ``five_tflops``: five tasks are mixed.
        adapted_tflops: one task, with its adapter next to the weights.
        cosine: the smallest between merged weights and adapters.
    """

    length: int
    one_tflops: float
    five_tflops: float
    adapted_tflops: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """The measurements of one model in one precision.

    Attributes:
        matmul_tflops: of a large square product, before and after.
        states: of the card, before and after.
    """

    name: str
    dtype: str
    runtime: str
    matmul_tflops: tuple[float, float]
    states: tuple[str, str]
    throughput: Sequence[Throughput]
    latency: Sequence[Latency]
    outputs: Sequence[Outputs]
    tasks: Sequence[Tasks]

    def share(self, tflops: float) -> float:
        """Return a rate as a share of the card's own for a large product: the mean of before and after."""
        return 2 * tflops / sum(self.matmul_tflops)

    def goals(self) -> list[Goal]:
        name = f"{self.name}, {self.dtype}"
        long = [row for row in self.throughput if row.lengths != "mixed" and int(row.lengths) >= 64]
        goals = []
        if self.tasks:
            rows = [row for row in self.tasks if row.length >= 64]
            for what, target, key in (("one task", 0.7, "one_tflops"), ("five tasks mixed", 0.6, "five_tflops")):
                worst = self.share(min((getattr(row, key) for row in rows), default=math.nan))
                goals.append(
                    Goal(f"{name}: {what}, 64 tokens and more, share of the matmul rate", ">=", target, "%", worst)
                )
        else:
            worst = self.share(min((row.tflops for row in long), default=math.nan))
            goals.append(Goal(f"{name}: 64 tokens and more, share of the matmul rate", ">=", 0.78, "%", worst))
        one, many = (next((row for row in self.latency if row.count == count), None) for count in (1, 32))
        if one is not None and many is not None:
            goals.append(Goal(f"{name}: one short text", "<=", 2.5, "ms", one.p50_ms))
            goals.append(Goal(f"{name}: the same next to a busy thread", "<=", 2, "x", one.busy_p50_ms / one.p50_ms))
            goals.append(Goal(f"{name}: 32 texts, against one", "<=", 3, "x", many.p50_ms / one.p50_ms))
        mixed = self.throughput[-1].ratio
        goals.append(Goal(f"{name}: mixed lengths, against padded batches of 32", ">=", 2, "x", mixed))
        sparse = [row.cost for row in self.outputs if row.what == "sparse" and row.length == 64]
        if self.outputs:
            goals.append(Goal(f"{name}: sparse output, 64 tokens", "<=", 0.1, "%", median(sparse)))
        return goals


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured.

    Attributes:
        matmul_tflops: of the products of a layer and a large square one, by shape, by precision.
    """

    device: str
    matmul_tflops: Mapping[str, Mapping[str, float]]
    models: Sequence[ModelFindings]

    def goals(self) -> list[Goal]:
        return [goal for model in self.models for goal in model.goals()]

    def markdown(self) -> str:
        """Return the tables for the documentation."""
        return "\n\n".join(
            (
                f"{self.device}; {describe_machine()}",
                f"### Goals\n\n{goals_table(self.goals())}",
                f"### Matrix products alone, TFLOP/s\n\n{self._matmul_table()}",
                *(model_report(model) for model in self.models),
            )
        )

    def _matmul_table(self) -> str:
        dtypes = list(self.matmul_tflops)
        shapes = self.matmul_tflops[dtypes[0]]
        return table(
            ("rows x inner x columns", *dtypes),
            [(shape, *(number(self.matmul_tflops[dtype][shape]) for dtype in dtypes)) for shape in shapes],
        )


def model_report(model: ModelFindings) -> str:
    """Return the tables of one model."""
    before, after = model.matmul_tflops
    states = "; ".join(f"{when}: {state}" for when, state in zip(("before", "after"), model.states, strict=True))
    parts = [
        f"### {model.name}, {model.dtype}, {model.runtime}",
        f"A large product: {number(before)} TFLOP/s before, {number(after)} after. Card {states}.",
        _throughput_table(model),
        _latency_table(model),
    ]
    if model.outputs:
        rows = [(row.what, str(row.length), number(row.tokens_per_s), f"{row.cost:.1%}") for row in model.outputs]
        parts.append(table(("next to dense", "tokens per text", "tokens/s", "added time"), rows))
    if model.tasks:
        parts.append(_tasks_table(model))
    return "\n\n".join(parts)


def _throughput_table(model: ModelFindings) -> str:
    ours = ("tokens per text", "texts/s", "tokens/s", "TFLOP/s", "of matmul")
    return table(
        (*ours, "padded by 32, tokens/s", "x padded", "padded, equal tokens", "padding", "cosine", "peak, MiB"),
        [
            (
                row.lengths,
                number(row.texts_per_s),
                number(row.tokens_per_s),
                number(row.tflops),
                f"{model.share(row.tflops):.0%}",
                number(row.padded_tokens_per_s),
                number(row.ratio),
                number(row.even_tokens_per_s),
                f"{row.padding:.1%}",
                f"{row.cosine:.6f}",
                number(row.peak_mib),
            )
            for row in model.throughput
        ],
    )


def _latency_table(model: ModelFindings) -> str:
    return table(
        ("one request", "p50, ms", "p99, ms", "next to a busy thread: p50", "p99"),
        [
            (
                f"{row.count} x {row.length} tokens",
                *map(number, (row.p50_ms, row.p99_ms, row.busy_p50_ms, row.busy_p99_ms)),
            )
            for row in model.latency
        ],
    )


def _tasks_table(model: ModelFindings) -> str:
    return table(
        ("tokens per text", "one task, of matmul", "five tasks mixed", "one task, not merged", "cosine of the two"),
        [
            (
                str(row.length),
                *(f"{model.share(rate):.0%}" for rate in (row.one_tflops, row.five_tflops, row.adapted_tflops)),
                f"{row.cosine:.6f}",
            )
            for row in model.tasks
        ],
    )
