"""A Ray cluster of three machines, simulated in this one, for all tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.simulated_cluster import Simulated, simulated_cluster
from gateway.app import create_app
from gateway.config.registry import ModelEntry, Registry
from gateway.config.replicas import Replicas
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet
from tests.cluster.fakes import MAKE, notes
from tests.peers import is_missing

# Models that several tests use, on two cards of two machines and on a core: each start of a replica takes seconds.
ON_CARDS, ON_A_CORE = "carded-delay5", "plain"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let Ray warn about libraries that it uses in old ways."""
    if "cluster" in item.path.parts:
        for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


@pytest.fixture(scope="session")
def simulated() -> Iterator[Simulated]:
    """Start the cluster once for all tests."""
    if find_spec("ray") is None:
        is_missing("Ray is not installed: needs the extra `cluster`")
    # So that scaling is seen within seconds.
    environ = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of other libraries
        with simulated_cluster(2, num_gpus=1, environ=environ) as found:
            yield found


class Front:
    """A gateway in this process, on the cluster."""

    def __init__(self, deployment: Deployment, client: httpx.AsyncClient, read: list[Registry]) -> None:
        self.deployment = deployment
        self.client = client
        self._read = read

    async def embed(self, model: str, *texts: str, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/embeddings", json={"model": model, "input": list(texts), **body})

    async def reload(self, *entries: ModelEntry) -> None:
        """Serve other entries."""
        self._read[0] = registry_of(*entries)
        await self.deployment.reload()


def registry_of(*entries: ModelEntry, **parts: Any) -> Registry:
    return Registry(path=Path("models.yaml"), version=1, models=entries, **parts)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all fake models, into which their replicas write notes.

    All tests share it: models that a gateway leaves on the cluster are there for the next one with the same entry.
    """
    return tmp_path_factory.mktemp("fakes")


@pytest.fixture
def entry(folder: Path) -> Callable[..., ModelEntry]:
    """Return a function that makes the entry of a fake model."""

    def make(
        model_id: str,
        *,
        min: int = 2,  # noqa: A002
        max: int | None = None,  # noqa: A002
        gpus: int = 1,
        per_node: int | None = None,
        **changes: Any,
    ) -> ModelEntry:
        replicas = Replicas(min=min, max=max, gpus=gpus, target_requests=4, per_node=per_node)
        return ModelEntry(id=model_id, source=str(folder), enabled=True, replicas=replicas, **changes)

    return make


@pytest.fixture
def noted(folder: Path) -> Callable[[str], list[str]]:
    """Return a function that returns what replicas have noted about an event during this test."""
    before = {path.name for path in folder.iterdir()}
    return lambda event: notes(folder, event, before)


@pytest.fixture
async def start_front(simulated: Simulated) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that starts a gateway on the cluster; at the end all are stopped.

    Of their models, those stay on the cluster that other tests use too.
    """
    from gateway.cluster.site import ClusterSite

    async with contextlib.AsyncExitStack() as stack:

        async def start(*entries: ModelEntry, make_backend: str = MAKE, **parts: Any) -> Front:
            settings = Settings(cluster=simulated.address, request_timeout_s=60, cpu_threads=1)
            site = ClusterSite(simulated.address, settings, make_backend)
            read = [registry_of(*entries, **parts)]
            fleet = Fleet.from_registry(read[0], site.backend, site)
            deployment = Deployment(read[0], settings, fleet, lambda: read[0], make_backend=site.backend)
            stack.push_async_callback(deployment.stop)
            await deployment.start()
            transport = httpx.ASGITransport(create_app(deployment))
            client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
            return Front(deployment, client, read)

        yield start
    await asyncio.to_thread(_remove_all_but_shared, simulated)


def _remove_all_but_shared(simulated: Simulated) -> None:
    import ray

    from gateway.cluster.deploying import Cluster

    if ray.is_initialized():
        cluster = Cluster(simulated.address)
        kept = (f"gateway-{ON_CARDS}-", f"gateway-{ON_A_CORE}-")
        for name in cluster.deployed():
            if not name.startswith(kept):
                cluster.delete_unused(name)


async def until_in_thread(condition: Callable[[], object], timeout_s: float = 240) -> None:
    """Wait until a condition holds that blocks while it is checked."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it has not come true"
        await asyncio.sleep(0.1)


class Traffic:
    """Clients that send requests without a pause until they are stopped, and their answers.

    Attributes:
        failed: answers other than 200.
        gap_s: the longest time without an answer.
    """

    def __init__(self) -> None:
        self.num_answered = 0
        self.num_asked = 0
        self.failed: list[str] = []
        self.gap_s = 0.0
        self._last = time.monotonic()
        self._is_stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, ask: Callable[[int], Any], num_clients: int = 8) -> None:
        self._last = time.monotonic()
        self._tasks = [asyncio.create_task(self._client(ask)) for _ in range(num_clients)]

    async def _client(self, ask: Callable[[int], Any]) -> None:
        while not self._is_stopped:
            self.num_asked += 1
            response = await ask(self.num_asked)
            now = time.monotonic()
            if response.status_code == 200:
                self.num_answered += 1
                self.gap_s, self._last = max(self.gap_s, now - self._last), now
            else:
                self.failed.append(f"{response.status_code} {response.text[:200]}")
            await asyncio.sleep(0)

    async def more(self, number: int) -> None:
        """Wait for further answers."""
        enough = self.num_answered + number
        while self.num_answered < enough and not self.failed:  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._is_stopped = True
        await asyncio.gather(*self._tasks)
