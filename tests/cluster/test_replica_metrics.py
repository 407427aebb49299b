"""The metrics of replicas, under their usual names with a label, scraped through one front; their list in /v1/models."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from gateway.app import create_app
from gateway.backends.base import Replica
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster.line import Place
from gateway.cluster.pool import Pool
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.server import server_config
from gateway.telemetry.replica_metrics import merge
from tests.backends.remote import wait_until
from tests.listener import make_listener
from tests.peers import needs

BATCHES = {"mini#one": 3, 'mini#"two"': 5}


class OnReplicas(FakeBackend):
    """A model on replicas that were not started by Ray."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        super().__init__(fake_info("mini", 8))
        self.pool = Pool("mini", lambda: None)
        self._places = places

    def replicas(self) -> Sequence[Replica]:
        return self.pool.replicas()

    async def replica_metrics(self) -> Mapping[str, str]:
        return await self.pool.metrics()

    def count_replicas(self) -> tuple[int, int]:
        return len(self.pool.usable), len(self._places)

    async def connect(self) -> None:
        self.pool.update(self._places)
        await wait_until(lambda: len(self.pool.usable) == len(self._places))


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    with ExitStack() as stack:
        found = {}
        for name, num_batches in BATCHES.items():
            command = [sys.executable, "-m", "tests.cluster.replica_process", name, str(num_batches)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            found[name] = process
        yield found


@pytest.fixture(scope="module")
def places(processes: dict[str, subprocess.Popen[str]]) -> dict[str, Place]:
    found = {}
    for name, process in processes.items():
        assert process.stdout is not None
        found[name] = Place(**json.loads(process.stdout.readline()))
    return found


@asynccontextmanager
async def front(places: Mapping[str, Place], **settings: object) -> AsyncIterator[tuple[Deployment, OnReplicas]]:
    backend = OnReplicas(places)
    registry = Registry(
        path=Path("models.yaml"), version=1, models=(ModelEntry(id="mini", source="./x", enabled=True),)
    )
    deployment = Deployment(registry, Settings.model_validate(settings), make_backend=lambda _entry: backend)
    await deployment.start()
    await backend.connect()
    try:
        yield deployment, backend
    finally:
        await backend.pool.close()
        await deployment.stop()


def client_of(deployment: Deployment) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(deployment)), base_url="http://gateway")


async def test_the_front_returns_the_metrics_of_all_replicas_under_their_names(places: dict[str, Place]) -> None:
    async with front(places) as (deployment, _), client_of(deployment) as client:
        page = await client.get("/metrics/replicas")

    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    counted = {
        sample.labels["replica"]: sample.value
        for sample in families["gateway_batch_texts"].samples
        if sample.name == "gateway_batch_texts_count"
    }
    assert counted == BATCHES
    assert {sample.labels["replica"] for family in families.values() for sample in family.samples} == set(BATCHES)
    assert page.headers["content-type"].startswith("text/plain")
    assert page.text.count("# TYPE gateway_batch_texts histogram\n") == 1


async def test_models_lists_where_a_model_runs(places: dict[str, Place]) -> None:
    async with front(places) as (deployment, _), client_of(deployment) as client:
        [card] = (await client.get("/v1/models")).json()["data"]

    assert card["replicas"] == [
        {"name": name, "state": "ready", "reason": None, "node": "n1", "device": "cuda:0"} for name in sorted(BATCHES)
    ]


async def test_a_replica_that_cannot_be_reached_is_listed_with_the_reason_and_left_out_of_the_metrics(
    places: dict[str, Place],
) -> None:
    with make_listener() as free:
        nowhere = free.getsockname()[1]
    [known] = [place for place in places.values() if place.id == "mini#one"]
    async with front({"mini#one": known}) as (deployment, backend), client_of(deployment) as client:
        lost = Place("mini#lost", "127.0.0.1", nowhere, known.secret, known.fingerprint, "n2", "cuda:1")
        backend.pool.update({"mini#one": known, "mini#lost": lost})
        await wait_until(lambda: bool(backend.pool.lines["mini#lost"].trouble))
        page = (await client.get("/metrics/replicas")).text
        [card] = (await client.get("/v1/models")).json()["data"]

    assert 'replica="mini#one"' in page
    assert "mini#lost" not in page
    [replica] = [one for one in card["replicas"] if one["name"] == "mini#lost"]
    assert (replica["state"], replica["node"]) == ("loading", "n2")
    assert f"127.0.0.1:{nowhere}" in replica["reason"]


async def test_the_metrics_are_for_the_operator(places: dict[str, Place], tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"version: 1\nkeys:\n  - {{name: a, sha256: {'a' * 64}}}\n")
    async with (
        front(places, api_keys_file=keys, admin_key="operator") as (deployment, _),
        client_of(deployment) as client,
    ):
        refused = await client.get("/metrics/replicas")
        answered = await client.get("/metrics/replicas", headers={"authorization": "Bearer operator"})

    assert refused.status_code == 403
    assert answered.status_code == 200


async def test_without_replicas_there_is_nothing() -> None:
    registry = Registry(path=Path("models.yaml"), version=1, models=(ModelEntry(id="a", source="./x", enabled=True),))
    deployment = Deployment(registry, Settings(), make_backend=lambda _entry: FakeBackend(fake_info("a", 8)))
    async with client_of(deployment) as client:
        page = await client.get("/metrics/replicas")

    assert (page.status_code, page.text) == (200, "")


def test_values_and_labels_stay_as_they_are() -> None:
    one = '# HELP a_total Things. {x}\n# TYPE a_total counter\na_total{k="{ }\\"q\\"",l=""} 3.0\n'
    one += "# HELP b B\n# TYPE b gauge\nb 1e+09\n"
    other = "# HELP b B\n# TYPE b gauge\nb NaN\n# HELP c C\n# TYPE c gauge\n"

    assert merge({"x\\y": one, "z": other}) == (
        "# HELP a_total Things. {x}\n# TYPE a_total counter\n"
        'a_total{replica="x\\\\y",k="{ }\\"q\\"",l=""} 3.0\n'
        '# HELP b B\n# TYPE b gauge\nb{replica="x\\\\y"} 1e+09\nb{replica="z"} NaN\n'
        "# HELP c C\n# TYPE c gauge\n"
    )


# ------------------------------------------------------------------------------------------------------- a real Prometheus

CONFIG = """\
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: replicas
    metrics_path: /metrics/replicas
    static_configs: [{{targets: ["{address}"]}}]
"""


@needs("prometheus", "prometheus")
async def test_a_prometheus_scrapes_both_replicas_through_the_front(places: dict[str, Place], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with front(places) as (deployment, _):
        with make_listener() as listener:
            server = uvicorn.Server(server_config(create_app(deployment), deployment.settings))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            (tmp_path / "prometheus.yml").write_text(CONFIG.format(address=f"127.0.0.1:{listener.getsockname()[1]}"))
            command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
            command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
            with subprocess.Popen(command) as process:  # noqa: ASYNC220  it returns at once
                try:
                    found = await asked(port, "sum by (replica) (gateway_batch_texts_count)", len(BATCHES))
                finally:
                    process.terminate()
            server.should_exit = True
            await serving

    assert found == BATCHES


async def asked(port: int, query: str, num_results: int) -> dict[str, float]:
    """Return the values of a query to Prometheus, by replica, once it has so many series."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, asyncio.timeout(60):
        while True:
            try:
                answer = await client.get("/api/v1/query", params={"query": query})
                results = answer.json()["data"]["result"] if answer.is_success else []
            except httpx.HTTPError:
                results = []
            if len(results) >= num_results:
                return {one["metric"]["replica"]: float(one["value"][1]) for one in results}
            await asyncio.sleep(0.2)
