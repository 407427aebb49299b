"""Turn exposures and outcomes into a report with verdicts. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np

from gateway.config.registry import Arm, Experiment, Outcome
from gateway.experiments.exposures import iso
from gateway.experiments.outcome_report import OutcomeArm, OutcomeComparison, OutcomeReport, OutcomesReport
from gateway.experiments.sequence import ALPHA, LEAST_UNITS, Difference, units_needed
from gateway.experiments.split import Split, has_same_salt
from gateway.outcomes.comparing import Comparison, compare, describe
from gateway.outcomes.declarations import Declared, why_too_late
from gateway.outcomes.joining import Branch, Exposures, Joined, Outcomes, join
from gateway.outcomes.store import Decision

_Verdict: TypeAlias = Literal["better", "worse", "as good", "not yet"]
_VERDICTS: tuple[_Verdict, ...] = get_args(_Verdict)

Decisions = Callable[[str], Mapping[str, Decision]]
"""Returns the earlier decision about each arm, for a question."""

_LEAST_SECONDS = 60.0  # in a younger experiment, the rate is unknown
_MOST_SECONDS = 100 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Reported:
    """A report, and its new decisions.

    Attributes:
        decided: the decisions of this look, by question and arm, without those of earlier looks.
    """

    report: OutcomesReport
    decided: Mapping[tuple[str, str], Decision]


def no_decisions(_question: str) -> Mapping[str, Decision]:
    """Return the earlier decisions on a question that is asked for the first time: no entry."""
    return {}


def branches_of(experiment: Experiment, generation: str) -> list[Branch]:
    """Return the arms of an experiment as the registry has them."""
    total = sum(arm.weight for arm in experiment.arms)
    return [Branch(generation, arm.label, arm.model, arm.task, arm.weight / total) for arm in experiment.arms]


def report_outcomes(
    experiment: Experiment,
    exposures: Exposures,
    outcomes: Mapping[str, Outcomes],
    now: float,
    earlier: Decisions = no_decisions,
    *,
    declarations: Declared = MappingProxyType({}),
    why_none: str | None = None,
) -> Reported:
    """Report all outcomes of an experiment, the primary one first and with verdicts.

    Args:
        outcomes: the outcomes by name.
        now: the time in seconds since the epoch.
        earlier: the decisions of earlier looks, which remain valid.
        declarations: when each declaration of the outcome was first served.
        why_none: the reason why no verdict can be given, if it is known already, such as a wrong split.
    """
    reports, decided = [], {}
    primary = experiment.outcome
    names = ([primary.name] if primary else []) + [n for n in outcomes if primary is None or n != primary.name]
    for name in names:
        counted, posted = _counted(experiment, exposures, outcomes.get(name, _NONE))
        joined = join(counted, posted)
        declared = primary if primary is not None and name == primary.name else None
        question = _question(experiment, declared) if declared else ""
        why = (
            why_none
            or _why_in_two_arms(counted)
            or (why_too_late(experiment, counted, posted, declarations, now) if declared else None)
        )
        found = _Look(experiment, declared, joined, now, earlier(question) if declared else {}, why)
        report = found.report(name, len(posted.unit))
        reports.append(report)
        for comparison in report.comparisons:
            if comparison.decided == iso(now) and comparison.verdict is not None:
                decided[question, comparison.arm] = Decision(comparison.verdict, iso(now))
    return Reported(OutcomesReport(experiment=experiment.id, as_of=iso(now), outcomes=reports), decided)


_NONE = Outcomes(np.empty(0, np.int64), np.empty(0), np.empty(0), np.empty(0), np.empty(0, np.bool_))


def _counted(experiment: Experiment, exposures: Exposures, outcomes: Outcomes) -> tuple[Exposures, Outcomes]:
    """Return the exposures under the present salt, and both from the time on at which the counts begin.

    Outcomes from before a unit's first exposure always belong to it.
    """
    generation = Split(experiment).generation
    is_ours = np.array([has_same_salt(branch.generation, generation) for branch in exposures.branches], np.bool_)
    since = -np.inf if experiment.counts_from is None else experiment.counts_from.timestamp()
    units = is_ours[exposures.branch] & (exposures.time >= since)
    posts = (outcomes.time >= since) | outcomes.is_before
    return (
        replace(exposures, unit=exposures.unit[units], branch=exposures.branch[units], time=exposures.time[units]),
        Outcomes(
            outcomes.unit[posts],
            outcomes.value[posts],
            outcomes.of[posts],
            outcomes.time[posts],
            outcomes.is_before[posts],
        ),
    )


def _question(experiment: Experiment, outcome: Outcome) -> str:
    """Return a text that identifies the question; another salt, arm, begin or definition of the outcome changes it."""
    control = experiment.control
    parts = [experiment.salt or experiment.id, outcome.model_dump(), control.label, control.model, control.task]
    arms = [[arm.label, arm.model, arm.task] for arm in experiment.arms[1:]]
    since = [] if experiment.counts_from is None else [experiment.counts_from.isoformat()]
    return json.dumps([*parts, arms, *since], sort_keys=True)


def _why_in_two_arms(exposures: Exposures) -> str | None:
    """Return why nothing can be decided: units are in two arms under the same weights, which a split never does."""
    names = sorted({branch.generation for branch in exposures.branches})
    generations = np.array([names.index(branch.generation) for branch in exposures.branches], np.int64)
    order = np.lexsort((generations[exposures.branch], exposures.unit))
    unit, generation = exposures.unit[order], generations[exposures.branch][order]
    num = len(np.unique(unit[1:][(unit[1:] == unit[:-1]) & (generation[1:] == generation[:-1])]))
    if not num:
        return None
    return (
        f"{num:,} of the units are in two arms under the same weights, so the exposures are not those of one split: "
        "do not trust a comparison"
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """One look at one outcome.

    Attributes:
        why_none: why no verdict can be given; ``None`` if one can.
    """

    experiment: Experiment
    declared: Outcome | None
    joined: Joined
    now: float
    earlier: Mapping[str, Decision]
    why_none: str | None

    def report(self, name: str, num_outcomes: int) -> OutcomeReport:
        alpha = ALPHA / self._num_tested
        per = self.declared.per if self.declared else "unit"
        arms = [(arm, describe(self.joined, _branch(arm), per, alpha)) for arm in self.experiment.arms]
        control = self.experiment.control
        return OutcomeReport(
            name=name,
            primary=self.declared is not None,
            per=per,
            better=self.declared.better if self.declared else "more",
            margin=self.declared.margin if self.declared else None,
            outcomes=num_outcomes,
            unmatched=self.joined.num_unmatched,
            arms=[
                OutcomeArm(
                    arm=arm.label,
                    units=found.units,
                    units_with_outcome=found.units_with_outcome,
                    mean=found.mean,
                    low=_ends(found.interval)[1],
                    high=_ends(found.interval)[2],
                )
                for arm, found in arms
            ],
            comparisons=[
                self._comparison(arm, compare(self.joined, _branch(control), _branch(arm), per, alpha), alpha)
                for arm in self.experiment.arms[1:]
            ],
        )

    @property
    def _num_tested(self) -> int:
        """The number of arms that are compared with the control, or were earlier: who drops the worst chooses by results."""
        exposures = self.joined.exposures
        seen = [exposures.branches[index] for index in np.unique(exposures.branch)]
        named = {(arm.label, arm.model, arm.task) for arm in self.experiment.arms}
        control = self.experiment.control
        tested = (named | {(one.arm, one.model, one.task) for one in seen}) - {
            (control.label, control.model, control.task)
        }
        return len(tested)

    def _comparison(self, arm: Arm, found: Comparison, alpha: float) -> OutcomeComparison:
        difference = found.difference
        estimate, low, high = _ends(difference)
        verdict, reason = self._verdict(found)
        decided = None
        if verdict is not None and (before := self.earlier.get(arm.label)):
            verdict, decided = _known(before.verdict), before.time
            reason = f"decided on {before.time[:10]}; the interval is that of now"
        elif verdict not in (None, "not yet"):
            decided = iso(self.now)
        num_needed = None
        if self.declared and difference and difference.deviation:
            num_needed = units_needed(difference.deviation, self.declared.margin, alpha)
        return OutcomeComparison(
            arm=arm.label,
            control=self.experiment.control.label,
            estimate=estimate,
            low=low,
            high=high,
            units=found.units,
            uses_before=found.uses_before,
            generations=found.num_generations,
            verdict=verdict,
            reason=reason,
            decided=decided,
            units_needed=num_needed,
            look_again=self._look_again(arm, found.units, num_needed) if verdict == "not yet" else None,
        )

    def _verdict(self, found: Comparison) -> tuple[_Verdict | None, str]:
        """Return the verdict of this look alone, with the reason."""
        if self.declared is None:
            return None, "models.yaml declares another outcome" if self.experiment.outcome else (
                "models.yaml declares no `outcome`, and without a declared outcome, some difference is always found"
            )
        if self.why_none or found.mismatch:
            return None, self.why_none or (found.mismatch.verdict if found.mismatch else "")
        verdict, reason = (
            _judge(found.difference, self.declared)
            if found.difference
            else ("not yet", f"needs {LEAST_UNITS} units in each arm, and enough of them must differ")
        )
        if verdict == "not yet" and (end := self._end):
            reason += f"; the experiment ended on {end:%Y-%m-%d}, so no more units arrive"
        return verdict, reason

    @property
    def _end(self) -> datetime | None:
        """The time when the experiment ended; ``None`` if it has not ended."""
        end = self.experiment.end
        return end if end is not None and end.timestamp() <= self.now else None

    def _look_again(self, arm: Arm, num_units: int, num_needed: int | None) -> str | None:
        """Return the time when the needed number of units will have arrived, at the rate so far."""
        if self._end or not arm.weight or not self.experiment.control.weight:
            return None
        exposures = self.joined.exposures
        labels = [arm.label, self.experiment.control.label]
        mine = [index for index, branch in enumerate(exposures.branches) if branch.arm in labels]
        times = exposures.time[np.isin(exposures.branch, mine)]
        if num_needed is None or not len(times) or (seconds := self.now - float(times.min())) < _LEAST_SECONDS:
            return None
        missing = max(0, num_needed - num_units)
        when = self.now + missing * seconds / max(1, num_units)
        return iso(when) if when < self.now + _MOST_SECONDS else None


def _ends(found: Difference | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if found is None else (found.estimate, found.low, found.high)


def _judge(difference: Difference, outcome: Outcome) -> tuple[_Verdict, str]:
    low, high = difference.low, difference.high
    if low > 0 or high < 0:
        is_more = low > 0
        return ("better" if is_more == (outcome.better == "more") else "worse"), "the interval excludes 0"
    if -outcome.margin < low and high < outcome.margin:
        return "as good", f"the interval is within the margin of {outcome.margin:g}"
    return "not yet", f"the interval contains 0, and reaches beyond the margin of {outcome.margin:g}"


def _branch(arm: Arm) -> Branch:
    return Branch("", arm.label, arm.model, arm.task, 0.0)


def _known(verdict: str) -> _Verdict:
    return next((known for known in _VERDICTS if known == verdict), "not yet")
