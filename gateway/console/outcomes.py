"""The outcomes of an experiment on its page: the verdict in words, then the underlying figures. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.console.charts import Scale
from gateway.console.words import number, read_time, signed
from gateway.experiments.outcome_report import OutcomeArm, OutcomeComparison, OutcomeReport
from gateway.experiments.report import ExperimentReport

_MOST_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm against the control, with its interval in percent of the drawing's width.

    Attributes:
        index: the index of the arm in the experiment.
        margin: the drawn start and width of the differences that do not matter; ``None`` for an outcome without a margin.
    """

    arm: str
    index: int
    text: str
    interval: str
    zero: str
    start: str
    width: str
    point: str
    margin: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusion about one arm, in words.

    Attributes:
        level: the color level of the chip.
        word: ``better``, ``worse``, ``as good`` or ``not yet``; empty without a verdict.
        next: the missing evidence, and when to look again; empty if the arm is decided.
    """

    arm: str
    index: int
    level: Literal["good", "bad", ""]
    word: str
    sentence: str
    reason: str
    next: str


@dataclass(frozen=True, slots=True)
class ArmMean:
    """One arm by itself."""

    arm: str
    mean: str
    interval: str
    units: int
    units_with_outcome: int


@dataclass(frozen=True, slots=True)
class OutcomeView:
    """One outcome.

    Attributes:
        is_doubtful: whether the split differs from the configured one, so that nothing is compared.
        verdicts: the verdicts, only for the primary outcome.
    """

    outcome: OutcomeReport
    what: str
    is_doubtful: bool
    verdicts: Sequence[Verdict]
    arms: Sequence[ArmMean]
    differences: Sequence[Difference]
    note: str


def view_outcomes(report: ExperimentReport) -> list[OutcomeView]:
    """Return the outcomes to show, primary first; empty if the gateway keeps no outcomes."""
    if report.outcomes is None:
        return []
    indices = {arm.arm: index for index, arm in enumerate(report.evidence)}
    # Only the report of the outcomes finds a mismatch in an earlier generation, and then gives no verdict.
    is_doubtful = report.mismatch or any(
        comparison.verdict is None
        for outcome in report.outcomes.outcomes
        if outcome.primary
        for comparison in outcome.comparisons
    )
    return [_view(outcome, indices, is_doubtful=is_doubtful) for outcome in report.outcomes.outcomes]


def decided(views: Sequence[OutcomeView]) -> list[Verdict]:
    """Return the decided verdicts, worst first."""
    order = ["worse", "better", "as good"]
    found = [verdict for view in views for verdict in view.verdicts if verdict.word in order]
    return sorted(found, key=lambda verdict: order.index(verdict.word))


def _view(outcome: OutcomeReport, indices: Mapping[str, int], *, is_doubtful: bool) -> OutcomeView:
    digits = _digits(outcome)
    first = outcome.comparisons[0].reason if outcome.comparisons else ""
    return OutcomeView(
        outcome,
        _describe_outcome(outcome),
        is_doubtful,
        [
            _verdict(outcome, difference, indices, digits)
            for difference in outcome.comparisons
            if outcome.primary and difference.verdict
        ],
        [_mean(arm, digits) for arm in outcome.arms],
        [] if is_doubtful else _differences(outcome, indices, digits),
        first if is_doubtful or not outcome.primary else "",
    )


def _describe_outcome(outcome: OutcomeReport) -> str:
    kind = {"unit": "sum of each unit", "mean": "mean of each unit", "ratio": "all values divided by all chances"}[
        outcome.per
    ]
    if not outcome.primary:
        return kind
    margin = "" if outcome.margin is None else f", differences within ±{outcome.margin:g} do not matter"
    return f"{kind}, {outcome.better} is better{margin}"


def _verdict(outcome: OutcomeReport, one: OutcomeComparison, indices: Mapping[str, int], digits: int) -> Verdict:
    word = one.verdict or ""
    sentence = {
        "better": f"{one.arm} is better",
        "worse": f"{one.arm} is worse",
        "as good": f"{one.arm} is as good as {one.control}",
        "not yet": f"{one.arm}: not yet",
    }[word]
    if one.estimate is not None and word in ("better", "worse"):
        sentence += f": {signed(one.estimate, digits)} {outcome.name}"
    level: Literal["good", "bad", ""] = "good" if word in ("better", "as good") else "bad" if word == "worse" else ""
    return Verdict(
        one.arm, indices[one.arm], level, word, sentence, one.reason, _next(one) if word == "not yet" else ""
    )


def _next(one: OutcomeComparison) -> str:
    """Return the missing evidence of an undecided comparison."""
    parts = [f"{one.units:,} units so far"]
    if one.units_needed is not None:
        parts.append(f"about {one.units_needed:,} are needed")
    if one.look_again is None:
        return ", ".join(parts) + "."
    parts.append(f"look again on {read_time(one.look_again):%Y-%m-%d}")
    return ", ".join(parts) + ". You can look earlier without harm."


def _mean(arm: OutcomeArm, digits: int) -> ArmMean:
    interval = "" if arm.low is None or arm.high is None else _range(arm.low, arm.high, digits)
    return ArmMean(arm.arm, number(arm.mean, digits), interval, arm.units, arm.units_with_outcome)


def _differences(outcome: OutcomeReport, indices: Mapping[str, int], digits: int) -> list[Difference]:
    drawn = []
    margin = outcome.margin or 0.0
    known = [
        comparison for comparison in outcome.comparisons if comparison.low is not None and comparison.high is not None
    ]
    # Use one scale for all arms, so that they can be compared by eye.
    reach = (
        max([margin, *(max(abs(comparison.low or 0.0), abs(comparison.high or 0.0)) for comparison in known)]) * 1.15
        or 1.0
    )
    scale = Scale(-reach, reach)
    for comparison in known:
        low, high, estimate = comparison.low or 0.0, comparison.high or 0.0, comparison.estimate or 0.0
        drawn.append(
            Difference(
                comparison.arm,
                indices[comparison.arm],
                signed(estimate, digits),
                f"{signed(low, digits)} to {signed(high, digits)}",
                scale.at(0),
                scale.at(low),
                scale.length(low, high),
                scale.at(estimate),
                (scale.at(-margin), scale.length(-margin, margin)) if margin else None,
            )
        )
    return drawn


def _range(low: float, high: float, digits: int) -> str:
    return f"{number(low, digits)} to {number(high, digits)}"


def _digits(outcome: OutcomeReport) -> int:
    """Return the number of decimals that show a tenth of the margin, or of the narrowest interval without a margin."""
    widths = [
        comparison.high - comparison.low
        for comparison in outcome.comparisons
        if comparison.low is not None and comparison.high is not None
    ]
    scale = outcome.margin or min((width for width in widths if width), default=0.01)
    return min(_MOST_DIGITS, max(0, 1 - math.floor(math.log10(scale))))
