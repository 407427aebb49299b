"""Print the outcomes of an experiment at a terminal."""

from __future__ import annotations

from rich.console import Console

from gateway.cli.console import make_table, say
from gateway.experiments.outcome_report import OutcomeComparison, OutcomeReport, OutcomesReport

_NOTHING = "-"
_STYLES = {"better": "bold green", "worse": "bold red", "as good": "green"}


def print_outcomes(console: Console, report: OutcomesReport) -> None:
    """Print each outcome arm by arm, and the comparisons of the arms."""
    for outcome in report.outcomes:
        _print_outcome(console, outcome)
    if not report.outcomes:
        say(console, "no outcomes yet")


def _print_outcome(console: Console, outcome: OutcomeReport) -> None:
    kind = (
        f"per {outcome.per}, {outcome.better} is better, margin {outcome.margin:g}" if outcome.margin else "no verdict"
    )
    say(console, f"outcome {outcome.name} ({kind}): {outcome.outcomes:,} posted")
    if outcome.unmatched:
        say(console, f"not counted: {outcome.unmatched:,} from units that were not in any arm before")
    table = make_table("arm", "units", "with outcome", "mean", "interval")
    for arm in outcome.arms:
        mean = _NOTHING if arm.mean is None else _number(arm.mean)
        table.add_row(arm.arm, f"{arm.units:,}", f"{arm.units_with_outcome:,}", mean, _interval(arm.low, arm.high))
    console.print(table)
    for comparison in outcome.comparisons:
        say(console, _sentence(comparison), _STYLES.get(comparison.verdict or "", ""))


def _sentence(found: OutcomeComparison) -> str:
    """Return a sentence about an arm: its verdict, its difference, and the reason."""
    verdict = found.verdict or "no verdict"
    what = f"{found.arm} against {found.control}: {verdict}"
    if found.estimate is not None:
        what += f", difference {_number(found.estimate, sign='+')} ({_interval(found.low, found.high)})"
        what += ", corrected for the time before" if found.uses_before else ""
    what += f"; {found.reason}"
    if found.verdict == "not yet" and found.units_needed is not None:
        what += f"; {found.units:,} units, and about {found.units_needed:,} find a difference of the margin"
        what += f": look again on {found.look_again[:10]}" if found.look_again else ""
    return what


def _interval(low: float | None, high: float | None) -> str:
    return _NOTHING if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(number: float, sign: str = "") -> str:
    return f"{number:{sign}.4g}"
