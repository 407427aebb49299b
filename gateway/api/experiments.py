"""Experiments: the list, and the figures of each."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import get_args

from fastapi import APIRouter, Request

from gateway.api.endpoint import add
from gateway.api.wire import responses
from gateway.config.registry import Experiment
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import BadInput, ExperimentNotFound, ModelNotAllowed, OutcomesUnavailable
from gateway.experiments.arrivals import Step
from gateway.experiments.report import ExperimentList, ExperimentReport, UnitsOverTime, describe_experiment
from gateway.experiments.stats import ExperimentStats
from gateway.http.context import RequestContext
from gateway.outcomes.keeper import Keeper
from gateway.outcomes.traffic import Wanted

_ANSWERS = responses(ExperimentReport, ModelNotAllowed, ExperimentNotFound, OutcomesUnavailable)
# Some milliseconds of the event loop.
_AT_ONCE = 1_000


class Experiments:
    """The handlers: the list, and the figures of one."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats, keeper: Keeper | None) -> None:
        self._deployment = deployment
        self._stats = stats
        self._keeper = keeper

    async def list_experiments(self, request: Request) -> ExperimentList:
        """List the experiments of the registry that the key may use."""
        return ExperimentList(
            data=[describe_experiment(experiment) for experiment in _usable(self._deployment, request)]
        )

    async def retrieve_experiment(self, request: Request, experiment_id: str) -> ExperimentReport:
        """Show the arms of an experiment side by side, and whether the split matches the weights."""
        return await self.report(find_experiment(self._deployment, request, experiment_id))

    async def report(self, experiment: Experiment) -> ExperimentReport:
        """Return the figures of an experiment, with its outcomes if they are kept.

        Raises:
            ExperimentNotFound: a reload has removed it.
            OutcomesUnavailable: the file of experiments cannot be read now.
        """
        if self._keeper is not None:
            await self._count_units_of_others(self._keeper)
        current = self._deployment.registry.experiment(experiment.id)  # a reload may have happened in the meantime
        if current is None:
            raise ExperimentNotFound(f"experiment {experiment.id!r} no longer exists: the registry was reloaded")
        experiment = current
        generation = self._deployment.router.generation(experiment.id)
        since = self._deployment.counting_since[experiment.id]
        if self._keeper is not None:
            await self._count_requests_of_others(self._keeper, experiment, generation, since)
        report = self._stats.report(experiment, generation, since)
        if self._keeper is None:
            return report
        ratios = (report.sample_ratio, report.request_ratio)
        mismatch = next((ratio.verdict for ratio in ratios if ratio is not None and ratio.mismatch), None)
        outcomes = await self._keeper.report(experiment, mismatch)
        warnings = [*report.warnings, *await self._keeper.warnings(experiment)]
        return report.model_copy(update={"outcomes": outcomes, "warnings": warnings})

    async def retrieve_units(self, request: Request, experiment_id: str, step: str = "hour") -> UnitsOverTime:
        """Show when the units of each arm arrived, by hour or by day."""
        known = next((name for name in get_args(Step) if name == step), None)
        if known is None:
            raise BadInput(f"`step` must be `hour` or `day`, got {cut(step)!r}", param="step")
        return await self.units(find_experiment(self._deployment, request, experiment_id), known)

    async def units(self, experiment: Experiment, step: Step) -> UnitsOverTime:
        """Return when the units arrived, with those of other replicas that share the file.

        Raises:
            OutcomesUnavailable: the file of experiments cannot be read now.
        """
        if self._keeper is not None:
            await self._count_units_of_others(self._keeper)
        generation = self._deployment.router.generation(experiment.id)
        return self._stats.units_over_time(experiment, generation, step)

    async def _count_requests_of_others(
        self, keeper: Keeper, experiment: Experiment, generation: str, since: str
    ) -> None:
        """Count the requests of other replicas that share the file, and of this one before it was started."""
        version = self._stats.stored_version(experiment.id, generation)
        wanted = Wanted((experiment.id, generation), since, version)
        await keeper.traffic.refresh(wanted, partial(self._stats.restore, experiment, generation))

    async def _count_units_of_others(self, keeper: Keeper) -> None:
        """Count the new units of other replicas that share the file."""
        while exposures := await keeper.read_new():
            for first in range(0, len(exposures), _AT_ONCE):
                self._stats.add(exposures[first : first + _AT_ONCE])
                await asyncio.sleep(0)


def find_experiment(deployment: Deployment, request: Request, experiment_id: str) -> Experiment:
    """Return the experiment with an id.

    Raises:
        ExperimentNotFound: no experiment has this id.
        ModelNotAllowed: the client may not use it.
    """
    experiment, usable = deployment.registry.experiment(experiment_id), _usable(deployment, request)
    if experiment is None:
        known = ", ".join(other.id for other in usable) or "none"
        shown = cut(deployment.router.names.shown(experiment_id))  # a unit may follow the id of an experiment
        raise ExperimentNotFound(f"no experiment is called {shown!r}; available: {known}")
    if experiment not in usable:
        raise ModelNotAllowed(f"this API key may not use experiment {experiment.id!r}", param="model")
    return experiment


def _usable(deployment: Deployment, request: Request) -> list[Experiment]:
    """Return the experiments that the client may use."""
    client, names = RequestContext.of(request).client, deployment.router.names
    return [experiment for experiment in deployment.registry.experiments if names.allows(client, experiment.id)]


def experiments_router(handlers: Experiments) -> APIRouter:
    """Return the routes of the experiments, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    add(router, "/experiments", handlers.list_experiments, responses(ExperimentList))
    add(
        router,
        "/experiments/{experiment_id:path}/units",
        handlers.retrieve_units,
        responses(UnitsOverTime, BadInput, ModelNotAllowed, ExperimentNotFound, OutcomesUnavailable),
    )
    add(router, "/experiments/{experiment_id:path}", handlers.retrieve_experiment, _ANSWERS)
    return router
