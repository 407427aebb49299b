"""The table of the page: a column for each arm, and groups of rows for quality, differences, agreement, cost and vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.compare.results import MEASURES, Arm, Comparison, Contrast, Cost, Estimate
from gateway.compare.sentences import (
    fixed,
    interval,
    milliseconds,
    p_value,
    ratio_words,
    signed,
    signed_interval,
    significant,
)

_NONE = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table: a figure, and a note below it."""

    value: str
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    cells: Sequence[Cell]


def table_groups(comparison: Comparison) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield the groups of rows of the table, which has a column for each arm."""
    arms = comparison.arms
    if comparison.has_judgments:
        yield (
            "Quality",
            [
                Row(measure, [_cell(arm.quality.get(measure)) for arm in arms])
                for measure in MEASURES
                if any(measure in arm.quality for arm in arms)
            ],
        )
        found = {(contrast.measure, contrast.arm): contrast for contrast in comparison.contrasts}
        yield (
            f"Difference to {comparison.baseline.name}",
            [
                Row(measure, [_difference_cell(comparison, found.get((measure, arm.name)), arm) for arm in arms])
                for measure in MEASURES
                if any((measure, arm.name) in found for arm in arms)
            ],
        )
    if comparison.agreements:
        yield f"Agreement with {comparison.baseline.name}", list(_agreement_rows(comparison))
    yield "Cost", list(_cost_rows(comparison))
    yield "Vectors", list(_vector_rows(comparison))


def _cell(estimate: Estimate | None) -> Cell:
    return Cell(fixed(estimate.mean), interval(estimate)) if estimate else Cell("")


def _difference_cell(comparison: Comparison, contrast: Contrast | None, arm: Arm) -> Cell:
    if contrast is None:
        return Cell(_NONE if arm is comparison.baseline else "")
    parts = (signed_interval(contrast.difference), f"p {p_value(contrast.p_holm)}")
    note = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts if part)
    return Cell(signed(contrast.difference.mean), note)


def _agreement_rows(comparison: Comparison) -> Iterator[Row]:
    found = {agreement.arm: agreement for agreement in comparison.agreements}
    agreements = [found[arm.name] for arm in comparison.arms[1:]]
    for label, estimates in (
        ("overlap@10", [agreement.overlap for agreement in agreements]),
        ("RBO", [agreement.rbo for agreement in agreements]),
        ("same first document", [agreement.same_first for agreement in agreements]),
    ):
        yield Row(label, [Cell(_NONE), *(_cell(estimate) for estimate in estimates)])


def _cost_rows(comparison: Comparison) -> Iterator[Row]:
    costs = [arm.cost for arm in comparison.arms]
    if any(costs):
        yield Row("texts/s", [Cell(significant(cost.texts_per_s) if cost else "not measured") for cost in costs])
        yield Row("tokens/s", [Cell(significant(cost.tokens_per_s) if cost else "not measured") for cost in costs])
        yield Row("one query, p50", [Cell(f"{milliseconds(cost.p50_s)} ms" if cost else "") for cost in costs])
        yield Row("one query, p95", [Cell(_p95(cost)) for cost in costs])
        yield from _ratio_rows(comparison)
    else:
        yield Row("time", [Cell("not measured") for _ in costs])
    yield Row("bytes per vector", [Cell(f"{arm.bytes_per_vector:,}") for arm in comparison.arms])


def _p95(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return f"{milliseconds(cost.p95_s)} ms" if cost.p95_s is not None else "too few requests"


def _ratio_rows(comparison: Comparison) -> Iterator[Row]:
    """Yield the ratios to the baseline of the requests that followed each other."""
    found = {one.arm: one for one in comparison.cost_contrasts}
    for label, ratios in (
        ("time of a query", {name: one.query_time for name, one in found.items()}),
        ("texts/s", {name: one.texts_per_s for name, one in found.items()}),
    ):
        cells = [
            Cell(ratio_words(ratio) if ratio else "the same model", f"{ratio.num_pairs} pairs" if ratio else "")
            for ratio in (ratios.get(arm.name) for arm in comparison.arms[1:])
        ]
        yield Row(f"{label}, against {comparison.baseline.name}", [Cell(_NONE), *cells])


def _vector_rows(comparison: Comparison) -> Iterator[Row]:
    arms = comparison.arms
    yield Row("dimensions", [Cell(f"{arm.dimensions:,}") for arm in arms])
    yield Row("model", [Cell(arm.model, is_text=True) for arm in arms])
    yield Row("space", [Cell(arm.space, is_text=True) for arm in arms])
    yield Row("device, dtype", [Cell(f"{arm.device}, {arm.dtype}", is_text=True) for arm in arms])
    yield Row("task of queries", [Cell(arm.query_task or "none", is_text=True) for arm in arms])
    yield Row("task of passages", [Cell(arm.passage_task or "none", is_text=True) for arm in arms])
