"""The plots of the page, as plain JSON for plotly.js, without its Python figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from gateway.compare.drawing import COLORS, Json, Plot, error_bar, make_layout, marker, marks, plain
from gateway.compare.query_plots import make_histograms, make_query_bars
from gateway.compare.results import JUDGED, PRIMARY_MEASURE, Arm, Comparison, Estimate
from gateway.compare.sentences import fixed, interval, milliseconds, signed, signed_interval

_ROW = 17  # pixels for an arm in a row of points
_FRAME = 70  # pixels above and below them


def make_plots(comparison: Comparison) -> Sequence[Plot]:
    """Make every plot that the comparison has values for."""
    if not comparison.has_judgments:
        reason = "Left out, as is quality against cost: quality needs judgments."
        return [*make_histograms(comparison), Plot("plot-quality", "Quality", reason, is_wide=True)]
    return [
        _quality(comparison),
        _differences(comparison),
        _latency(comparison),
        *([_sizes(comparison)] if len({arm.bytes_per_vector for arm in comparison.arms}) > 1 else []),
        *make_query_bars(comparison),
    ]


def _quality(comparison: Comparison) -> Plot:
    rows = {arm.name: arm.quality for arm in comparison.arms}
    primary = [f"{name} {fixed(row[PRIMARY_MEASURE].mean)}" for name, row in rows.items()]
    return Plot(
        id="plot-quality",
        title="Quality",
        caption="Mean over the queries, with its 95 % interval; further right is better."
        + (
            " Judged@10 is not a quality: it is the share of the first ten documents that have a judgment."
            if JUDGED in comparison.baseline.quality
            else ""
        ),
        label=f"Means of each measure with intervals. {PRIMARY_MEASURE}: {', '.join(primary)}.",
        legend=list(rows),
        spec=_point_rows(comparison, rows, signs=False),
    )


def _differences(comparison: Comparison) -> Plot:
    baseline = comparison.baseline.name
    rows: dict[str, dict[str, Estimate]] = {}
    for contrast in comparison.contrasts:
        rows.setdefault(contrast.arm, {})[contrast.measure] = contrast.difference
    primary = [f"{name} {signed(row[PRIMARY_MEASURE].mean)}" for name, row in rows.items()]
    return Plot(
        id="plot-differences",
        title=f"Difference to {baseline}",
        caption="Mean of the differences query by query, with its 95 % interval. If the interval holds 0, the "
        "queries do not tell the two apart."
        + (" The intervals are not corrected for the number of arms; p is." if len(rows) > 1 else ""),
        label=f"Differences to {baseline} with intervals. {PRIMARY_MEASURE}: {', '.join(primary)}.",
        legend=list(rows),
        spec=_point_rows(comparison, rows, signs=True),
    )


def _point_rows(comparison: Comparison, rows: Mapping[str, Mapping[str, Estimate]], *, signs: bool) -> Json:
    """Draw one row per measure with one point per arm, at the same height in every plot."""
    measures = list(comparison.baseline.quality)
    names = [arm.name for arm in comparison.arms]
    step = 0.75 / len(names)
    write, write_interval = (signed, signed_interval) if signs else (fixed, interval)
    traces: list[Json] = []
    for name, row in rows.items():
        offset = (names.index(name) - (len(names) - 1) / 2) * step
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [estimate.mean for estimate in row.values()],
                "y": [measures.index(measure) + offset for measure in row],
                "error_x": error_bar(list(row.values())),
                "marker": marker(marks(comparison)[name]),
                "hoverinfo": "text",
                "hovertext": [
                    f"<b>{plain(name)}</b><br>{measure} {write(estimate.mean)} ({write_interval(estimate)})"
                    for measure, estimate in row.items()
                ],
            }
        )
    labels = [f"<b>{measure}</b>" if measure == PRIMARY_MEASURE else measure for measure in measures]
    layout = make_layout(
        height=_FRAME + len(measures) * (len(names) * _ROW + 10),
        left=88,
        x={"zeroline": signs, "tickformat": ".2~f", "nticks": 7},
        y={
            "tickvals": list(range(len(measures))),
            "ticktext": labels,
            "range": [len(measures) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    )
    line: Json = {"type": "line", "layer": "below", "line": {"width": 1}, "xref": "paper", "x0": 0, "x1": 1}
    layout["shapes"] = [line | {"y0": number - 0.5, "y1": number - 0.5} for number in range(1, len(measures))]
    return {"data": traces, "layout": layout}


def _latency(comparison: Comparison) -> Plot:
    title, identity = "Quality against latency", "plot-latency"
    costs = {arm.name: arm.cost for arm in comparison.arms if arm.cost}
    if not costs:
        return Plot(identity, title, "Left out: the cost was not measured.")
    missing = [arm.name for arm in comparison.arms if arm.name not in costs]
    note = f" Not measured: {', '.join(missing)}." if missing else ""
    x = {name: 1000 * cost.p50_s for name, cost in costs.items()}
    tails = {name: 1000 * ((cost.p95_s or cost.p50_s) - cost.p50_s) for name, cost in costs.items()}
    said = {
        name: f"p50 {milliseconds(cost.p50_s)} ms" + (f", p95 {milliseconds(cost.p95_s)} ms" if cost.p95_s else "")
        for name, cost in costs.items()
    }
    axis: Json = {"title": "milliseconds for one query"}
    if max(x.values()) > 8 * min(x.values()):
        axis |= {"type": "log", "dtick": "D2"}
    else:
        axis |= {"rangemode": "tozero", "nticks": 7}
    return Plot(
        id=identity,
        title=title,
        caption=f"Up and to the left is better. The point is the median; the bar to its right ends at p95.{note}",
        label=_label_trade_off(comparison, said),
        legend=list(costs),
        spec=_trade_off(comparison, x, said, axis, tails),
    )


def _sizes(comparison: Comparison) -> Plot:
    sizes = [arm.bytes_per_vector for arm in comparison.arms]
    x = dict(zip((arm.name for arm in comparison.arms), _side_by_side(sizes), strict=True))
    said = {arm.name: f"{arm.bytes_per_vector:,} bytes per vector" for arm in comparison.arms}
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [2**power for power in powers[:: math.ceil(len(powers) / 8)]]
    axis: Json = {
        "type": "log",
        "title": "bytes per vector",
        "tickvals": ticks,
        "ticktext": [f"{tick:,}" for tick in ticks],
        "range": [math.log10(2) * edge for edge in (low - 0.6, high + 0.6)],
    }
    notes = ["Up and to the left is better."]
    if len({arm.model for arm in comparison.arms}) < len(sizes):
        notes.append("A line joins the sizes of one model.")
    if len({*sizes}) < len(sizes):
        notes.append("Arms of the same size stand side by side.")
    return Plot(
        id="plot-sizes",
        title="Quality against size",
        caption=" ".join(notes),
        label=_label_trade_off(comparison, said),
        legend=list(x),
        spec=_trade_off(comparison, x, said, axis),
    )


def _side_by_side(sizes: Sequence[int]) -> list[float]:
    """Move equal sizes a little apart on a logarithmic axis, so that no interval hides another."""
    places = []
    for number, size in enumerate(sizes):
        place = sizes[:number].count(size) - (sizes.count(size) - 1) / 2
        places.append(size * 2 ** (place / 12))
    return places


def _label_trade_off(comparison: Comparison, said: Mapping[str, str]) -> str:
    arms = [arm for arm in comparison.arms if arm.name in said]
    return ". ".join(
        f"{arm.name}: {PRIMARY_MEASURE} {fixed(arm.quality[PRIMARY_MEASURE].mean)}, {said[arm.name]}" for arm in arms
    )


def _trade_off(
    comparison: Comparison,
    x: Mapping[str, float],
    said: Mapping[str, str],
    axis: Json,
    tails: Mapping[str, float] | None = None,
) -> Json:
    """Draw quality over ``x``, one point per arm; ``tails`` are bars to the right of the points."""
    arms = [arm for arm in comparison.arms if arm.name in x]
    traces = [] if tails else list(_lines_between_sizes(arms, x))
    for arm in arms:
        quality = arm.quality[PRIMARY_MEASURE]
        text = f"{PRIMARY_MEASURE} {fixed(quality.mean)} ({interval(quality)})"
        trace: Json = {
            "type": "scatter",
            "mode": "markers",
            "x": [x[arm.name]],
            "y": [quality.mean],
            "error_y": error_bar([quality]),
            "marker": marker(marks(comparison)[arm.name]),
            "hoverinfo": "text",
            "hovertext": [f"<b>{plain(arm.name)}</b><br>{text}<br>{said[arm.name]}"],
        }
        if tails:
            tail: Json = {"type": "data", "array": [tails[arm.name]], "arrayminus": [0], "symmetric": False}
            trace["error_x"] = tail | {"thickness": 1.5, "width": 3}
        traces.append(trace)
    estimates = [arm.quality[PRIMARY_MEASURE] for arm in arms]
    low = min(one.mean if one.low is None else one.low for one in estimates)
    high = max(one.mean if one.high is None else one.high for one in estimates)
    margin = max(0.08 * (high - low), 0.01)
    y: Json = {"title": PRIMARY_MEASURE, "range": [low - margin, high + margin], "tickformat": ".3~f", "nticks": 7}
    y["zeroline"] = False
    return {"data": traces, "layout": make_layout(height=320, left=64, bottom=52, x=axis | {"zeroline": False}, y=y)}


def _lines_between_sizes(arms: Sequence[Arm], x: Mapping[str, float]) -> Iterator[Json]:
    for model in dict.fromkeys(arm.model for arm in arms):
        of_model = sorted((arm for arm in arms if arm.model == model), key=lambda arm: x[arm.name])
        if len(of_model) > 1:
            yield {
                "type": "scatter",
                "mode": "lines",
                "x": [x[arm.name] for arm in of_model],
                "y": [arm.quality[PRIMARY_MEASURE].mean for arm in of_model],
                "line": {"color": COLORS[0], "width": 1, "dash": "dot"},
                "hoverinfo": "skip",
            }
