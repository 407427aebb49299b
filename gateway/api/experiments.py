"""Experiments: which there are, and what came of them."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import asdict
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gateway.api.endpoint import add
from gateway.api.wire import responses
from gateway.config.registry import Experiment
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import ExperimentNotFound, ModelNotAllowed
from gateway.experiments.stats import ExperimentReport, ExperimentStats, is_running
from gateway.http.middleware import RequestContext


class ArmCard(BaseModel):
    """One arm as the registry has it."""

    arm: str
    model: str
    task: str | None
    weight: float


class ExperimentCard(BaseModel):
    """One experiment as the registry has it."""

    id: str
    object: Literal["experiment"]
    kind: str
    start: str | None
    end: str | None
    running: bool = Field(description="Whether requests are split now; otherwise the first arm answers all.")
    arms: list[ArmCard] = Field(description="The first is the control.")


class ExperimentList(BaseModel):
    """Every experiment of the registry."""

    object: Literal["list"]
    data: list[ExperimentCard]


class ArmEvidence(BaseModel):
    """One arm in figures: of the requests that were counted, since this process started."""

    arm: str
    model: str
    weight: float
    share: float = Field(description="The share of the units that the weight asks for.")
    units: int = Field(description="Distinct units, with those of the exposure log.")
    requests: int
    errors: int
    error_rate: float
    texts: int
    tokens: int
    tokens_per_s: float | None = Field(description="Tokens of an average request by its average time.")
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    queue_p95_s: float | None


class SampleRatioCard(BaseModel):
    """A chi-square test of the units against the weights."""

    chi2: float | None
    degrees: int
    p: float | None
    mismatch: bool
    verdict: str


class ExperimentEvidence(ExperimentCard):
    """An experiment and what came of it, under its present arms and weights."""

    generation: str = Field(description="Stands for salt, arms and weights; counts begin anew with each.")
    since: str = Field(description="When this process began to count requests under these arms and weights.")
    units_since: str | None = Field(description="When the first of the units was seen.")
    evidence: list[ArmEvidence]
    uncounted: dict[str, int] = Field(description="Requests that were not part of the split, by reason.")
    sample_ratio: SampleRatioCard
    warning: str | None = Field(
        description="Why the figures tell nothing, where that is known: no request has a unit, say."
    )


_ANSWERS = responses(ExperimentEvidence, ModelNotAllowed, ExperimentNotFound)


class Experiments:
    """The handlers: the list, and the figures of one."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats) -> None:
        self._deployment = deployment
        self._stats = stats

    async def list_experiments(self, request: Request) -> ExperimentList:
        """List the experiments of the registry that the key may use."""
        return ExperimentList(object="list", data=[_card(experiment) for experiment in self._usable(request)])

    async def retrieve_experiment(self, request: Request, experiment_id: str) -> ExperimentEvidence:
        """Show the arms of an experiment side by side, and whether the split is as it should be."""
        # The test of the split needs it, and its first import takes a second, in which no request would be answered.
        # First of all, so that no reload comes between the steps below.
        await asyncio.to_thread(importlib.import_module, "scipy.stats")
        experiment, usable = self._deployment.registry.experiment(experiment_id), self._usable(request)
        if experiment is None:
            known = ", ".join(other.id for other in usable) or "none"
            raise ExperimentNotFound(f"no experiment is called {cut(experiment_id)!r}; there are: {known}")
        if experiment not in usable:
            raise ModelNotAllowed(f"this API key is not for experiment {experiment.id!r}", param="model")
        generation = self._deployment.router.generation(experiment.id)
        since = self._deployment.counting_since[experiment.id]
        return present(experiment, self._stats.report(experiment, generation, since))

    def _usable(self, request: Request) -> list[Experiment]:
        """Return the experiments that the client may use."""
        client, names = RequestContext.of(request).client, self._deployment.router.names
        return [
            experiment for experiment in self._deployment.registry.experiments if names.allows(client, experiment.id)
        ]


def experiments_router(deployment: Deployment, stats: ExperimentStats) -> APIRouter:
    """Return the routes of the experiments, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    handlers = Experiments(deployment, stats)
    add(router, "/experiments", handlers.list_experiments, responses(ExperimentList))
    add(router, "/experiments/{experiment_id:path}", handlers.retrieve_experiment, _ANSWERS)
    return router


def present(experiment: Experiment, report: ExperimentReport) -> ExperimentEvidence:
    """Put together what the registry says of an experiment and what came of it."""
    return ExperimentEvidence.model_validate(
        _card(experiment).model_dump()
        | {
            "generation": report.generation,
            "since": report.since,
            "units_since": report.units_since,
            "evidence": [asdict(arm) for arm in report.arms],
            "uncounted": dict(report.uncounted),
            "sample_ratio": asdict(report.sample_ratio),
            "warning": report.warning,
        }
    )


def _card(experiment: Experiment) -> ExperimentCard:
    return ExperimentCard(
        id=experiment.id,
        object="experiment",
        kind=experiment.kind,
        start=experiment.start.isoformat() if experiment.start else None,
        end=experiment.end.isoformat() if experiment.end else None,
        running=is_running(experiment),
        arms=[ArmCard(arm=arm.label, model=arm.model, task=arm.task, weight=arm.weight) for arm in experiment.arms],
    )
