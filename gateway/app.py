"""Assemble the gateway: a deployment in, an ASGI application out."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router

from gateway import __version__
from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.access.quotas import Quotas
from gateway.api.admin import admin_router
from gateway.api.comparisons import make_comparisons
from gateway.api.documentation import document
from gateway.api.endpoint import Endpoint
from gateway.api.experiments import Experiments
from gateway.api.health import health_router
from gateway.api.live import live_router
from gateway.api.routes import batch_routers, client_routers, experiment_routers, operator_routers
from gateway.api.unknown_path import on_http_exception
from gateway.deployment import Deployment
from gateway.experiments.exposures import ExposureLog
from gateway.experiments.stats import ExperimentStats
from gateway.http.middleware import Admission, ErrorExit, Identification, Record
from gateway.http.shortcut import Routes, Shortcut, include
from gateway.outcomes.keeper import Keeper
from gateway.outcomes.traffic import Wanted
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.telemetry.logs import keep_locals_out

_DESCRIPTION = """Several embedding models behind one OpenAI-style endpoint; a client compares two by changing `model`.

Every path under `/v1` works without `/v1` too (`/rerank` writes a document in another form, and `/tokenize` is TEI's). Every
error has the body `ErrorBody`.
"""


_NUM_RECORDING = 2  # the layers around all answers: identification and record


def create_app(deployment: Deployment) -> FastAPI:
    """Return the application. The caller starts and stops ``deployment``.

    Raises:
        ConfigError: the file of API keys or the storage of quotas is wrong.
        StartError: the exposure log, the file of experiments or the folder of batches cannot be written.
    """
    keep_locals_out()
    settings = deployment.settings
    keyring = Keyring(settings)
    keeper = _make_keeper(deployment)
    stats = _make_stats(deployment, keeper)
    quotas = Quotas(settings.quota_storage)
    deployment.resources.push_async_callback(quotas.close)
    service = EmbeddingService(deployment, stats)
    memory = MemoryBudget(settings.memory_budget_bytes)
    metrics.MEMORY_BUDGET.set(memory.max_bytes)
    metrics.MEMORY_RESERVED.set_function(lambda: memory.num_bytes)
    app = _application(deployment, keyring, memory)
    app.state.keyring = keyring
    endpoint = Endpoint(service, deployment, settings, quotas)
    app.state.on_start = endpoint.on_start
    experiments = Experiments(deployment, stats, keeper)
    routers: list[Router] = [
        *client_routers(endpoint, deployment),
        *batch_routers(endpoint, keyring, memory),
        *experiment_routers(endpoint, experiments, keeper),
        live_router(deployment, has_keys=bool(keyring)),
        health_router(deployment),
    ]
    comparisons = make_comparisons(endpoint, keyring)
    app.state.operator_routers = operator_routers(endpoint, comparisons)
    if settings.admin_port is None:
        routers += [admin_router(deployment, are_metrics_open=not keyring), *app.state.operator_routers]
    if settings.console != "off":
        # Imported only if used, as are the templates and their library.
        from gateway.console.site import console_router

        port = settings.port if settings.is_console_for_clients else settings.admin_port or 0
        console = console_router(endpoint, stats, experiments, comparisons, keyring, port)
        (routers if settings.is_console_for_clients else app.state.operator_routers).append(console)
    include(app, routers)
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
        # Outside the layers that refuse requests, so that a page can read a 401, but recorded: it answers by itself too.
        app.user_middleware.insert(_NUM_RECORDING, cors)
    return app


def _make_stats(deployment: Deployment, keeper: Keeper | None) -> ExperimentStats:
    settings = deployment.settings
    log = (
        ExposureLog(settings.exposure_log, settings.exposure_log_max_bytes, settings.exposure_log_backups)
        if settings.exposure_log
        else None
    )
    if keeper is None:
        stats = ExperimentStats(log)
    else:
        stats = ExperimentStats(log, keeper.offer, keeper.traffic.record)
        while exposures := keeper.read_log():
            stats.add(exposures)
        for experiment in deployment.registry.experiments:
            generation = deployment.router.generation(experiment.id)
            counts = keeper.traffic.load(Wanted((experiment.id, generation), deployment.counting_since[experiment.id]))
            stats.restore(experiment, generation, counts, keeper.traffic.version)
    deployment.resources.callback(stats.close)
    return stats


def _make_keeper(deployment: Deployment) -> Keeper | None:
    settings = deployment.settings
    if settings.state_dir is None:
        return None
    keeper = Keeper(
        settings.state_dir,
        settings.state_max_bytes,
        lambda: deployment.registry.experiments,
        deployment.spaces_of,
        deployment.served_since,
    )
    deployment.resources.callback(keeper.close)
    return keeper


def create_admin_app(deployment: Deployment, clients: FastAPI | None = None) -> FastAPI:
    """Return the application for the operator's port: health, metrics, the paths below ``/admin``, and the console.

    Args:
        clients: the clients' application; the operator's application shares its keys and counts. Created by default.
    """
    clients = clients or create_app(deployment)
    memory = MemoryBudget(deployment.settings.memory_budget_bytes)
    app = _application(deployment, clients.state.keyring, memory)
    routers = [health_router(deployment), admin_router(deployment, are_metrics_open=True)]
    include(app, [*routers, *clients.state.operator_routers])
    return app


def _application(deployment: Deployment, keyring: Keyring, memory: MemoryBudget) -> FastAPI:
    """Return an application with the parts that the clients' and the operator's application share."""
    direct: Routes = {}
    app: FastAPI = FastAPIOffline(
        title="Embedding gateway",
        description=_DESCRIPTION,
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,  # the middleware removes trailing slashes: a redirect would never end
        # The middleware has its own spans and metrics; the framework's would count each request twice.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        middleware=[
            *layers(deployment, keyring, memory),
            Middleware(Shortcut, routes=direct, on_http_exception=on_http_exception),
        ],
    )
    app.state.direct_routes = direct
    app.add_exception_handler(HTTPException, on_http_exception)
    document(app, deployment, needs_key=bool(keyring))
    return app


def layers(deployment: Deployment, keyring: Keyring, memory: MemoryBudget) -> list[Middleware]:
    """Return the layers around every request, the outermost first."""
    settings = deployment.settings

    def is_draining() -> bool:
        return deployment.is_draining

    return [
        Middleware(Identification, settings=settings, memory=memory, is_draining=is_draining),
        Middleware(Record, errors=deployment.errors),
        Middleware(ErrorExit, is_draining=is_draining),
        Middleware(Admission, settings=settings, keyring=keyring),
    ]
