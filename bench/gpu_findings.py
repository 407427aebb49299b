"""The figures of a graphics card, the goals, and the tables for the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.machine import describe_machine
from bench.report import Goal, goals_table, number, table


@dataclass(frozen=True, slots=True)
class Throughput:
    """Texts of one length, or of mixed ones.

    Attributes:
        tflops: what the texts need, over the time that they took.
        share: of the card's own matmul rate.
        padded_tokens_per_s: of padded batches; NaN when they do not fit.
        padding: of the padded batches, as a share of the real tokens.
        cosine: the smallest between our vectors and those of the padded batches.
    """

    lengths: str
    texts_per_s: float
    tokens_per_s: float
    tflops: float
    share: float
    padded_tokens_per_s: float
    ratio: float
    padding: float
    cosine: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Latency:
    """One request by itself, from token ids to vectors on the CPU."""

    what: str
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Tasks:
    """Adapters against one task's merged weights: the share of the latter's speed that is left."""

    length: int
    merged_tokens_per_s: float
    one_task: float
    five_tasks: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """What was measured of one model in one precision."""

    name: str
    dtype: str
    throughput: Sequence[Throughput]
    latency: Sequence[Latency]
    tasks: Sequence[Tasks]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured."""

    device: str
    matmul_tflops: Mapping[str, Mapping[str, float]]
    models: Sequence[ModelFindings]

    def goals(self) -> list[Goal]:
        goals = []
        for model in self.models:
            name = f"{model.name}, {model.dtype}"
            by_length = {int(row.lengths): row.share for row in model.throughput if row.lengths != "mixed"}
            long = min((share for length, share in by_length.items() if length >= 256), default=math.nan)
            short = min((share for length, share in by_length.items() if length <= 64), default=math.nan)
            mixed = model.throughput[-1].ratio
            goals.append(Goal(f"{name}: 256 tokens and more, share of the matmul rate", ">=", 0.5, "%", long))
            goals.append(Goal(f"{name}: 16 to 64 tokens, share of the matmul rate", ">=", 0.35, "%", short))
            goals.append(Goal(f"{name}: mixed lengths, against padded batches", ">=", 2, "x", mixed))
            if model.tasks:
                one, five = (min(getattr(row, key) for row in model.tasks) for key in ("one_task", "five_tasks"))
                goals.append(Goal(f"{name}: one task, share of its merged weights", ">=", 0.97, "%", one))
                goals.append(Goal(f"{name}: five tasks in a batch, share of merged weights", ">=", 0.85, "%", five))
        return goals

    def markdown(self) -> str:
        """Return the tables for the documentation."""
        return "\n\n".join(
            (
                f"{self.device}; {describe_machine()}",
                f"### Goals\n\n{goals_table(self.goals())}",
                f"### Matrix products alone, TFLOP/s\n\n{self._matmul_table()}",
                *(_model_report(model) for model in self.models),
            )
        )

    def _matmul_table(self) -> str:
        dtypes = list(self.matmul_tflops)
        shapes = self.matmul_tflops[dtypes[0]]
        return table(
            ("rows x inner x columns", *dtypes),
            [(shape, *(number(self.matmul_tflops[dtype][shape]) for dtype in dtypes)) for shape in shapes],
        )


def _model_report(model: ModelFindings) -> str:
    title = f"### {model.name}, {model.dtype}"
    encoded = ("tokens per text", "texts/s", "tokens/s", "TFLOP/s", "of matmul")
    throughput = table(
        (*encoded, "padded, tokens/s", "x padded", "padding", "cosine", "peak, MiB"),
        [
            (
                row.lengths,
                number(row.texts_per_s),
                number(row.tokens_per_s),
                number(row.tflops),
                f"{row.share:.0%}",
                number(row.padded_tokens_per_s),
                number(row.ratio),
                f"{row.padding:.1%}",
                f"{row.cosine:.6f}",
                number(row.peak_mib),
            )
            for row in model.throughput
        ],
    )
    latency = table(
        ("one request", "p50, ms", "p99, ms"),
        [(row.what, number(row.p50_ms), number(row.p99_ms)) for row in model.latency],
    )
    tasks = table(
        ("tokens per text", "merged weights, tokens/s", "one task", "five tasks mixed", "cosine to merged"),
        [
            (
                str(row.length),
                number(row.merged_tokens_per_s),
                f"{row.one_task:.1%}",
                f"{row.five_tasks:.1%}",
                f"{row.cosine:.6f}",
            )
            for row in model.tasks
        ],
    )
    return "\n\n".join((title, throughput, latency, *((tasks,) if model.tasks else ())))
