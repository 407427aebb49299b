"""The backend of a model on a cluster, with replicas that were not started by Ray."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.api.admin import Admin
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster.discovery import DIRECTORY
from gateway.cluster.host import Host
from gateway.cluster.line import Place
from gateway.cluster.placing import Spec, make_spec
from gateway.config.cache import CacheConfig
from gateway.config.model_entry import ModelEntry
from gateway.config.replicas import Replicas
from gateway.config.settings import Settings
from gateway.errors import LoadError, StartError
from gateway.fleet import Fleet, Model
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelInfo, ModelState, Truncate
from tests.peers import find_module

find_module("ray")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of other libraries
    from gateway.cluster.backend import RayBackend
    from gateway.cluster.command import DeploymentStatus, differing
    from gateway.cluster.deploying import Cluster, Deployed, _unreachable
    from gateway.cluster.replica import loading

SECRET = b"s" * 32


class Placed:
    """A site whose deployments are there already."""

    cluster: Any = SimpleNamespace(
        look=lambda name: Deployed(name, "DEPLOYING", "", num_starting=1),
        has_begun=lambda _name: True,
    )

    def __init__(self) -> None:
        self.name = ""
        self.deployed_again: list[str] = []
        self.is_kept = False

    async def use(self, entry: ModelEntry) -> Spec:
        spec = make_spec(entry, Settings(), has_cards=False)
        self.name = spec.name
        return spec

    def deploy(self, spec: Spec) -> None:
        self.deployed_again.append(spec.entry.id)

    async def look_around(self) -> None:
        pass

    def is_kept_elsewhere(self, _entry: ModelEntry) -> bool:
        return self.is_kept

    async def leave(self, name: str, *, delete: bool) -> None:
        pass


@pytest.fixture
async def served() -> AsyncIterator[tuple[Model, list[Host]]]:
    """Yield a model with a cache on two replicas."""
    info = fake_info("mini", 8)
    entry = ModelEntry(id="mini", source="./x", enabled=True, cache=CacheConfig(max_bytes=2 << 20))
    site = Placed()
    model = Model(entry, RayBackend(entry, Settings(), site))
    async with AsyncExitStack() as stack:
        hosts = []
        for _replica in range(2):
            backend = FakeBackend(info)
            await backend.start()
            hosts.append(Host(backend, info, SECRET, "127.0.0.1"))
            await hosts[-1].start()
            stack.push_async_callback(hosts[-1].stop)
        loading = asyncio.create_task(Fleet([model]).load_one(model))
        stack.push_async_callback(model.stop)
        # The directory is the process's: no two replicas have one id, as none have on a cluster.
        places = {
            name: Place(name, "127.0.0.1", host.port, SECRET.hex(), info.fingerprint, f"n{host.port}", "cpu")
            for host in hosts
            for name in (f"r{secrets.token_hex(8)}",)
        }
        await until(lambda: bool(site.name))
        DIRECTORY.publish(site.name, places)
        await loading
        await until(lambda: len(lines(model)) == 2)
        yield model, hosts


def lines(model: Model) -> list[Any]:
    assert isinstance(model.backend, RayBackend)
    return [line for line in model.backend.lines if line.is_usable]


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.005)


async def num_cached(model: Model) -> int | None:
    job = EmbedJob(["a text"], None, Truncate.END, time.monotonic() + 30, "me")
    return (await model.embed(job)).num_cached


async def test_a_replica_with_wrong_vectors_empties_the_cache_while_the_others_continue(
    served: tuple[Model, list[Host]],
) -> None:
    model, hosts = served
    assert [await num_cached(model) for _ in range(2)] == [0, 1]

    hosts[0].report(ModelState.RECOVERING, "golden vectors: cosine 0.9")
    await until(lambda: len(lines(model)) == 1)

    assert model.state is ModelState.READY
    assert [await num_cached(model) for _ in range(2)] == [0, 1]
    hosts[0].report(ModelState.READY, "")
    await until(lambda: len(lines(model)) == 2)
    assert await num_cached(model) == 1


async def test_without_another_replica_the_model_is_recovering_at_once(served: tuple[Model, list[Host]]) -> None:
    model, hosts = served
    for host in hosts:
        host.report(ModelState.RECOVERING, "it hangs")
    await until(lambda: not lines(model))

    assert (model.state, model.reason) == (ModelState.RECOVERING, "it hangs")
    hosts[1].report(ModelState.READY, "")
    await until(lambda: model.state is ModelState.READY)
    assert await num_cached(model) == 0


async def test_fewer_replicas_than_wanted_are_a_warning_once(
    served: tuple[Model, list[Host]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _hosts = served
    await model.backend.stop()
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 0.01)
    wanted = model.entry.model_copy(update={"replicas": Replicas(min=3)})
    again = Model(wanted, RayBackend(wanted, Settings(), Placed()))
    with capture_logs() as logs:
        await Fleet([again]).load_one(again)
        await until(lambda: any(line["event"] == "replicas_missing" for line in logs))
    await again.stop()

    [line] = [line for line in logs if line["event"] == "replicas_missing"]
    assert (line["model"], line["running"] < 3, line["wanted"]) == ("mini", True, 3)


async def test_the_metrics_count_the_replicas_that_work_and_those_that_were_lost(
    served: tuple[Model, list[Host]],
) -> None:
    model, [host, other] = served
    deployment = SimpleNamespace(fleet=[model], settings=Settings())
    admin = Admin(deployment, are_metrics_open=True)  # type: ignore[arg-type]

    async def counted() -> list[float]:
        page = (await admin.prometheus(None)).body.decode()  # type: ignore[arg-type]
        names = ("gateway_replicas_usable", "gateway_replicas_wanted", "gateway_replicas_lost_total")
        found = {line.split("{")[0]: float(line.split()[-1]) for line in page.splitlines() if 'model="mini"}' in line}
        return [found.get(name, 0) for name in names]

    usable, wanted, lost = await counted()
    assert (usable, wanted) == (2, 1)
    with capture_logs() as logs:
        host.report(ModelState.RECOVERING, "the card is lost")
        await until(lambda: len(lines(model)) == 1)
        await host.stop()
        await until(lambda: any(line["event"] == "replica_lost" for line in logs))
    assert await counted() == [1, 1, lost + 1]
    [line] = [line for line in logs if line["event"] == "replica_lost"]
    assert (line["model"], line["reason"]) == ("mini", "the card is lost")
    await other.drain(5)
    await other.stop()
    await until(lambda: not lines(model))
    assert await counted() == [0, 1, lost + 1]  # a replica that announces its end is not lost


async def test_a_disabled_or_removed_model_has_no_numbers_of_replicas(served: tuple[Model, list[Host]]) -> None:
    model, _hosts = served
    deployment = SimpleNamespace(fleet=[model], settings=Settings())
    admin = Admin(deployment, are_metrics_open=True)  # type: ignore[arg-type]

    async def page() -> str:
        return (await admin.prometheus(None)).body.decode()  # type: ignore[arg-type]

    series = 'gateway_replicas_wanted{model="mini"} 1.0'
    assert series in await page()
    deployment.fleet = []
    assert 'gateway_replicas_wanted{model="mini"}' not in await page()
    deployment.fleet = [model]
    assert series in await page()
    model.report(ModelState.DISABLED, "switched off")
    after = await page()
    assert not any(f'gateway_replicas_{name}{{model="mini"}}' in after for name in ("wanted", "usable"))


def test_the_first_loss_of_a_replica_is_an_increase_from_zero() -> None:
    RayBackend(ModelEntry(id="untouched", source="./x", enabled=True), Settings(), Placed())
    assert metrics.values(metrics.REPLICAS_LOST)["untouched",] == 0


def test_a_replica_marks_the_time_in_which_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gateway-loading"
    monkeypatch.setattr("gateway.cluster.replica.LOADING_FOLDER", folder)
    with loading():
        assert [path.name for path in folder.iterdir()] == [str(os.getpid())]
    assert list(folder.iterdir()) == []


async def test_a_model_that_waits_for_room_again_stays_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 0.01)
    site = Placed()
    waiting = Deployed("gateway-late-1", "DEPLOYING", "waits for a card", 0, 1)
    site.cluster = SimpleNamespace(look=lambda _name: waiting, has_begun=lambda _name: False)
    backend = RayBackend(ModelEntry(id="late", source="./x", enabled=True), Settings(), site)
    reports: list[ModelState] = []
    for _attempt in range(2):
        with pytest.raises(LoadError):
            await backend.plan(lambda state, _reason: reports.append(state))
    assert reports == [ModelState.LOADING]


async def test_a_model_that_finds_room_on_a_retry_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 0.01)
    monkeypatch.setattr("gateway.cluster.backend._POLL_S", 0.01)
    site, begun = Placed(), set[str]()
    found = Deployed("gateway-late-1", "DEPLOYING", "", 0, 1)
    site.cluster = SimpleNamespace(look=lambda _name: found, has_begun=lambda _name: bool(begun))
    backend = RayBackend(ModelEntry(id="late", source="./x", enabled=True), Settings(), site)
    with pytest.raises(LoadError):
        await backend.plan()
    reports: list[ModelState] = []
    begun.add("late")
    loading = asyncio.create_task(backend.plan(lambda state, _reason: reports.append(state)))
    await until(lambda: reports)
    loading.cancel()
    assert reports == [ModelState.LOADING]


def test_the_status_says_which_gateways_differ() -> None:
    found = [
        DeploymentStatus(Deployed(name, "RUNNING", "", 1), [], num_fronts)
        for name, num_fronts in [("gateway-a-1-x", 1), ("gateway-a-1-y", 1), ("gateway-a-z", 1), ("gateway-a-w", 0)]
    ]
    assert differing(found) == [
        "gateways differ in a model's entry, settings or version: `gateway-a-1-x`, `gateway-a-1-y` are in use"
    ]


def starting(
    monkeypatch: pytest.MonkeyPatch, *seen: Deployed
) -> tuple[asyncio.Task[ModelInfo], list[Deployed], list[str]]:
    """Start to load a model without replicas, while Serve reports one status after another.

    Returns the load, the things that Serve has yet to say but for the last, which it repeats, and the models deployed again.
    """
    monkeypatch.setattr("gateway.cluster.backend._POLL_S", 0.01)
    left = list(seen)
    site = Placed()
    site.cluster = SimpleNamespace(
        look=lambda _name: left.pop(0) if len(left) > 1 else left[0],
        has_begun=lambda _name: True,
    )
    entry = ModelEntry(id="waiting", source="./x", enabled=True)
    return asyncio.create_task(RayBackend(entry, Settings(), site).plan()), left, site.deployed_again


async def test_a_model_that_another_gateway_removes_while_this_one_waits_is_deployed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone, there = Deployed("gateway-x-1", "NOT_STARTED", ""), Deployed("gateway-x-1", "DEPLOYING", "", 0, 1)
    loading, left, again = starting(monkeypatch, there, gone, there)
    await until(lambda: len(left) == 1 and again)
    loading.cancel()
    assert again == ["waiting"]


async def test_a_load_has_failed_only_if_no_replica_runs_or_starts_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of the last replica and the start of another, Serve reports the same as when it has given up."""
    failed, replaced = (Deployed("gateway-x-1", "UNHEALTHY", "a node died", 0, number) for number in (0, 1))
    waiting, left, _ = starting(monkeypatch, replaced, failed, replaced, failed, replaced)
    await until(lambda: len(left) == 1)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(LoadError, match="a node died"):
        await starting(monkeypatch, replaced, failed)[0]


def test_a_model_waits_for_room_only_if_serve_says_that_a_replica_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gateway-mini-0123456789ab"
    messages = {
        "has 1 replicas that have taken more than 30s to be scheduled. This may be due to waiting": True,
        "has 1 replicas that have taken more than 30s to initialize.": False,
        "": False,
    }
    for message, expected in messages.items():
        inside = SimpleNamespace(replica_states={"RUNNING": 1, "STARTING": 1}, message=message)
        app = SimpleNamespace(status=SimpleNamespace(value="DEPLOYING"), message="", deployments={"model": inside})
        monkeypatch.setattr("ray.serve.status", lambda app=app: SimpleNamespace(applications={name: app}))
        assert Cluster("auto").look(name).is_without_room is expected


def test_applications_of_other_programs_on_the_cluster_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running gateways and ``gateway cluster prune`` remove what no gateway uses."""

    def application(deployment: str) -> SimpleNamespace:
        inside = SimpleNamespace(replica_states={}, message="")
        return SimpleNamespace(status=SimpleNamespace(value="UNHEALTHY"), message="", deployments={deployment: inside})

    ours, theirs = "gateway-mini-0123456789ab", ("gateway-shop", "shop", "gateway-0123456789ab")
    found = {ours: application("model"), **dict.fromkeys(theirs, application("api"))}
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=found))

    assert list(Cluster("auto").deployed()) == [ours]
    assert Cluster("auto").look(ours).has_failed


async def test_a_model_without_room_says_whether_older_gateways_keep_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 0.01)
    site = Placed()
    site.cluster = SimpleNamespace(**{**vars(Placed.cluster), "has_begun": lambda _name: False})
    backend = RayBackend(ModelEntry(id="late", source="./x", enabled=True), Settings(), site)
    with pytest.raises(LoadError, match=r"no machine of the cluster has room for a replica, which needs a core$"):
        await backend.plan()
    site.is_kept = True
    with pytest.raises(
        LoadError, match=r"needs a core\. Older gateways still serve it .*, so this gateway is not ready"
    ):
        await backend.plan()


async def test_a_replica_that_recovers_for_too_long_asks_for_another_process(served: tuple[Model, list[Host]]) -> None:
    _model, [host, other] = served
    host.report(ModelState.RECOVERING, "it hangs")
    assert host.why_unwell(60) == ""
    await asyncio.sleep(0.01)
    host.report(ModelState.RECOVERING, "it hangs; reloading it failed")
    assert host.why_unwell(0.005) == "it has been recovering for more than 0 s: it hangs; reloading it failed"
    host.report(ModelState.READY, "")
    assert host.why_unwell(0) == ""
    other.report(ModelState.FAILED, "the card is gone")
    assert other.why_unwell(60) == "the card is gone"


# --------------------------------------------------------------------------------------------------- which cluster


def test_without_a_cluster_the_start_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    error = ConnectionError("no answer\nand more")

    named, found = _unreachable("10.0.0.1:6379", error), _unreachable("auto", error)

    assert (
        "GATEWAY_CLUSTER=10.0.0.1:6379: no Ray cluster was found at 10.0.0.1:6379, or it cannot be reached (no answer)"
        in named
    )
    assert "ray start --head" in named
    assert "GATEWAY_CLUSTER=auto: this machine does not belong to a Ray cluster" in found


def test_other_versions_of_ray_and_python_are_named() -> None:
    error = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.12.1\n"
        "This process on node was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )

    text = _unreachable("auto", error)

    assert "Ray: 2.9.0 Python: 3.12.1 This process on node was started with: Ray: 2.60.0 Python: 3.11.7" in text
    assert text.endswith("All machines must have the same versions of Ray and Python")


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "local"])
def test_another_kind_of_address_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # a test before may have left it connected

    with pytest.raises(StartError, match=f"in RAY_ADDRESS, which is {address}: set RAY_ADDRESS to the HOST:PORT"):
        Cluster("auto").connect()
