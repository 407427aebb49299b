"""The experiment pages: the split, slow or failing arms, the arm of a unit, new weights, and the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from fastapi import Request, Response

from gateway.api.assignments import COST_OF_UNIT
from gateway.api.experiment_changes import (
    change_experiment,
    count_again,
    end_experiment,
    reweighted,
)
from gateway.api.experiments import find_experiment
from gateway.config.editing import Change
from gateway.config.registry import Experiment
from gateway.config.traffic import MAX_WEIGHT
from gateway.console.arrivals import MAX_BARS, ArrivalsView, view_arrivals
from gateway.console.charts import Scale
from gateway.console.outcomes import OutcomeView, decided, view_outcomes
from gateway.console.parts import Parts
from gateway.console.web import Form, read_form, visitor_of
from gateway.errors import BadInput, OutcomesUnavailable, RequestError
from gateway.experiments.report import ExperimentReport, Guardrail
from gateway.experiments.split import Assignment
from gateway.http.context import RequestContext
from gateway.routing.changes import NUM_SAMPLED, moved_units

_MAX_UNIT = 256


@dataclass(frozen=True, slots=True)
class Whisker:
    """An interval to draw, in percent of the width.

    Attributes:
        zero: the position of "no difference".
    """

    guardrail: Guardrail
    index: int
    zero: str
    start: str
    width: str
    point: str


@dataclass(frozen=True, slots=True)
class DiffLine:
    """A line of a change to ``models.yaml``, with ``+``, ``-`` or a blank before it."""

    sign: str
    text: str


@dataclass(frozen=True, slots=True)
class Ramp:
    """New weights, and their consequences.

    Attributes:
        weights: the weights by arm, as they were written.
        moves: the share of all units that move between two arms: ``jina -> bge``.
    """

    weights: Mapping[str, str]
    moves: Mapping[str, float]
    diff: Sequence[DiffLine]

    @property
    def is_change(self) -> bool:
        """Whether any weight changes."""
        return any(line.sign != " " for line in self.diff)

    @property
    def text(self) -> str:
        """The lines as they should be in ``models.yaml``."""
        return "\n".join(line.text for line in self.diff if line.sign != "-")


class Experiments:
    """The handlers of the pages."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def first(self, request: Request) -> Response:
        """Show the first experiment, or explain how to begin one."""
        usable = self._usable(request)
        if not usable:
            return self._parts.pages.render(request, "experiment_none.html.j2")
        return await self._page(request, usable[0])

    async def show(self, request: Request) -> Response:
        """Show one experiment."""
        return await self._page(request, self._find(request))

    async def assign(self, request: Request) -> Response:
        """Show the arm of a unit. Nothing is counted."""
        experiment = self._find(request)
        unit = (await read_form(request)).first("unit").strip()
        if not 0 < len(unit.encode()) <= _MAX_UNIT:
            return await self._refuse(
                request, experiment, f"a unit has 1 to {_MAX_UNIT} bytes, this one has {len(unit.encode())}"
            )
        router, force = self._parts.deployment.router, experiment.force
        choice = router.choose(
            experiment.id, visitor_of(request).client, lambda source: None if source == force else unit
        )
        return await self._page(request, experiment, unit=unit, assignment=choice.assignment)

    async def ramp(self, request: Request) -> Response:
        """Show the effect of new weights, as lines for ``models.yaml``, and ask whether to write them."""
        experiment = self._find(request)
        try:
            weights = _weights(experiment, await read_form(request))
            changed = reweighted(experiment, {label: float(weight) for label, weight in weights.items()})
        except RequestError as error:
            return await self._refuse(request, experiment, error.message)
        endpoint, work = self._parts.endpoint, partial(moved_units, experiment, changed)
        moves = await endpoint.in_turn(request, NUM_SAMPLED * COST_OF_UNIT, work, endpoint.tokenizing)
        return await self._page(request, experiment, ramp=Ramp(weights, moves, _diff(experiment, changed)))

    async def change(self, request: Request) -> Response:
        """Write new weights into ``models.yaml``, and serve them."""
        experiment = self._find(request)
        form = await read_form(request)
        try:
            weights = {label: float(weight) for label, weight in _weights(experiment, form).items()}
            if form.first("generation") != self._generation(experiment):
                raise BadInput("the experiment was changed in the meantime; look at the change again")
            reweighted(experiment, weights)
            reloaded = await change_experiment(self._parts.deployment, experiment, Change(weights))
        except RequestError as error:
            return await self._refuse(request, experiment, error.message)
        return self._done(request, experiment, reloaded.experiments.get(experiment.id, "nothing has changed"))

    async def ask_end(self, request: Request) -> Response:
        """Ask whether to end an experiment."""
        return await self._page(request, self._find(request), is_ending=True)

    async def end(self, request: Request) -> Response:
        """End an experiment now."""
        experiment = self._find(request)
        try:
            await end_experiment(self._parts.deployment, experiment)
        except RequestError as error:
            return await self._refuse(request, experiment, error.message)
        return self._done(request, experiment, f"ended: {experiment.control.label} answers all requests")

    async def ask_count_again(self, request: Request) -> Response:
        """Ask whether to begin the counts again."""
        return await self._page(request, self._find(request), is_counting_again=True)

    async def count_again(self, request: Request) -> Response:
        """Begin the counts again."""
        experiment = self._find(request)
        try:
            await count_again(self._parts.deployment, experiment)
        except RequestError as error:
            return await self._refuse(request, experiment, error.message)
        return self._done(request, experiment, "its counts begin again now")

    # ---------------------------------------------------------------------------------------------------------- parts

    def _usable(self, request: Request) -> list[Experiment]:
        names, client = self._parts.deployment.router.names, visitor_of(request).client
        return [
            experiment
            for experiment in self._parts.deployment.registry.experiments
            if names.allows(client, experiment.id)
        ]

    def _find(self, request: Request) -> Experiment:
        return find_experiment(self._parts.deployment, request, request.path_params["experiment_id"])

    def _generation(self, experiment: Experiment) -> str:
        return self._parts.deployment.router.generation(experiment.id)

    def _arrivals(self, experiment: Experiment) -> ArrivalsView | None:
        """Return the drawing of the units over time, by hour or, for a longer time, by day."""
        stats, generation = self._parts.stats, self._generation(experiment)
        by_hour = stats.units_over_time(experiment, generation, "hour")
        if len(by_hour.data) <= MAX_BARS:
            return view_arrivals(by_hour)
        return view_arrivals(stats.units_over_time(experiment, generation, "day"))

    def _done(self, request: Request, experiment: Experiment, message: str) -> Response:
        text = f"models.yaml was written and is served. {experiment.id}: {message}."
        return self._parts.done(request, f"/experiments/{quote(experiment.id)}", text)

    async def _refuse(self, request: Request, experiment: Experiment, message: str) -> Response:
        error = BadInput(message)
        RequestContext.of(request).refuse(error)
        return await self._page(request, experiment, problem=error)

    async def _report(self, experiment: Experiment) -> tuple[ExperimentReport, RequestError | None]:
        """Return the report, and the reason if its outcomes cannot be read; the rest is shown anyway."""
        try:
            return await self._parts.full_report(experiment), None
        except OutcomesUnavailable as error:
            return self._parts.report(experiment), error

    async def _page(
        self,
        request: Request,
        experiment: Experiment,
        *,
        unit: str = "",
        assignment: Assignment | None = None,
        ramp: Ramp | None = None,
        is_ending: bool = False,
        is_counting_again: bool = False,
        problem: RequestError | None = None,
    ) -> Response:
        report, no_outcomes = await self._report(experiment)
        outcomes = view_outcomes(report)
        fleet = self._parts.deployment.fleet
        infos = {arm.label: model.info for arm in experiment.arms if (model := fleet.get(arm.model)) is not None}
        return self._parts.pages.render(
            request,
            "experiment.html.j2",
            200 if problem is None else problem.status,
            experiments=self._usable(request),
            experiment=experiment,
            report=report,
            conclusion=_conclude(report, outcomes),
            outcomes=outcomes,
            no_outcomes=no_outcomes,
            spaces={label: info.space() if info else None for label, info in infos.items()},
            whiskers=_whiskers(report),
            arrivals=self._arrivals(experiment),
            shares=[_share(report, index) for index in range(len(report.evidence))],
            unit=unit,
            assignment=assignment,
            arm_index={arm.label: index for index, arm in enumerate(experiment.arms)},
            ramp=ramp,
            is_ending=is_ending,
            is_counting_again=is_counting_again,
            generation=self._generation(experiment),
            problem=problem,
            done=self._parts.pages.gate.take_message(request),
        )


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The headline of an experiment."""

    level: str
    title: str
    text: str


def _conclude(report: ExperimentReport, outcomes: Sequence[OutcomeView]) -> Conclusion:
    """Return the conclusion that the figures allow now."""
    if report.mismatch:
        ratio = report.sample_ratio if report.sample_ratio.mismatch else report.request_ratio or report.sample_ratio
        return Conclusion("bad", "The split does not match the weights: trust no comparison", f"{ratio.verdict}.")
    if not report.running:
        if verdicts := decided(outcomes):
            text = f"{outcomes[0].outcome.name}: {verdicts[0].reason}. Not running: the first arm answers all requests."
            return Conclusion(verdicts[0].level, verdicts[0].sentence, text)
        return Conclusion("", "Not running", "The first arm answers all requests.")
    if report.warnings:
        return Conclusion("warn", "These figures say little", " ".join(f"{warning}." for warning in report.warnings))
    if not any(arm.requests or arm.units for arm in report.evidence):
        return Conclusion("", "No requests yet", f"Clients send `model: {report.id}` and a unit.")
    return _conclude_from_units(report, outcomes)


def _conclude_from_units(report: ExperimentReport, outcomes: Sequence[OutcomeView]) -> Conclusion:
    worse = [guardrail for guardrail in report.guardrails if guardrail.verdict == "worse"]
    if worse:
        names = ", ".join(f"{guardrail.arm} in {guardrail.metric}" for guardrail in worse)
        return Conclusion("bad", "An arm is worse in something that should not suffer", f"{names}.")
    if verdicts := decided(outcomes):
        first = verdicts[0]
        return Conclusion(first.level, first.sentence, f"{outcomes[0].outcome.name}: {first.reason}.")
    if outcomes and outcomes[0].is_doubtful:
        return Conclusion("warn", "No verdict", f"{outcomes[0].note}.")
    return _conclude_undecided(report, outcomes)


def _conclude_undecided(report: ExperimentReport, outcomes: Sequence[OutcomeView]) -> Conclusion:
    """Return the conclusion while no outcome has a verdict and no guardrail is worse."""
    if not report.guardrails:
        text = "An arm is compared with the first one only while both have a weight."
        return Conclusion("", "Nothing to compare with these weights", text)
    if undecided := [verdict for view in outcomes for verdict in view.verdicts]:
        return Conclusion("", "Not yet: keep it running", f"{undecided[0].arm}: {undecided[0].next}")
    if all(guardrail.verdict == "not yet" for guardrail in report.guardrails):
        num_units = sum(arm.units for arm in report.evidence)
        least = max(guardrail.least_units for guardrail in report.guardrails)
        return Conclusion(
            "",
            "Too early: keep it running",
            f"{num_units:,} units so far; the gateway compares an arm from {least:,} units on, if enough of them differ.",
        )
    return Conclusion(
        "good", "The split matches the weights", "No arm was found slower or less reliable than the first."
    )


def _whiskers(report: ExperimentReport) -> list[Whisker]:
    """Return the drawings of the guardrails that have an interval: latency as a ratio, errors as a difference."""
    indices = {arm.arm: index for index, arm in enumerate(report.evidence)}
    drawn = []
    for guardrail in report.guardrails:
        if guardrail.estimate is None or guardrail.low is None or guardrail.high is None:
            continue
        none = 1.0 if guardrail.metric == "latency" else 0.0
        reach = max(abs(guardrail.low - none), abs(guardrail.high - none)) * 1.15 or 1.0
        scale = Scale(none - reach, none + reach)
        drawn.append(
            Whisker(
                guardrail,
                indices[guardrail.arm],
                scale.at(none),
                scale.at(guardrail.low),
                scale.length(guardrail.low, guardrail.high),
                scale.at(guardrail.estimate),
            )
        )
    return drawn


def _share(report: ExperimentReport, index: int) -> float | None:
    total = sum(arm.units for arm in report.evidence)
    return report.evidence[index].units / total if total else None


def _weights(experiment: Experiment, form: Form) -> dict[str, str]:
    """Return the weights of a form by arm, as they were written.

    Raises:
        BadInput: a weight is missing, or is not a number.
    """
    weights = dict(zip((arm.label for arm in experiment.arms), form.all("weight"), strict=False))
    for arm in experiment.arms:
        try:
            float(weights.get(arm.label, ""))
        except ValueError:
            raise BadInput(f"the weight of {arm.label!r} must be a number from 0 to {MAX_WEIGHT:,.0f}") from None
    return weights


def _diff(before: Experiment, after: Experiment) -> list[DiffLine]:
    lines = [DiffLine(" ", f"  - id: {before.id}"), DiffLine(" ", "    arms:")]
    for old, new in zip(before.arms, after.arms, strict=True):
        lines.append(DiffLine(" ", f"      - model: {old.model}"))
        if old.name:
            lines.append(DiffLine(" ", f"        name: {old.name}"))
        if old.task:
            lines.append(DiffLine(" ", f"        task: {old.task}"))
        if old.weight == new.weight:
            lines.append(DiffLine(" ", f"        weight: {old.weight:g}"))
        else:
            lines += [
                DiffLine("-", f"        weight: {old.weight:g}"),
                DiffLine("+", f"        weight: {new.weight:g}"),
            ]
    return lines
