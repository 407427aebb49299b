"""Experiments: the list, and the figures of each."""

from __future__ import annotations

from fastapi import APIRouter, Request

from gateway.api.endpoint import add
from gateway.api.wire import responses
from gateway.config.registry import Experiment
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import ExperimentNotFound, ModelNotAllowed
from gateway.experiments.report import ExperimentList, ExperimentReport, describe_experiment
from gateway.experiments.stats import ExperimentStats
from gateway.http.context import RequestContext

_ANSWERS = responses(ExperimentReport, ModelNotAllowed, ExperimentNotFound)


class Experiments:
    """The handlers: the list, and the figures of one."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats) -> None:
        self._deployment = deployment
        self._stats = stats

    async def list_experiments(self, request: Request) -> ExperimentList:
        """List the experiments of the registry that the key may use."""
        return ExperimentList(
            data=[describe_experiment(experiment) for experiment in _usable(self._deployment, request)]
        )

    async def retrieve_experiment(self, request: Request, experiment_id: str) -> ExperimentReport:
        """Show the arms of an experiment side by side, and whether the split is as it should be."""
        experiment = find_experiment(self._deployment, request, experiment_id)
        generation = self._deployment.router.generation(experiment.id)
        since = self._deployment.counting_since[experiment.id]
        return self._stats.report(experiment, generation, since)


def find_experiment(deployment: Deployment, request: Request, experiment_id: str) -> Experiment:
    """Return the experiment with an id.

    Raises:
        ExperimentNotFound: no experiment has it.
        ModelNotAllowed: the client may not use it.
    """
    experiment, usable = deployment.registry.experiment(experiment_id), _usable(deployment, request)
    if experiment is None:
        known = ", ".join(other.id for other in usable) or "none"
        raise ExperimentNotFound(f"no experiment is called {cut(experiment_id)!r}; there are: {known}")
    if experiment not in usable:
        raise ModelNotAllowed(f"this API key is not for experiment {experiment.id!r}", param="model")
    return experiment


def _usable(deployment: Deployment, request: Request) -> list[Experiment]:
    """Return the experiments that the client may use."""
    client, names = RequestContext.of(request).client, deployment.router.names
    return [experiment for experiment in deployment.registry.experiments if names.allows(client, experiment.id)]


def experiments_router(deployment: Deployment, stats: ExperimentStats) -> APIRouter:
    """Return the routes of the experiments, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    handlers = Experiments(deployment, stats)
    add(router, "/experiments", handlers.list_experiments, responses(ExperimentList))
    add(router, "/experiments/{experiment_id:path}", handlers.retrieve_experiment, _ANSWERS)
    return router
