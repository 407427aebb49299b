"""The tables of the page: a column for each arm, and groups of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.compare.results import MEASURES, PRIMARY_MEASURE, Arm, Comparison, Contrast, Cost, Estimate
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


Groups = Sequence[tuple[str, Sequence[Row]]]
"""Headings, each with its rows."""


def table_groups(comparison: Comparison) -> tuple[Groups, Groups]:
    """Return the main groups of rows, and the folded groups; both tables have a column for each arm."""
    agreement = [(f"Agreement with {comparison.baseline.name}", list(_agreement_rows(comparison)))]
    agreement = agreement if comparison.agreements else []
    others = [measure for measure in MEASURES if measure != PRIMARY_MEASURE]
    cost, vectors = ("Cost", list(_cost_rows(comparison))), ("Vectors", list(_vector_rows(comparison)))
    if not comparison.has_judgments:
        return [*agreement, cost], [vectors]
    return (
        [*_quality_groups(comparison, [PRIMARY_MEASURE]), cost],
        [*_quality_groups(comparison, others), *agreement, vectors],
    )


def _quality_groups(comparison: Comparison, measures: Sequence[str]) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield the means of measures, and their differences to the baseline."""
    arms = comparison.arms
    measured = [measure for measure in measures if any(measure in arm.quality for arm in arms)]
    found = {(contrast.measure, contrast.arm): contrast for contrast in comparison.contrasts}
    yield "Quality", [Row(measure, [_cell(arm.quality.get(measure)) for arm in arms]) for measure in measured]
    yield (
        f"Difference to {comparison.baseline.name}",
        [
            Row(measure, [_difference_cell(comparison, found.get((measure, arm.name)), arm) for arm in arms])
            for measure in measured
        ],
    )


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
    yield Row("bytes per document", [Cell(f"{arm.bytes_per_document:,}") for arm in comparison.arms])


def _p95(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return f"{milliseconds(cost.p95_s)} ms" if cost.p95_s is not None else "too few requests"


def _ratio_rows(comparison: Comparison) -> Iterator[Row]:
    """Yield the ratios to the baseline of paired requests."""
    found = {contrast.arm: contrast for contrast in comparison.cost_contrasts}
    contrasts = [found[arm.name] for arm in comparison.arms[1:]]
    for label, ratios in (
        ("time of a query, ratio", [contrast.query_time for contrast in contrasts]),
        ("texts/s, ratio", [contrast.texts_per_s for contrast in contrasts]),
    ):
        cells = [
            Cell(ratio_words(ratio), f"{ratio.num_pairs} pairs")
            if ratio
            else Cell("the same model" if contrast.is_same_model else "not measured")
            for contrast, ratio in zip(contrasts, ratios, strict=True)
        ]
        yield Row(label, [Cell(_NONE), *cells])


def _vector_rows(comparison: Comparison) -> Iterator[Row]:
    arms = comparison.arms
    yield Row("dimensions", [Cell(f"{arm.dimensions:,}" if arm.dimensions else _NONE) for arm in arms])
    yield Row("model", [Cell(arm.model, is_text=True) for arm in arms])
    yield Row("space", [Cell(arm.space, is_text=True) for arm in arms])
    yield Row("device, dtype", [Cell(f"{arm.device}, {arm.dtype}", is_text=True) for arm in arms])
    yield Row("task of queries", [Cell(arm.query_task or "none", is_text=True) for arm in arms])
    yield Row("task of passages", [Cell(arm.passage_task or "none", is_text=True) for arm in arms])
