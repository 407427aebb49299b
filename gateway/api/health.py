"""Is it alive, has it started, is it ready."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from gateway.deployment import Deployment


class Live(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class ModelHealth(BaseModel):
    """State of one model."""

    id: str
    state: str
    reason: str | None


class Ready(BaseModel):
    """Whether requests are answered, and the state of each model."""

    status: Literal["ready", "not_ready", "draining"]
    models: list[ModelHealth]


def health_router(deployment: Deployment) -> APIRouter:
    """Return the routes that orchestrators and monitoring ask."""
    router = APIRouter(tags=["Health"])

    async def live() -> Live:
        """Answer as long as the process can: restart it when this fails."""
        return Live(status="ok")

    async def started(response: Response) -> Ready:
        """Say whether loading has come to an end, well or not: 503 until then."""
        return _tell(response, deployment, is_fine=deployment.fleet.started.is_set())

    async def ready(response: Response) -> Ready:
        """Say whether requests are answered: 503 while models load, when none could be loaded, and when stopping."""
        return _tell(response, deployment, is_fine=deployment.is_ready)

    async def whole_server() -> Response:
        """Answer `OPTIONS *`, which asks what the server as a whole can do (RFC 9110, 9.3.7)."""
        return Response(status_code=204, headers={"allow": "GET, HEAD, POST, OPTIONS"})

    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Not ready."}}
    router.add_api_route("/health/live", live)
    router.add_api_route("/health/ready", ready, responses=not_ready)
    router.add_api_route("/health", ready, responses=not_ready, operation_id="health")
    router.add_api_route("/health/startup", started, responses=not_ready)
    router.add_api_route("/*", whole_server, methods=["OPTIONS"], include_in_schema=False)
    return router


def _tell(response: Response, deployment: Deployment, *, is_fine: bool) -> Ready:
    if not is_fine:
        response.status_code = 503
        response.headers["retry-after"] = "5"
    status = "draining" if deployment.is_draining else "ready" if is_fine else "not_ready"
    models = [{"id": m.id, "state": m.state.value, "reason": m.reason or None} for m in deployment.fleet]
    return Ready.model_validate({"status": status, "models": models})
