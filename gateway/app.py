"""Assemble the gateway: a deployment in, an ASGI application out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from gateway import __version__
from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.access.quotas import Quotas
from gateway.api.admin import admin_router
from gateway.api.assignments import assignments_router
from gateway.api.documentation import document
from gateway.api.endpoint import Endpoint
from gateway.api.experiments import experiments_router
from gateway.api.health import health_router
from gateway.api.routes import client_routers
from gateway.api.unknown_path import on_http_exception
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.experiments.exposures import ExposureLog
from gateway.experiments.stats import ExperimentStats
from gateway.http.middleware import Admission, ErrorExit, Identification, Record
from gateway.service import EmbeddingService
from gateway.telemetry import metrics

_DESCRIPTION = """Several embedding models behind one OpenAI-style endpoint; a client compares two by changing `model`.

Every path under `/v1` works without `/v1` too (`/rerank` writes a document in another form). Every error has the body
`ErrorBody`.
"""


def create_app(deployment: Deployment) -> FastAPI:
    """Return the application. It serves ``deployment`` as it is: the caller starts and stops it.

    Raises:
        ConfigError: the file of API keys or the storage of quotas is wrong.
    """
    settings = deployment.settings
    keyring = Keyring(settings)
    log = (
        ExposureLog(settings.exposure_log, settings.exposure_log_max_bytes, settings.exposure_log_backups)
        if settings.exposure_log
        else None
    )
    stats = ExperimentStats(log)
    deployment.resources.callback(stats.close)
    quotas = Quotas(settings.quota_storage)
    deployment.resources.push_async_callback(quotas.close)
    service = EmbeddingService(deployment, stats)
    memory = MemoryBudget(settings.memory_budget_bytes)
    metrics.MEMORY_BUDGET.set(memory.max_bytes)
    metrics.MEMORY_RESERVED.set_function(lambda: memory.num_bytes)
    app = _application(deployment, keyring, memory)
    app.state.keyring = keyring
    endpoint = Endpoint(service, deployment, settings, quotas)
    routers = [
        *client_routers(endpoint, deployment),
        assignments_router(endpoint),  # before the experiments, whose ids may hold a slash
        experiments_router(deployment, stats),
        health_router(deployment),
    ]
    if settings.admin_port is None:
        routers.append(admin_router(deployment, are_metrics_open=not keyring))
    _include(app, routers)
    if settings.cors_origins:
        # The outermost: a page must be able to read the middleware's answers too, for example a 401.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


def create_admin_app(deployment: Deployment, keyring: Keyring | None = None) -> FastAPI:
    """Return the application for the operator's port: health, metrics, and the paths below ``/admin``.

    Args:
        keyring: the one of the clients' application, so that one check of the file updates both.
    """
    memory = MemoryBudget(deployment.settings.memory_budget_bytes)
    app = _application(deployment, keyring or Keyring(deployment.settings), memory)
    _include(app, [health_router(deployment), admin_router(deployment, are_metrics_open=True)])
    return app


def _include(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Serve the routes, and remember the documented paths: the OpenAPI document takes a tenth of a second to make."""
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    app.state.shown_paths = [route.path for route in routes if route.include_in_schema]


def _application(deployment: Deployment, keyring: Keyring, memory: MemoryBudget) -> FastAPI:
    """Return an application with the parts that both have."""
    app: FastAPI = FastAPIOffline(
        title="Embedding gateway",
        description=_DESCRIPTION,
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,  # the middleware removes trailing slashes: a redirect would never end
        # The middleware has its own spans and metrics; the framework's would count each request twice.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        middleware=layers(deployment.settings, keyring, memory, lambda: deployment.is_draining),
    )
    app.add_exception_handler(HTTPException, on_http_exception)
    document(app, deployment, needs_key=bool(keyring))
    return app


def layers(
    settings: Settings, keyring: Keyring, memory: MemoryBudget, is_draining: Callable[[], bool]
) -> list[Middleware]:
    """Return the layers around every request, the outermost first."""
    return [
        Middleware(Identification, settings=settings, memory=memory, is_draining=is_draining),
        Middleware(Record),
        Middleware(ErrorExit, is_draining=is_draining),
        Middleware(Admission, settings=settings, keyring=keyring),
    ]
