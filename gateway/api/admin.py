"""What the operator may ask of a running gateway: its metrics, and to read its registry anew."""

from __future__ import annotations

import hmac
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, SecretStr

from gateway.access.keyring import key_digest
from gateway.api.wire import error_responses, responses
from gateway.deployment import Deployment
from gateway.errors import Forbidden, ReloadRefused
from gateway.http.middleware import RequestContext
from gateway.telemetry import metrics


class ReloadAnswer(BaseModel):
    """The registry has been read anew, and is served."""

    status: Literal["reloaded"]
    loaded: list[str] = Field(description="Models that were loaded for it.")
    kept: list[str] = Field(description="Models that went on as they were.")
    removed: list[str] = Field(description="Models that are gone.")
    aliases: dict[str, str] = Field(description="What has changed of each alias: `mini -> jina:retrieval.query`.")
    experiments: dict[str, str] = Field(
        description="What has changed of each experiment, and whether its counts go on."
    )
    seconds: float


def require_operator(request: Request, key: SecretStr | None) -> None:
    """Let the operator pass, and nobody else.

    Raises:
        Forbidden: there is no operator's key, or the request does not carry it.
    """
    path = request.url.path
    if key is None:
        raise Forbidden(f"{path} is for the operator, who has no key yet: set GATEWAY_ADMIN_KEY")
    sent = RequestContext.of(request).api_key
    if sent is None or not hmac.compare_digest(sent, key_digest(key.get_secret_value())):
        raise Forbidden(f"{path} needs the operator's key: send `Authorization: Bearer KEY`")


def admin_router(deployment: Deployment, *, are_metrics_open: bool) -> APIRouter:
    """Return the operator's routes.

    Args:
        are_metrics_open: whether metrics are for everybody who can reach them.
    """
    router = APIRouter(tags=["Admin"])

    async def prometheus(request: Request) -> Response:
        """Return all metrics in Prometheus' text format."""
        if not are_metrics_open:
            require_operator(request, deployment.settings.admin_key)
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def reload(request: Request) -> ReloadAnswer:
        """Read `models.yaml` anew. All of it is checked, loaded and warm before the switch; else nothing changes."""
        require_operator(request, deployment.settings.admin_key)
        reloaded = await deployment.reload()
        return ReloadAnswer(
            status="reloaded",
            loaded=list(reloaded.loaded),
            kept=list(reloaded.kept),
            removed=list(reloaded.removed),
            aliases=reloaded.aliases,
            experiments=reloaded.experiments,
            seconds=round(reloaded.seconds, 3),
        )

    router.add_api_route(
        "/metrics",
        prometheus,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **error_responses(Forbidden)},
    )
    router.add_api_route(
        "/admin/reload", reload, methods=["POST"], responses=responses(ReloadAnswer, ReloadRefused, Forbidden)
    )
    return router
