"""The plots of the page: quality, differences, and quality against cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from gateway.compare.canvas import Canvas, Scale
from gateway.compare.drawing import Plot, bounds, marks, short
from gateway.compare.query_plots import make_histograms, make_query_bars
from gateway.compare.results import JUDGED, PRIMARY_MEASURE, Arm, Comparison, Estimate
from gateway.compare.sentences import fixed, interval, milliseconds, signed, signed_interval

_ROW = 17  # pixels for an arm in a row of points
_PADDING = 12  # pixels of a row above and below them
_HEIGHT = 240


def make_plots(comparison: Comparison) -> Sequence[Plot]:
    """Make all plots that the comparison has values for, and that would show a difference."""
    if not comparison.has_judgments:
        return list(make_histograms(comparison))
    return [
        _quality(comparison),
        *([_differences(comparison)] if comparison.contrasts else []),
        *([_latency(comparison)] if any(arm.cost for arm in comparison.arms) else []),
        *([_sizes(comparison)] if len({arm.bytes_per_document for arm in comparison.arms}) > 1 else []),
        *make_query_bars(comparison),
    ]


def _quality(comparison: Comparison) -> Plot:
    rows = {arm.name: arm.quality for arm in comparison.arms}
    primary = [f"{name} {fixed(row[PRIMARY_MEASURE].mean)}" for name, row in rows.items()]
    caption = "Mean over the queries, with its 95 % interval; further right is better."
    if JUDGED in comparison.baseline.quality:
        caption += f" {JUDGED} is not a quality: it is the share of the first ten documents that have a judgment."
    label = f"Means of each measure with intervals. {PRIMARY_MEASURE}: {', '.join(primary)}."
    return Plot(
        id="plot-quality",
        title="Quality",
        caption=caption,
        svg=_point_rows(comparison, rows, are_differences=False).svg(label),
        legend=list(rows),
    )


def _differences(comparison: Comparison) -> Plot:
    baseline = comparison.baseline.name
    rows: dict[str, dict[str, Estimate]] = {}
    for contrast in comparison.contrasts:
        rows.setdefault(contrast.arm, {})[contrast.measure] = contrast.difference
    primary = [f"{name} {signed(row[PRIMARY_MEASURE].mean)}" for name, row in rows.items()]
    label = f"Differences to {baseline} with intervals. {PRIMARY_MEASURE}: {', '.join(primary)}."
    return Plot(
        id="plot-differences",
        title=f"Difference to {baseline}",
        caption="Mean of the differences query by query, with its 95 % interval. If the interval contains 0, the "
        "queries do not distinguish the two."
        + (" The intervals are not corrected for the number of arms; p is." if len(rows) > 1 else ""),
        svg=_point_rows(comparison, rows, are_differences=True).svg(label),
        legend=list(rows),
    )


def _point_rows(comparison: Comparison, rows: Mapping[str, Mapping[str, Estimate]], *, are_differences: bool) -> Canvas:
    """Draw one row per measure, with one point per arm at the same height in every plot."""
    measures = list(comparison.baseline.quality)
    row_height = len(comparison.arms) * _ROW + _PADDING
    places = {arm.name: place for place, arm in enumerate(comparison.arms)}
    ends = [end for row in rows.values() for estimate in row.values() for end in bounds(estimate)]
    scale = _scale([*ends, 0.0] if are_differences else ends)
    canvas = Canvas(row_height * len(measures))
    canvas.x_axis(scale, [(tick, short(tick)) for tick in scale.ticks(6)], "")
    if are_differences:
        canvas.line((scale.percent(0), scale.percent(0)), (0, canvas.height), "zero")
    for number, measure in enumerate(measures):
        if number:
            canvas.line(("0%", "100%"), (number * row_height, number * row_height))
        kind = "primary" if measure == PRIMARY_MEASURE else "row"
        canvas.text("-8", (number + 0.5) * row_height + 4, measure, "end", kind)
    write, write_interval = (signed, signed_interval) if are_differences else (fixed, interval)
    for name, row in rows.items():
        for measure, estimate in row.items():
            y = measures.index(measure) * row_height + _PADDING / 2 + (places[name] + 0.5) * _ROW
            low, high = bounds(estimate)
            mark = marks(comparison)[name]
            canvas.colored_line((scale.percent(low), scale.percent(high)), (y, y), mark.color)
            description = f"{name}: {measure} {write(estimate.mean)} ({write_interval(estimate) or 'no interval'})"
            canvas.point(scale.percent(estimate.mean), y, mark, description)
    return canvas


def _scale(values: Sequence[float], part: float = 0.06) -> Scale:
    """Return a scale with some room at both ends."""
    low, high = min(values), max(values)
    margin = max(part * (high - low), 0.005)
    return Scale(low - margin, high + margin)


def _latency(comparison: Comparison) -> Plot:
    costs = {arm.name: arm.cost for arm in comparison.arms if arm.cost}
    missing = [arm.name for arm in comparison.arms if arm.name not in costs]
    note = f" Not measured: {', '.join(missing)}." if missing else ""
    x = {name: 1000 * cost.p50_s for name, cost in costs.items()}
    tails = {name: 1000 * (cost.p95_s or cost.p50_s) for name, cost in costs.items()}
    descriptions = {
        name: f"p50 {milliseconds(cost.p50_s)} ms" + (f", p95 {milliseconds(cost.p95_s)} ms" if cost.p95_s else "")
        for name, cost in costs.items()
    }
    low, high = min(x.values()), max(tails.values())
    scale = Scale(0.7 * low, 1.3 * high, is_log=True) if high > 8 * low else Scale(0, 1.1 * high)
    return Plot(
        id="plot-latency",
        title="Quality against latency",
        caption=f"Up and to the left is better. The point is the median; the bar to its right ends at p95.{note}",
        svg=_trade_off(comparison, scale, "milliseconds for one query", x, descriptions, tails),
        legend=list(costs),
    )


def _sizes(comparison: Comparison) -> Plot:
    sizes = [arm.bytes_per_document for arm in comparison.arms]
    x = {arm.name: float(arm.bytes_per_document) for arm in comparison.arms}
    descriptions = {arm.name: f"{arm.bytes_per_document:,} bytes per document" for arm in comparison.arms}
    notes = ["Up and to the left is better."]
    if len({arm.model for arm in comparison.arms}) < len(sizes):
        notes.append("A line joins the sizes of one model.")
    return Plot(
        id="plot-sizes",
        title="Quality against size",
        caption=" ".join(notes),
        svg=_trade_off(
            comparison, Scale(min(sizes) / 1.5, 1.5 * max(sizes), is_log=True), "bytes per document", x, descriptions
        ),
        legend=list(x),
    )


def _trade_off(
    comparison: Comparison,
    scale: Scale,
    title: str,
    x: Mapping[str, float],
    descriptions: Mapping[str, str],
    tails: Mapping[str, float] | None = None,
) -> Markup:
    """Draw quality over ``x``, one point per arm; ``tails`` are the ends of bars to the right of the points."""
    arms = [arm for arm in comparison.arms if arm.name in x]
    canvas = Canvas(_HEIGHT)
    quality = _scale([end for arm in arms for end in bounds(arm.quality[PRIMARY_MEASURE])])
    canvas.x_axis(scale, [(tick, short(tick)) for tick in _x_ticks(scale, x, tails)], title)
    canvas.y_axis(quality, [(tick, short(tick)) for tick in quality.ticks(5)], PRIMARY_MEASURE)
    if not tails:
        for one, other in _sizes_of_one_model(arms, x):
            canvas.line(
                (scale.percent(x[one.name]), scale.percent(x[other.name])),
                (canvas.y(quality, _mean(one)), canvas.y(quality, _mean(other))),
                "join",
            )
    for arm in arms:
        mark, at = marks(comparison)[arm.name], scale.percent(x[arm.name])
        low, high = bounds(arm.quality[PRIMARY_MEASURE])
        y = canvas.y(quality, _mean(arm))
        canvas.colored_line((at, at), (canvas.y(quality, low), canvas.y(quality, high)), mark.color)
        if tails:
            canvas.colored_line((at, scale.percent(tails[arm.name])), (y, y), mark.color)
        text = f"{arm.name}: {PRIMARY_MEASURE} {fixed(_mean(arm))} ({interval(arm.quality[PRIMARY_MEASURE])})"
        canvas.point(at, y, mark, f"{text}, {descriptions[arm.name]}")
    label = ". ".join(f"{arm.name}: {PRIMARY_MEASURE} {fixed(_mean(arm))}, {descriptions[arm.name]}" for arm in arms)
    return canvas.svg(label)


def _x_ticks(scale: Scale, x: Mapping[str, float], tails: Mapping[str, float] | None) -> Sequence[float]:
    """Return round numbers, and for sizes of vectors powers of 2."""
    if tails:
        return scale.ticks(6)
    low, high = math.ceil(math.log2(scale.low)), math.floor(math.log2(scale.high))
    return [2.0**power for power in range(low, high + 1, math.ceil((high - low + 1) / 6))]


def _mean(arm: Arm) -> float:
    return arm.quality[PRIMARY_MEASURE].mean


def _sizes_of_one_model(arms: Sequence[Arm], x: Mapping[str, float]) -> Iterator[tuple[Arm, Arm]]:
    """Yield neighboring sizes of the same model."""
    for model in dict.fromkeys(arm.model for arm in arms):
        of_model = sorted((arm for arm in arms if arm.model == model), key=lambda arm: x[arm.name])
        yield from itertools.pairwise(of_model)
