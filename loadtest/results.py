"""The results of a run, target by target, and their comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import describe_machine
from loadtest.histogram import percentile
from loadtest.knee import Step
from loadtest.options import Options
from loadtest.recorder import Recorder, Tally, total
from loadtest.thresholds import broken

if TYPE_CHECKING:
    from loadtest.probe import Probe
    from loadtest.shapes import Course, Window


@dataclass(frozen=True, slots=True)
class Result:
    """The results of one target in the counted time.

    Attributes:
        seconds: of load.
        rounds: the same by round, to compare neighbors in time.
        knee: the highest rate that was sustained, where it was looked for.
        steps: all rates that were tried.
    """

    label: str
    model: str
    seconds: float
    tally: Tally
    rounds: Sequence[tuple[float, Tally]]
    knee: Step | None = None
    steps: Sequence[Step] = ()

    @property
    def rps(self) -> float:
        """Requests that were answered right, a second."""
        return self.tally.answered / self.seconds if self.seconds else 0.0

    @property
    def offered_rps(self) -> float:
        return self.tally.offered / self.seconds if self.seconds else 0.0

    @property
    def texts_per_s(self) -> float:
        return self.tally.texts / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tally.tokens / self.seconds if self.seconds else 0.0

    @property
    def client_ms(self) -> float:
        """Mean latency as the client saw it."""
        return self.tally.client_ms / self.tally.answered if self.tally.answered else 0.0

    @property
    def wire_ms(self) -> float:
        """What of the mean latency was outside the server: network, connections, the load generator itself."""
        return max(0.0, self.client_ms - self.tally.stage_ms("total")) if self.tally.num_timed else 0.0

    def p(self, share: float) -> float:
        """Return a percentile of the latencies in milliseconds."""
        return percentile(self.tally.latencies, share)


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run.

    Attributes:
        facts: the machine and the versions.
        problems: limits that were broken, one line each; empty when all held.
        timeline: by label, by second since the epoch.
        queues: (second, model, texts waiting), as the server's metrics say.
    """

    facts: Mapping[str, str]
    results: Sequence[Result]
    problems: Sequence[str]
    timeline: Mapping[str, Mapping[int, Tally]]
    windows: Sequence[Window]
    queues: Sequence[tuple[float, str, float]] = field(default_factory=list)

    def ratio(self, result: Result, figure: str) -> float | None:
        """Return a target's figure over that of the first, as the median over the rounds; ``None`` for the first itself.

        Args:
            figure: ``rps`` or ``p95``.
        """
        first = self.results[0]
        if result is first:
            return None
        pairs = zip(_figures(result, figure), _figures(first, figure), strict=False)
        ratios = [mine / other for mine, other in pairs if other > 0 and mine > 0]
        return statistics.median(ratios) if ratios else None


def _figures(result: Result, figure: str) -> list[float]:
    if figure == "rps":
        return [tally.answered / seconds if seconds else 0.0 for seconds, tally in result.rounds]
    return [percentile(tally.latencies, 0.95) for _seconds, tally in result.rounds]


def make_results(options: Options, recorder: Recorder, course: Course, probe: Probe) -> Results:
    """Combine the records within the counted windows."""
    results = [_result(target.label, target.model, recorder, course) for target in options.targets]
    problems = [f"given up: {course.given_up}"] if course.given_up else []
    for result in results:
        if course.searches:
            problems += [] if result.knee else [f"{result.label}: no rate was sustained"]
        else:
            found = broken(result.tally, result.seconds, options.thresholds[result.label])
            problems += [f"{result.label}: {problem}" for problem in found]
    return Results(
        facts=_facts(options, probe),
        results=results,
        problems=problems,
        timeline={label: recorder.seconds(label) for label in options.labels},
        windows=course.windows,
        queues=probe.queues,
    )


def _result(label: str, model: str, recorder: Recorder, course: Course) -> Result:
    windows = sorted((window for window in course.windows if window.label == label), key=lambda window: window.round)
    rounds = [(window.seconds, recorder.between(label, window.start, window.end)) for window in windows]
    search = course.searches.get(label)
    seconds, tally = sum(seconds for seconds, _ in rounds), total(tally for _, tally in rounds)
    if search is not None and search.sustained is not None:
        seconds, tally = search.sustained.seconds, search.sustained.tally
    return Result(
        label=label,
        model=model,
        seconds=seconds,
        tally=tally,
        rounds=rounds,
        knee=search.sustained if search else None,
        steps=search.steps if search else (),
    )


def _facts(options: Options, probe: Probe) -> dict[str, str]:
    spaces = {label: str(model.get("space", "not named")) for label, model in probe.models.items()}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "profile": f"{options.profile}, {options.loop} loop, workload {options.workload}, seed {options.seed}",
        "targets": "; ".join(f"{t.label} = {t.model} at {t.url}{t.path}" for t in options.targets),
        "spaces": "; ".join(f"{label}: {space}" for label, space in spaces.items()),
        "registry": probe.registry_hash,
    }


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the targets side by side."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, title="Load test", title_justify="left")
    table.add_column("")
    for result in results.results:
        table.add_column(result.label, justify="right")
    for name, cells in rows(results):
        table.add_row(name, *cells)
    console.print(table)
    for result in results.results:
        _print_knee(result, console)
    for problem in results.problems:
        console.print(f"FAILED  {problem}", style="bold red", markup=False)


def _print_knee(result: Result, console: Console) -> None:
    if not result.steps:
        return
    for step in sorted(result.steps, key=lambda step: step.rate):
        found = step.broken_by or f"sustained, p95 {percentile(step.tally.latencies, 0.95):.0f} ms"
        console.print(f"{result.label}: {step.rate} turns/s: {found}", markup=False)


def rows(results: Results) -> list[tuple[str, list[str]]]:
    """Return the table of a run: a row for each figure, a cell for each target."""
    all_results = results.results

    def row(name: str, cell: str, *values: float) -> tuple[str, list[str]]:
        return name, [cell.format(value) for value in values]

    table = [
        row("requests answered", "{:,}", *(r.tally.answered for r in all_results)),
        row("failed", "{:,}", *(r.tally.failed for r in all_results)),
        row("offered, requests/s", "{:,.1f}", *(r.offered_rps for r in all_results)),
        row("answered, requests/s", "{:,.1f}", *(r.rps for r in all_results)),
        row("texts/s", "{:,.0f}", *(r.texts_per_s for r in all_results)),
        row("tokens/s", "{:,.0f}", *(r.tokens_per_s for r in all_results)),
        row("p50, ms", "{:,.1f}", *(r.p(0.50) for r in all_results)),
        row("p95, ms", "{:,.1f}", *(r.p(0.95) for r in all_results)),
        row("p99, ms", "{:,.1f}", *(r.p(0.99) for r in all_results)),
        row("mean, client, ms", "{:,.1f}", *(r.client_ms for r in all_results)),
    ]
    table += [
        row(f"mean, {stage}, ms", "{:,.1f}", *(r.tally.stage_ms(stage) for r in all_results))
        for stage in ("tokenize", "queue", "inference")
    ]
    table.append(row("mean, outside the server, ms", "{:,.1f}", *(r.wire_ms for r in all_results)))
    if any(r.knee for r in all_results):
        table.append(("sustainable, turns/s", [str(r.knee.rate) if r.knee else "none" for r in all_results]))
    if len(all_results) > 1:
        for figure, name in (("rps", "requests/s"), ("p95", "p95")):
            ratios = [results.ratio(result, figure) for result in all_results]
            table.append((f"{name}, x {all_results[0].label}", [f"{r:.2f}" if r else "" for r in ratios]))
    return table
