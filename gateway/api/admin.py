"""What the operator may ask of a running gateway."""

from __future__ import annotations

import hmac
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, SecretStr

from gateway.api.schema import responses
from gateway.deployment import Deployment
from gateway.errors import Forbidden, ReloadRefused
from gateway.middleware import RequestContext, key_digest


class ReloadAnswer(BaseModel):
    """The registry has been read anew, and is served."""

    status: Literal["reloaded"]
    loaded: list[str] = Field(description="Models that were loaded for it.")
    kept: list[str] = Field(description="Models that went on as they were.")
    removed: list[str] = Field(description="Models that are gone.")
    seconds: float


def require_operator(request: Request, key: SecretStr | None) -> None:
    """Let the operator pass, and nobody else.

    Raises:
        Forbidden: there is no operator's key, or the request does not carry it.
    """
    if key is None:
        raise Forbidden("the paths under /admin are off: set GATEWAY_ADMIN_KEY to a key of the operator's own")
    sent = RequestContext.of(request).api_key
    if sent is None or not hmac.compare_digest(sent, key_digest(key.get_secret_value())):
        raise Forbidden("the paths under /admin need the operator's key: send `Authorization: Bearer KEY`")


def admin_router(deployment: Deployment) -> APIRouter:
    """Return the operator's routes."""
    router = APIRouter(prefix="/admin", tags=["Admin"])

    async def reload(request: Request) -> ReloadAnswer:
        """Read `models.yaml` anew. All of it is checked, loaded and warm before the switch; else nothing changes."""
        require_operator(request, deployment.settings.admin_key)
        reloaded = await deployment.reload()
        return ReloadAnswer(
            status="reloaded",
            loaded=list(reloaded.loaded),
            kept=list(reloaded.kept),
            removed=list(reloaded.removed),
            seconds=round(reloaded.seconds, 3),
        )

    router.add_api_route(
        "/reload", reload, methods=["POST"], responses=responses(ReloadAnswer, ReloadRefused, Forbidden)
    )
    return router
