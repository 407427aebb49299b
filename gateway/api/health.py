"""Health checks: is the process alive, started, ready?"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from fastapi import APIRouter, Response
from pydantic import BaseModel

from gateway.api.wire import AnswerBody
from gateway.deployment import Deployment

Status: TypeAlias = Literal["ready", "not_ready", "draining"]


class Live(AnswerBody):
    """The process responds."""

    status: Literal["ok"] = "ok"


class ModelHealth(BaseModel):
    """State of one model."""

    id: str
    state: str
    reason: str | None


class Ready(BaseModel):
    """Whether requests are answered, and the state of each model."""

    status: Status
    models: list[ModelHealth]


_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Not ready."}}


class Health:
    """The handlers for orchestrators and monitoring."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    async def live(self) -> Live:
        """Respond 200 as long as the process works; restart it if this fails."""
        return Live()

    async def started(self, response: Response) -> Ready:
        """Respond 200 once loading has ended, successfully or not; 503 until then."""
        return self._report(response, is_fine=self._deployment.fleet.started.is_set())

    async def ready(self, response: Response) -> Ready:
        """Respond 200 while requests are served; 503 while loading, while stopping, and if no model could be loaded."""
        return self._report(response, is_fine=self._deployment.is_ready)

    async def whole_server(self) -> Response:
        """Respond to `OPTIONS *`, which asks for the capabilities of the whole server (RFC 9110, 9.3.7)."""
        return Response(status_code=204, headers={"allow": "GET, HEAD, POST, OPTIONS"})

    def _report(self, response: Response, *, is_fine: bool) -> Ready:
        if not is_fine:
            response.status_code = 503
            response.headers["retry-after"] = "5"
        models = [ModelHealth(id=m.id, state=m.state.value, reason=m.reason or None) for m in self._deployment.fleet]
        status: Status = "draining" if self._deployment.is_draining else "ready" if is_fine else "not_ready"
        return Ready(status=status, models=models)


def health_router(deployment: Deployment) -> APIRouter:
    """Return the routes for orchestrators and monitoring."""
    router = APIRouter(tags=["Health"])
    health = Health(deployment)
    router.add_api_route("/health/live", health.live)
    router.add_api_route("/health/ready", health.ready, responses=_NOT_READY)
    router.add_api_route("/health", health.ready, responses=_NOT_READY, operation_id="health")
    router.add_api_route("/health/startup", health.started, responses=_NOT_READY)
    router.add_api_route("/*", health.whole_server, methods=["OPTIONS"], include_in_schema=False)
    return router
