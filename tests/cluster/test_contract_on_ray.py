"""The contract's tests against a gateway whose models are replicas on Ray, in other processes.

Models that a test makes itself are not on the cluster: their replicas would need seconds each. They are behind a connection
as between a front and a replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from bench.simulated_cluster import Simulated
from gateway.app import create_app
from gateway.config.registry import Alias, ModelEntry
from gateway.config.replicas import Replicas
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from gateway.types import ModelState
from tests.api.conftest import *  # noqa: F403  its fixtures
from tests.api.conftest import ALIASES, MODELS, Connect
from tests.api.conftest import connect as connect_here  # noqa: F401  a fixture
from tests.api.test_contract import *  # noqa: F403  its tests
from tests.cluster.conftest import registry_of
from tests.cluster.contract_models import MAKE
from tests.cluster.wired import wired, wires  # noqa: F401  a fixture


class Loop:
    """An event loop in a thread, in which the connections to the replicas live as long as all tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self, work: Any) -> asyncio.Future[Any]:
        """Start a coroutine there, and return the way to wait for it here."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def run(self, work: Any) -> Any:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Elsewhere(httpx.AsyncBaseTransport):
    """Sends requests to an application that runs in another event loop."""

    def __init__(self, app: Any, loop: Loop) -> None:
        self._inner = httpx.ASGITransport(app)
        self._loop = loop

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response: httpx.Response = await self._loop.start(self._inner.handle_async_request(request))
        return response


@pytest.fixture(scope="module")
def on_ray(simulated: Simulated) -> Iterator[tuple[Fleet, Loop]]:
    """Return the models of most tests, on the cluster."""
    from gateway.cluster.deploying import Cluster
    from gateway.cluster.site import ClusterSite

    loop, settings = Loop(), Settings(cluster=simulated.address, request_timeout_s=60, cpu_threads=1)
    site = ClusterSite(simulated.address, settings, MAKE)
    entries = [
        ModelEntry(
            id=name, source=str(info["source"]), revision="0" * 40, enabled=True, replicas=Replicas(min=1, gpus=0)
        )
        for name, info in MODELS.items()
    ]
    fleet = Fleet.from_registry(registry_of(*entries), site.backend, site)
    deployment = Deployment(registry_of(*entries), settings, fleet, make_backend=site.backend)
    try:
        loop.run(deployment.start())
        assert [model.state for model in fleet] == [ModelState.READY] * len(MODELS)
        yield fleet, loop
    finally:
        loop.run(deployment.stop())
        loop.close()
        cluster = Cluster(simulated.address)
        for name in cluster.deployed():
            if any(f"-{one[-4:]}-" in name for one in MODELS):
                cluster.delete_unused(name)


@pytest.fixture
def make_model(make_model: Callable[..., Model], wires: AsyncExitStack) -> Callable[..., Model]:  # noqa: F811
    """Return a function that makes models behind connections."""
    return wired(make_model, wires)


@pytest.fixture
async def connect(on_ray: tuple[Fleet, Loop], connect_here: Connect) -> AsyncIterator[Connect]:  # noqa: F811
    """Return a function that starts a gateway with some settings over the models on the cluster, or over other models."""
    fleet, loop = on_ray
    async with contextlib.AsyncExitStack() as stack:

        async def connect_to_ray(*models: Model, aliases: Any = ALIASES, **settings: Any) -> httpx.AsyncClient:
            if models:
                return await connect_here(*models, aliases=aliases, **settings)
            pairs = {name: (to, None) if isinstance(to, str) else to for name, to in aliases.items()}
            registry = registry_of(
                *(model.entry for model in fleet),
                aliases={name: Alias(name=name, model=model, task=task) for name, (model, task) in pairs.items()},
            )
            deployment = Deployment(registry, Settings(**settings), fleet)
            app = create_app(deployment)
            stack.push_async_callback(deployment.resources.aclose)
            client = httpx.AsyncClient(transport=Elsewhere(app, loop), base_url="http://gateway")
            return await stack.enter_async_context(client)

        yield connect_to_ray
