"""The common parts of all views: the deployment, the API's own steps, and the pages."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request, Response

from gateway.api.endpoint import Endpoint
from gateway.api.experiments import Experiments
from gateway.config.registry import Experiment
from gateway.console.web import Pages, visitor_of
from gateway.deployment import Deployment
from gateway.experiments.report import ExperimentReport
from gateway.experiments.stats import ExperimentStats
from gateway.types import ModelKind, ModelState


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the gateway that the views use in process, as the API does."""

    deployment: Deployment
    endpoint: Endpoint
    stats: ExperimentStats
    reports: Experiments
    pages: Pages

    def report(self, experiment: Experiment) -> ExperimentReport:
        """Return the figures of an experiment without its outcomes, which need a thread."""
        deployment = self.deployment
        generation = deployment.router.generation(experiment.id)
        return self.stats.report(experiment, generation, deployment.counting_since[experiment.id])

    async def full_report(self, experiment: Experiment) -> ExperimentReport:
        """Return the figures of an experiment, with its outcomes if they are kept.

        Raises:
            ExperimentNotFound: a reload has removed it.
            OutcomesUnavailable: the file of experiments cannot be read now.
        """
        return await self.reports.report(experiment)

    def arm_names(self, request: Request) -> list[str]:
        """Return the arms that a reader may enter in the playground and in a comparison."""
        router, client = self.deployment.router, visitor_of(request).client
        names: list[str] = []
        for choice in router.listed(client):
            info = choice.model.info
            if choice.experiment is not None or info is None or info.kind is not ModelKind.EMBED:
                continue
            names += [choice.asked, *(f"{choice.asked}:{task}" for task in info.tasks if choice.task is None)]
            names += [f"{choice.asked}@{size}" for size in info.dimensions[1:]]
            names += [f"{choice.asked}:binary", *(f"{choice.asked}+{output}" for output in info.outputs[1:])]
        return names

    def usual_arms(self, request: Request) -> list[str]:
        """Return the first two models that a reader may use."""
        router, client = self.deployment.router, visitor_of(request).client
        return [
            choice.asked
            for choice in router.listed(client)
            if choice.experiment is None
            and choice.model.state is ModelState.READY
            and choice.model.info is not None
            and choice.model.info.kind is ModelKind.EMBED
        ][:2]

    def done(self, request: Request, path: str, message: str) -> Response:
        """Redirect to a page, which then shows a message."""
        self.pages.gate.leave_message(request, message)
        return self.pages.redirect(request, path)
