"""Experiments at a terminal: the figures of a running gateway, or those in its files."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from gateway.cli.client import connect
from gateway.cli.console import make_console, make_table, say
from gateway.cli.outcome_report import print_outcomes
from gateway.config.registry import Registry
from gateway.errors import StartError
from gateway.experiments.exposures import Exposure
from gateway.experiments.report import ArmReport, ExperimentList, ExperimentReport, Guardrail
from gateway.experiments.sample_ratio import SampleRatio
from gateway.experiments.split import Split
from gateway.experiments.stats import ExperimentStats
from gateway.outcomes.files import is_store, read_changes, read_requests, read_units, report_files
from gateway.outcomes.served import why_models_changed

_TIMEOUT_S = 10.0
_NOTHING = "-"


# ------------------------------------------------------------------------------------------------------------- read


def ask_experiments(url: str, api_key: str | None) -> ExperimentList:
    """Ask a gateway for its experiments.

    Raises:
        StartError: the gateway does not answer, or answers with something other than experiments.
    """

    async def ask() -> ExperimentList:
        async with connect(url, api_key, timeout_s=_TIMEOUT_S) as client:
            return await client.experiments()

    return asyncio.run(ask())


def ask_evidence(url: str, experiment_id: str, api_key: str | None) -> ExperimentReport:
    """Ask a gateway for the figures of an experiment.

    Raises:
        StartError: the gateway does not answer, or has no such experiment.
    """

    async def ask() -> ExperimentReport:
        async with connect(url, api_key, timeout_s=_TIMEOUT_S) as client:
            return await client.evidence(experiment_id)

    return asyncio.run(ask())


def read_evidence(
    registry: Registry, experiment_id: str, files: Sequence[Path], outcomes: Sequence[Path] = ()
) -> ExperimentReport:
    """Count the units of an experiment in the files of several replicas, and compare their requests and outcomes.

    Args:
        files: exposure logs, and files of experiments (``experiments.sqlite3``), which also hold requests and outcomes.
        outcomes: CSV files, and files of experiments.
        registry: has the arms and weights to compare the units with. Lines from other arms or weights are left out, and
            counted in ``uncounted``.

    Raises:
        StartError: the registry has no such experiment, or a file cannot be read.
    """
    experiment = registry.experiment(experiment_id)
    if experiment is None:
        known = ", ".join(experiment.id for experiment in registry.experiments) or "none"
        raise StartError(f"{registry.path}: no experiment {experiment_id!r}; known: {known}")
    generation = Split(experiment).generation
    left_out: Counter[str] = Counter()

    def current() -> Iterator[Exposure]:
        for exposure in read_units(dict.fromkeys([*files, *(path for path in outcomes if is_store(path))])):
            if exposure.experiment == experiment.id:
                if exposure.generation == generation:
                    yield exposure
                else:
                    stats.begin(exposure)
                    left_out["other_weights"] += 1

    stats = ExperimentStats(None)
    stats.add(current())
    stats.restore(experiment, generation, read_requests([*files, *outcomes], experiment.id, generation), 0)
    report = stats.report(experiment, generation)
    has_outcomes = bool(outcomes) or any(map(is_store, files))
    changed = why_models_changed(experiment, read_changes([*files, *outcomes], experiment.id))
    update = {
        "warnings": [*report.warnings, *([changed] if changed else [])],
        "uncounted": {**report.uncounted, **left_out},
        "outcomes": report_files(experiment, files, outcomes) if has_outcomes else None,
    }
    return report.model_copy(update=update)


# ----------------------------------------------------------------------------------------------------------- print


def print_experiments(experiments: ExperimentList) -> None:
    """Print the experiments, and the split of their requests."""
    console = make_console()
    if not experiments.data:
        say(console, "no experiments; declare them under `experiments` in models.yaml")
        return
    table = make_table("experiment", "kind", "runs", "start", "end", "arms: weight")
    for experiment in experiments.data:
        arms = ", ".join(f"{arm.arm}: {arm.weight:g}" for arm in experiment.arms)
        runs = "yes" if experiment.running else "no"
        table.add_row(
            experiment.id, experiment.kind, runs, experiment.start or _NOTHING, experiment.end or _NOTHING, arms
        )
    console.print(table)


def print_evidence(shown: ExperimentReport, *, is_of_files: bool = False) -> None:
    """Print the arms of an experiment side by side, and whether the split of units matches the weights.

    Args:
        is_of_files: whether the figures are from files; exposure logs have no requests.
    """
    has_requests = not is_of_files or any(arm.requests for arm in shown.evidence)
    console = make_console()
    state = "runs" if shown.running else "does not run"
    say(console, f"{shown.id} ({shown.kind}) {state}; arms, weights and salt: {shown.generation}")
    units_since = f"units since {shown.units_since}" if shown.units_since else "no units yet"
    say(console, f"requests since {shown.since}, {units_since}" if has_requests else units_since)
    table = make_table("")
    for arm in shown.evidence:
        table.add_column(arm.arm, justify="right", overflow="fold")
    num_units = sum(arm.units for arm in shown.evidence)
    for name, figure in [*_unit_rows(num_units), *(_REQUEST_ROWS if has_requests else ())]:
        table.add_row(name, *(figure(arm) for arm in shown.evidence))
    console.print(table)
    if shown.uncounted:
        say(console, f"not counted: {', '.join(f'{reason} {num:,}' for reason, num in shown.uncounted.items())}")
    if len(shown.sources) > 1:
        sources = (f"{source.source} {source.units:,} ({source.requests:,} requests)" for source in shown.sources)
        say(console, f"units by source: {', '.join(sources)}")
    for warning in shown.warnings:
        say(console, warning, "bold red")
    for ratio in (shown.sample_ratio, shown.request_ratio):
        if ratio is not None:
            _print_ratio(console, ratio)
    if shown.outcomes is not None:
        print_outcomes(console, shown.outcomes)
    for guardrail in shown.guardrails if has_requests else ():
        say(console, _sentence(guardrail, shown.arms[0].arm), _GUARDRAIL_STYLES.get(guardrail.verdict, ""))


def _print_ratio(console: Console, ratio: SampleRatio) -> None:
    style = "bold red" if ratio.mismatch else "yellow" if ratio.p is None else "green"
    chi2 = "" if ratio.chi2 is None else f" (chi-square {ratio.chi2:.2f}, degrees of freedom {ratio.degrees})"
    say(console, f"split of the {ratio.of}: {ratio.verdict}{chi2}", style)


_GUARDRAIL_STYLES = {"worse": "bold red", "better": "green"}


def _sentence(guardrail: Guardrail, control: str) -> str:
    """Return a guardrail as a sentence: the difference, with its interval."""
    what = f"{guardrail.metric} of {guardrail.arm} against {control}"
    if guardrail.estimate is None or guardrail.low is None or guardrail.high is None:
        return f"{what}: not yet; needs {guardrail.least_units} units in each arm, and enough of them must differ"
    if guardrail.metric == "latency":
        figures = (
            f"x {guardrail.estimate:.2f} ({guardrail.low:.2f} to {guardrail.high:.2f}) at equal length of the texts"
        )
    else:
        points = (100 * number for number in (guardrail.estimate, guardrail.low, guardrail.high))
        figures = "{:+.2f} points ({:+.2f} to {:+.2f})".format(*points)
    return f"{what}, by unit: {figures}: {guardrail.verdict}"


Figure = Callable[[ArmReport], str]


def _unit_rows(num_units: int) -> list[tuple[str, Figure]]:
    return [
        ("model", lambda arm: arm.model),
        ("weight", lambda arm: f"{arm.weight:g}"),
        ("units", lambda arm: f"{arm.units:,}"),
        ("share of units", lambda arm: f"{arm.units / num_units:.2%}" if num_units else _NOTHING),
        ("expected share", lambda arm: f"{arm.share:.2%}"),
    ]


_REQUEST_ROWS: list[tuple[str, Figure]] = [
    ("requests", lambda arm: f"{arm.requests:,}"),
    ("errors of the server", lambda arm: f"{arm.server_errors:,}"),
    ("errors of clients", lambda arm: f"{arm.client_errors:,}"),
    ("error rate", lambda arm: f"{arm.error_rate:.2%}" if arm.requests else _NOTHING),
    ("units without an answer", lambda arm: f"{arm.unanswered_units:,}"),
    ("texts", lambda arm: f"{arm.texts:,}"),
    ("tokens", lambda arm: f"{arm.tokens:,}"),
    ("tokens/s of a request", lambda arm: _NOTHING if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}"),
    ("p50 (descriptive)", lambda arm: _percentile(arm, "p50_s", arm.p50_s)),
    ("p95 (descriptive)", lambda arm: _percentile(arm, "p95_s", arm.p95_s)),
    ("p99 (descriptive)", lambda arm: _percentile(arm, "p99_s", arm.p99_s)),
    ("p95 in the queue", lambda arm: _milliseconds(arm.queue_p95_s)),
]


def _percentile(arm: ArmReport, name: str, seconds: float | None) -> str:
    return f"{'>= ' if name in arm.at_least else ''}{_milliseconds(seconds)}"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"
