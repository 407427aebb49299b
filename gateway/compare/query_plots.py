"""Plots of all queries: the difference in quality of each query, or the similarity of its rankings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gateway.compare.canvas import Canvas, Scale
from gateway.compare.drawing import Plot, marks, short
from gateway.compare.results import PRIMARY_MEASURE, Comparison, QueryResult
from gateway.compare.sentences import fixed, percent, signed
from gateway.config.wording import cut

_MAX_CHARACTERS = 100  # the characters of the query text at a bar
_NUM_TITLED = 150  # the number of largest gains, and of largest losses, that name their query
_BARS_HEIGHT, _HISTOGRAM_HEIGHT = 220, 180

_Row = Sequence[tuple[float, QueryResult]]


def make_query_bars(comparison: Comparison) -> Iterator[Plot]:
    """Make one plot per arm, all with the same scale: its difference to the baseline in each query, sorted."""
    baseline = comparison.baseline.name
    contrasts = [contrast for contrast in comparison.contrasts if contrast.measure == PRIMARY_MEASURE]
    rows = [_sort(comparison.queries, contrast.arm, baseline) for contrast in contrasts]
    largest = max((abs(value) for row in rows for value, _ in row), default=0)
    for number, (contrast, row) in enumerate(zip(contrasts, rows, strict=True), start=1):
        name = contrast.arm
        if not any(value for value, _ in row):
            continue
        counts = f"{contrast.wins:,} better, {contrast.ties:,} equal, {contrast.losses:,} worse"
        label = (
            f"{PRIMARY_MEASURE} of {name} minus that of {baseline}, sorted: {counts}; from {signed(row[-1][0])} to "
            f"{signed(row[0][0])}."
        )
        yield Plot(
            id=f"plot-queries-{number}",
            title=f"{name}, query by query",
            caption=f"{counts} than {baseline}. Each bar is a query, from the largest gain to the largest loss; point at "
            "one to read it.",
            svg=_query_bars(comparison, name, row, largest).svg(label),
            arm=name,
            is_wide=True,
        )


def _sort(queries: Iterable[QueryResult], name: str, baseline: str) -> list[tuple[float, QueryResult]]:
    differences = (
        (query.quality[name][PRIMARY_MEASURE] - query.quality[baseline][PRIMARY_MEASURE], query) for query in queries
    )
    return sorted(differences, key=lambda pair: -pair[0])


def _query_bars(comparison: Comparison, name: str, row: _Row, largest: float) -> Canvas:
    """Draw the bars. Ties have no height, so they are not drawn, but they take width."""
    canvas, scale = Canvas(_BARS_HEIGHT), Scale(-1.05 * largest, 1.05 * largest)
    canvas.y_axis(scale, [(tick, short(tick)) for tick in scale.ticks(5)], f"difference in {PRIMARY_MEASURE}")
    zero, color = canvas.y(scale, 0), marks(comparison)[name].color
    canvas.line(("0%", "100%"), (zero, zero), "zero")
    width = f"{(0.8 if len(row) <= 250 else 1) * 100 / len(row):.4f}%"
    for place, (value, query) in enumerate(row):
        if value:
            is_titled = place < _NUM_TITLED or place >= len(row) - _NUM_TITLED
            title = _title(query, name, comparison.baseline.name) if is_titled else ""
            canvas.box(f"{100 * place / len(row):.3f}%", width, (zero, canvas.y(scale, value)), color, title)
    return canvas


def _title(query: QueryResult, name: str, baseline: str) -> str:
    value, reference = query.quality[name][PRIMARY_MEASURE], query.quality[baseline][PRIMARY_MEASURE]
    text = cut(" ".join(query.text.split()) or query.id, _MAX_CHARACTERS)
    return f"{text}\n{name} {fixed(value)}, {baseline} {fixed(reference)}, difference {signed(value - reference)}"


def make_histograms(comparison: Comparison) -> Iterator[Plot]:
    """Make two plots per arm, all with the same scale: the number of queries by the similarity to the baseline."""
    found: list[tuple[str, str, str, list[int], float]] = []
    for number, agreement in enumerate(comparison.agreements, start=1):
        name, queries = agreement.arm, comparison.queries
        overlaps, rbos = [query.overlap[name] for query in queries], [query.rbo[name] for query in queries]
        found.append((f"plot-overlap-{number}", name, "overlap@10", _count_tenths(overlaps), agreement.overlap.mean))
        found.append((f"plot-rbo-{number}", name, "RBO", _count_tenths(rbos), agreement.rbo.mean))
    highest = max((max(counts) for _, _, _, counts, _ in found), default=1)
    for identity, name, measure, counts, mean in found:
        counted = ", ".join(f"{number:,} at {tenth / 10}" for tenth, number in enumerate(counts) if number)
        label = f"{measure} of {name} with {comparison.baseline.name}: mean {fixed(mean)}; queries: {counted}"
        yield Plot(
            id=identity,
            title=f"{measure} of {name}",
            caption=f"Queries by the similarity of the rankings of {name} and {comparison.baseline.name}: 0 is nothing in "
            "common, 1 equal.",
            svg=_histogram(comparison, name, measure, counts, highest).svg(label),
            arm=name,
        )


def _histogram(comparison: Comparison, name: str, measure: str, counts: Sequence[int], highest: int) -> Canvas:
    canvas = Canvas(_HISTOGRAM_HEIGHT)
    x, y = Scale(-0.06, 1.06), Scale(0, 1.05 * highest)
    ticks = [tick for tick in y.ticks(4) if tick == int(tick)]
    canvas.y_axis(y, [(tick, short(tick)) for tick in ticks], "queries")
    for tenth in range(0, 11, 2):
        canvas.text(x.percent(tenth / 10), canvas.height + 17, short(tenth / 10))
    canvas.text("50%", canvas.height + 38, f"{measure}, to the nearest tenth", kind="axis")
    for tenth, number in enumerate(counts):
        if number:
            share = percent(number / len(comparison.queries))
            title = f"{measure} about {tenth / 10}: {number:,} of {len(comparison.queries):,} queries ({share})"
            color = marks(comparison)[name].color
            canvas.box(x.percent(tenth / 10 - 0.04), "7.14%", (canvas.y(y, 0), canvas.y(y, number)), color, title)
    return canvas


def _count_tenths(values: Iterable[float]) -> list[int]:
    counts = [0] * 11
    for value in values:
        counts[min(10, max(0, round(10 * value)))] += 1
    return counts
