"""What every view uses: the deployment, the API's own steps, and the pages."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request, Response

from gateway.api.endpoint import Endpoint
from gateway.api.experiments import Experiments
from gateway.config.registry import Experiment
from gateway.console.web import Pages, visitor_of
from gateway.deployment import Deployment
from gateway.errors import Forbidden
from gateway.experiments.report import ExperimentReport
from gateway.experiments.stats import ExperimentStats


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the gateway that the views ask, in process, as the API does."""

    deployment: Deployment
    endpoint: Endpoint
    stats: ExperimentStats
    reports: Experiments
    pages: Pages

    def report(self, experiment: Experiment) -> ExperimentReport:
        """Return the figures of an experiment, without its outcomes: those take a thread."""
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

    def require_operator(self, request: Request) -> None:
        """Let only the operator pass.

        Raises:
            Forbidden: the reader has not signed in with the operator's key.
        """
        if not visitor_of(request).is_operator:
            advice = (
                "sign in with it" if self.pages.gate.has_operator else "set GATEWAY_ADMIN_KEY, then sign in with it"
            )
            raise Forbidden(f"this needs the operator's key: {advice}")

    def done(self, request: Request, path: str, message: str) -> Response:
        """Go back to a page, which shows a message."""
        self.pages.gate.leave_message(request, message)
        return self.pages.redirect(request, path)
