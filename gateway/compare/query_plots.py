"""Plots of all queries: the difference in quality of each, or the likeness of its rankings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from gateway.compare.drawing import Json, Plot, make_layout, marks, plain
from gateway.compare.results import PRIMARY_MEASURE, Comparison, QueryResult
from gateway.compare.sentences import fixed, percent, signed

_HOVER_WIDTH, _HOVER_LINES = 64, 3  # characters and lines of a query that a bar shows


def make_query_bars(comparison: Comparison) -> Iterator[Plot]:
    """Make one plot per arm, all with the same scale: its difference to the baseline in each query, sorted."""
    baseline = comparison.baseline.name
    contrasts = [contrast for contrast in comparison.contrasts if contrast.measure == PRIMARY_MEASURE]
    rows = [_sort(comparison.queries, contrast.arm, baseline) for contrast in contrasts]
    largest = max((abs(value) for row in rows for value, _ in row), default=0)
    for number, (contrast, row) in enumerate(zip(contrasts, rows, strict=True), start=1):
        name = contrast.arm
        identity, title = f"plot-queries-{number}", f"{name}, query by query"
        if not any(value for value, _ in row):
            reason = f"Left out: every query has the same quality with {name} and {baseline}."
            yield Plot(identity, title, reason, arm=name, is_wide=True)
            continue
        counts = f"{contrast.wins:,} better, {contrast.ties:,} equal, {contrast.losses:,} worse"
        yield Plot(
            id=identity,
            title=title,
            caption=f"{counts} than {baseline}. Each bar is a query; point at it to read it. Drag across to zoom in, "
            "double-click to zoom out.",
            label=f"{PRIMARY_MEASURE} of {name} minus that of {baseline}, sorted: {counts}; "
            f"from {signed(row[-1][0])} to {signed(row[0][0])}.",
            arm=name,
            spec={
                "data": [
                    _bars(
                        comparison,
                        name,
                        y=[round(value, 5) for value, _ in row],
                        hovertext=[_hover_text(query, name, baseline) for _, query in row],
                    )
                ],
                "layout": _bar_layout(len(row), 1.08 * largest),
            },
            is_wide=True,
        )


def _sort(queries: Iterable[QueryResult], name: str, baseline: str) -> list[tuple[float, QueryResult]]:
    differences = (
        (query.quality[name][PRIMARY_MEASURE] - query.quality[baseline][PRIMARY_MEASURE], query) for query in queries
    )
    return sorted(differences, key=lambda pair: -pair[0])


def _bars(comparison: Comparison, name: str, **more: object) -> Json:
    marker = {"color": marks(comparison)[name].color, "line": {"width": 0}}
    return {"type": "bar", "marker": marker, "hoverinfo": "text"} | more


def _bar_layout(num_bars: int, largest: float) -> Json:
    layout = make_layout(
        height=240,
        left=64,
        bottom=16,
        x={"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": False},
        y={
            "title": f"difference in {PRIMARY_MEASURE}",
            "range": [-largest, largest],
            "tickformat": ".2~f",
            "nticks": 6,
        },
    )
    # A short bar is hard to point at: the space above and below it counts as well.
    return layout | {"hovermode": "x", "bargap": 0.2 if num_bars <= 250 else 0}


def _hover_text(query: QueryResult, name: str, baseline: str) -> str:
    lines = textwrap.wrap(query.text, _HOVER_WIDTH, max_lines=_HOVER_LINES, placeholder=" …") or [query.id]
    value, reference = query.quality[name][PRIMARY_MEASURE], query.quality[baseline][PRIMARY_MEASURE]
    said = "<br>".join(plain(line) for line in lines)
    return (
        f"<b>{said}</b><br>{plain(name)} {fixed(value)}<br>{plain(baseline)} {fixed(reference)}"
        f"<br>difference {signed(value - reference)}"
    )


def make_histograms(comparison: Comparison) -> Iterator[Plot]:
    """Make two plots per arm, all with the same scale: how many queries have rankings how much like the baseline's."""
    found: list[tuple[str, str, str, list[int], float]] = []
    for number, agreement in enumerate(comparison.agreements, start=1):
        name, queries = agreement.arm, comparison.queries
        overlaps, rbos = [query.overlap[name] for query in queries], [query.rbo[name] for query in queries]
        found.append((f"plot-overlap-{number}", name, "overlap@10", _count_tenths(overlaps), agreement.overlap.mean))
        found.append((f"plot-rbo-{number}", name, "RBO", _count_tenths(rbos), agreement.rbo.mean))
    highest = max((max(counts) for _, _, _, counts, _ in found), default=1)
    for identity, name, measure, counts, mean in found:
        label = f"{measure} of {name} with {comparison.baseline.name}: mean {fixed(mean)}"
        yield _histogram(comparison, identity, name, measure, counts, label=label, highest=highest)


def _histogram(
    comparison: Comparison, identity: str, name: str, measure: str, counts: Sequence[int], *, label: str, highest: int
) -> Plot:
    num_queries = len(comparison.queries)
    bars = _bars(
        comparison,
        name,
        x=[tenth / 10 for tenth in range(11)],
        y=counts,
        hovertext=[
            f"{measure} about {tenth / 10}<br>{count:,} of {num_queries:,} queries ({percent(count / num_queries)})"
            for tenth, count in enumerate(counts)
        ],
    )
    x: Json = {"title": f"{measure}, to the nearest tenth", "dtick": 0.2, "range": [-0.07, 1.07]}
    y: Json = {"title": "queries", "range": [0, 1.05 * highest], "nticks": 5, "tickformat": ",d"}
    layout = make_layout(height=260, left=56, bottom=52, x=x | {"showgrid": False, "zeroline": False}, y=y)
    return Plot(
        id=identity,
        title=f"{measure} of {name}",
        caption=f"Queries by how alike {name} and {comparison.baseline.name} rank: 0 is nothing in common, 1 equal.",
        label=f"{label}; queries: "
        + ", ".join(f"{count:,} at {tenth / 10}" for tenth, count in enumerate(counts) if count),
        arm=name,
        spec={"data": [bars], "layout": layout | {"bargap": 0.15}},
    )


def _count_tenths(values: Iterable[float]) -> list[int]:
    counts = [0] * 11
    for value in values:
        counts[min(10, max(0, round(10 * value)))] += 1
    return counts
