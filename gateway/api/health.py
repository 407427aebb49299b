"""Liveness, readiness and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.api.schema import Live, Ready, error_responses
from gateway.deployment import Deployment
from gateway.telemetry import metrics


def health_router(deployment: Deployment) -> APIRouter:
    """Return the routes that orchestrators and monitoring ask."""
    router = APIRouter(tags=["Health"])

    async def live() -> Live:
        """Answer as long as the process can: restart it when this fails."""
        return Live(status="ok")

    async def ready(response: Response) -> Ready:
        """Say whether requests are answered: 503 while models load, or when none could be loaded."""
        fleet = deployment.fleet
        is_ready = fleet.is_ready
        response.status_code = 200 if is_ready else 503
        if not is_ready:
            response.headers["retry-after"] = "5"
        return Ready.model_validate(
            {
                "status": "ready" if is_ready else "not_ready",
                "models": [{"id": m.id, "state": m.state.value, "reason": m.reason or None} for m in fleet],
            }
        )

    async def prometheus() -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Not ready."}}
    router.add_api_route("/health/live", live)
    router.add_api_route("/health/ready", ready, responses=not_ready)
    router.add_api_route("/health", ready, responses=not_ready, operation_id="health")
    router.add_api_route(
        "/metrics",
        prometheus,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **error_responses()},
    )
    return router
