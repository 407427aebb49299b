"""The operator's requests to a running gateway: its metrics, and a reload of its registry."""

from __future__ import annotations

import hmac
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, SecretStr

from gateway.access.keyring import key_digest
from gateway.api.wire import AnswerBody, error_responses, responses
from gateway.deployment import Deployment
from gateway.errors import Forbidden, ReloadRefused
from gateway.http.context import RequestContext
from gateway.telemetry import metrics


class ReloadAnswer(AnswerBody):
    """The registry was re-read, and is served."""

    status: Literal["reloaded"] = "reloaded"
    loaded: list[str] = Field(description="Models that were loaded for it, or are loaded on demand from now on.")
    kept: list[str] = Field(description="Models that stayed as they were.")
    removed: list[str] = Field(description="Models that are gone.")
    aliases: dict[str, str] = Field(description="The change of each alias: `mini -> jina:retrieval.query`.")
    experiments: dict[str, str] = Field(description="The change of each experiment, and whether its counts go on.")
    seconds: float


def require_operator(request: Request, key: SecretStr | None) -> None:
    """Let only the operator pass.

    Raises:
        Forbidden: no operator's key is set, or the request does not carry it.
    """
    path = request.url.path
    if key is None:
        raise Forbidden(f"{path} is for the operator, who has no key yet: set GATEWAY_ADMIN_KEY")
    sent = RequestContext.of(request).api_key
    if sent is None or not hmac.compare_digest(sent, key_digest(key.get_secret_value())):
        raise Forbidden(f"{path} needs the operator's key: send `Authorization: Bearer KEY`")


class Admin:
    """The operator's handlers.

    Args:
        are_metrics_open: whether every client that reaches the gateway may read the metrics.
    """

    def __init__(self, deployment: Deployment, *, are_metrics_open: bool) -> None:
        self._deployment = deployment
        self._are_metrics_open = are_metrics_open

    async def prometheus(self, request: Request) -> Response:
        """Return all metrics in Prometheus' text format."""
        if not self._are_metrics_open:
            require_operator(request, self._deployment.settings.admin_key)
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def reload(self, request: Request) -> ReloadAnswer:
        """Re-read `models.yaml`. All of it is checked, loaded and warm before the switch; else nothing changes."""
        require_operator(request, self._deployment.settings.admin_key)
        reloaded = await self._deployment.reload()
        return ReloadAnswer(
            loaded=list(reloaded.loaded),
            kept=list(reloaded.kept),
            removed=list(reloaded.removed),
            aliases=reloaded.aliases,
            experiments=reloaded.experiments,
            seconds=round(reloaded.seconds, 3),
        )


def admin_router(deployment: Deployment, *, are_metrics_open: bool) -> APIRouter:
    """Return the operator's routes.

    Args:
        are_metrics_open: whether every client that reaches the gateway may read the metrics.
    """
    router = APIRouter(tags=["Admin"])
    admin = Admin(deployment, are_metrics_open=are_metrics_open)
    router.add_api_route(
        "/metrics",
        admin.prometheus,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **error_responses(Forbidden)},
    )
    router.add_api_route(
        "/admin/reload", admin.reload, methods=["POST"], responses=responses(ReloadAnswer, ReloadRefused, Forbidden)
    )
    return router
