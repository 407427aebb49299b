"""The plots of a run: requests and responses second by second, and the time of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gateway.compare.canvas import Canvas, Scale
from loadtest.histogram import percentile
from loadtest.recorder import Tally
from loadtest.results import Result, Results

# Okabe and Ito's colors, which color-blind people tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STAGES = {
    "tokenize": ("tokenize", "#e69f00"),
    "queue": ("queue", "#d55e00"),
    "inference": ("inference", "#0072b2"),
    "rest": ("rest", "#009e73"),
    "wire": ("outside the server", "#8b949e"),
}
_SOLID, _DASHED, _DOTTED = "", "6 4", "2 3"
_HEIGHT, _BAR = 240, 28


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot.

    Attributes:
        points: second and value; ``None`` where nothing was measured.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: str
    dash: str = _SOLID


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with its legend: name, color and dashes of each line."""

    id: str
    title: str
    legend: Sequence[tuple[str, str, str]]
    svg: Markup


def make_plots(results: Results) -> list[Plot]:
    """Make every plot that has values."""
    start = min((second for seconds in results.timeline.values() for second in seconds), default=0)
    drawn = [
        _lines("throughput", "Requests per second", "requests/s", list(_throughput(results, start))),
        _lines("latency", "Latency, from when a request was due", "ms", list(_latency(results, start)), is_log=True),
        _stages(results),
        _lines("queue", "Texts that wait in the gateway", "texts", list(_queues(results, start))),
        _lines("failures", "Failures a second", "requests/s", list(_failures(results, start))),
    ]
    return [plot for plot in drawn if plot is not None]


def _throughput(results: Results, start: int) -> Iterator[Series]:
    for label, color, seconds in _targets(results):
        yield Series(f"{label}, answered", [(at - start, tally.answered) for at, tally in seconds], color)
        yield Series(f"{label}, offered", [(at - start, tally.offered) for at, tally in seconds], color, _DOTTED)


def _latency(results: Results, start: int) -> Iterator[Series]:
    for label, color, seconds in _targets(results):
        for share, dash in ((0.5, _SOLID), (0.95, _DASHED), (0.99, _DOTTED)):
            values = [(at - start, percentile(tally.latencies, share)) for at, tally in seconds]
            points = [(at, None if math.isnan(value) else value) for at, value in values]
            yield Series(f"{label}, p{round(100 * share)}", points, color, dash)


def _failures(results: Results, start: int) -> Iterator[Series]:
    for label, color, seconds in _targets(results):
        if any(tally.failed for _, tally in seconds):
            yield Series(label, [(at - start, tally.failed) for at, tally in seconds], color)


def _queues(results: Results, start: int) -> Iterator[Series]:
    models = sorted({model for _, model, _ in results.queues})
    for number, model in enumerate(models):
        points = [(time - start, float(texts)) for time, of, texts in results.queues if of == model and time >= start]
        yield Series(model, points, _COLORS[number % len(_COLORS)])


def _targets(results: Results) -> Iterator[tuple[str, str, Sequence[tuple[int, Tally]]]]:
    """Yield the label, color and seconds of each target."""
    for number, (label, seconds) in enumerate(results.timeline.items()):
        yield label, _COLORS[number % len(_COLORS)], list(seconds.items())


def _lines(identity: str, title: str, unit: str, series: Sequence[Series], *, is_log: bool = False) -> Plot | None:
    """Draw lines over the seconds of the run; ``None`` without a value."""
    values = [value for line in series for _, value in line.points if value is not None and (value > 0 or not is_log)]
    if not values:
        return None
    x = Scale(0, max(1.0, *(at for line in series for at, _ in line.points)))
    y = Scale(min(values) / 1.3, 1.3 * max(values), is_log=True) if is_log else Scale(0, 1.05 * (max(values) or 1.0))
    canvas = Canvas(_HEIGHT)
    canvas.x_axis(x, [(tick, f"{tick:,g}") for tick in x.ticks(8)], "seconds")
    canvas.y_axis(y, [(tick, f"{tick:,g}") for tick in y.ticks(6)], unit)
    for line in series:
        parts: list[list[tuple[float, float]]] = [[]]
        for at, value in line.points:
            if value is None or (is_log and value <= 0):
                parts.append([])  # a gap
            else:
                parts[-1].append((x.share(at), canvas.y(y, value)))
        canvas.curve(parts, line.color, line.dash, line.name)
    legend = [(line.name, line.color, line.dash) for line in series]
    return Plot(identity, title, legend, canvas.svg(f"{title}: {', '.join(line.name for line in series)}"))


def _stages(results: Results) -> Plot | None:
    """Draw a bar for each target, in parts that add up to its mean latency."""
    timed = [result for result in results.results if result.tally.num_timed]
    if not timed:
        return None
    parts = [parts_of(result) for result in timed]
    scale = Scale(0, 1.05 * (max(sum(found.values()) for found in parts) or 1.0))
    canvas = Canvas(len(timed) * 2 * _BAR)
    canvas.x_axis(scale, [(tick, f"{tick:,g}") for tick in scale.ticks(8)], "ms")
    for number, (result, found) in enumerate(zip(timed, parts, strict=True)):
        top = (2 * number + 0.75) * _BAR
        canvas.text("0%", top - 6, result.label, "start", "row")
        before = 0.0
        for stage, (name, color) in _STAGES.items():
            share = f"{100 * scale.share(found[stage]):.2f}%"
            canvas.box(scale.percent(before), share, (top, top + _BAR), color, f"{name} {found[stage]:.2f} ms")
            before += found[stage]
    title = "Where the time goes, mean of a request"
    said = [f"{result.label}: {sum(found.values()):.1f} ms" for result, found in zip(timed, parts, strict=True)]
    return Plot(
        "stages", title, [(*named, _SOLID) for named in _STAGES.values()], canvas.svg(f"{title}. {', '.join(said)}")
    )


def parts_of(result: Result) -> Mapping[str, float]:
    """Return the parts of the mean latency, in milliseconds."""
    tally: Tally = result.tally
    known = {stage: tally.stage_ms(stage) for stage in ("tokenize", "queue", "inference")}
    rest = max(0.0, tally.stage_ms("total") - sum(known.values()))
    return {**known, "rest": rest, "wire": result.wire_ms}
