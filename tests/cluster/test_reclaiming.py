"""Deployments that no gateway uses, and the claims of those that do."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.cluster.placing import stem_of_model
from gateway.config.model_entry import ModelEntry
from gateway.fleet import Fleet, Model
from gateway.types import ModelState
from tests.peers import find_module

find_module("ray")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of other libraries
    from ray import JobID

    from gateway.cluster import claims, command, reclaiming
    from gateway.cluster.claims import Claim, Claims
    from gateway.cluster.command import DeploymentStatus, describe_pruned, prune
    from gateway.cluster.deploying import Cluster, Deployed
    from gateway.cluster.reclaiming import UNUSED_IN_NEED_S, UNUSED_S, Reclaimer
    from gateway.cluster.site import ClusterSite

OLD, NEW, OTHER = "gateway-mini-00000000000a", "gateway-mini-00000000000b", "gateway-bge-00000000000c"


class Head:
    """The keys and jobs of a cluster's head, with the methods of Ray's client that are used."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.running = {1, 2}

    def internal_kv_put(self, key: bytes, value: bytes, _overwrite: bool, _namespace: bytes) -> int:
        self.keys[key] = value
        return 1

    def internal_kv_del(self, key: bytes, _by_prefix: bool, _namespace: bytes, timeout: float | None = None) -> int:
        return int(self.keys.pop(key, None) is not None)

    def internal_kv_keys(self, prefix: bytes, _namespace: bytes) -> list[bytes]:
        return [key for key in list(self.keys) if key.startswith(prefix)]

    def get_all_job_info(self, **_options: bool) -> dict[Any, Any]:
        return {JobID.from_int(n): SimpleNamespace(is_dead=n not in self.running) for n in (1, 2, 3)}


def claims_of(job: int) -> Claims:
    """Return the claims of a gateway in a separate process."""

    class OfAnotherProcess(Claims):
        own = Claim(job, f"{job:08x}")  # type: ignore[assignment]

    return OfAnotherProcess()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    found = Head()
    monkeypatch.setattr(claims, "_store", lambda: found)
    return found


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the deployments that Serve has deleted."""
    names: list[str] = []
    monkeypatch.setattr("ray.serve.delete", lambda name, **_options: names.append(name))
    monkeypatch.setattr("gateway.cluster.deploying._internal_kv_del", lambda _key, namespace: None)
    return names


@pytest.fixture
def make_site(head: Head, deleted: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ClusterSite]:
    """Return a function that makes the site of a gateway in a separate process."""
    monkeypatch.setattr(Cluster, "watch", lambda _self, _name: object())

    def make(job: int) -> ClusterSite:
        site = ClusterSite("auto", None)  # type: ignore[arg-type]
        site.cluster.claims = claims_of(job)
        site.cluster.deploy = lambda _spec: None  # type: ignore[method-assign]
        site._is_connected = True
        return site

    return make


def use(site: ClusterSite, name: str) -> None:
    site._users[name] = site._users.get(name, 0) + 1
    site.deploy(SimpleNamespace(name=name))  # type: ignore[arg-type]


async def test_of_gateways_that_reload_together_the_last_deletes_the_old_deployment(
    make_site: Callable[[int], ClusterSite], deleted: list[str]
) -> None:
    one, two = make_site(1), make_site(2)
    for site in (one, two):
        use(site, OLD)

    await one.leave(OLD, delete=True)
    assert deleted == []
    await two.leave(OLD, delete=True)
    assert deleted == [OLD]

    deleted.clear()
    for site in (one, two):
        use(site, OLD)
    await asyncio.gather(one.leave(OLD, delete=True), two.leave(OLD, delete=True))
    assert set(deleted) == {OLD}


def test_two_processes_that_release_at_the_same_moment_do_not_both_keep_the_deployment(head: Head) -> None:
    """Each announces its deletion while the other's claim is just gone."""
    both = threading.Barrier(2)

    def retire(one: Claims) -> bool:
        one.release(OLD)
        both.wait(5)
        with one.deleting(OLD) as is_unused:
            both.wait(5)
            return is_unused

    gateways = [claims_of(1), claims_of(2)]
    for gateway in gateways:
        gateway.claim(OLD)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(retire, gateways)) == [True, True]


def test_a_gateway_that_claims_a_deployment_waits_for_its_deletion_and_prevents_a_later_one(head: Head) -> None:
    one, two = claims_of(1), claims_of(2)
    with ThreadPoolExecutor(1) as thread:
        with one.deleting(OLD) as is_unused:
            claiming = thread.submit(two.claim, OLD)
            time.sleep(2 * claims._POLL_S)
            assert is_unused
            assert not claiming.done()
        claiming.result(5)
    with one.deleting(OLD) as is_unused:
        assert not is_unused


def test_claims_and_announcements_of_ended_processes_do_not_count(head: Head) -> None:
    one, two = claims_of(1), claims_of(2)
    two.claim(OLD)
    assert one.of(OLD) == [two.own]
    head.keys[f"deleting:{OLD}:3:x".encode()] = b""
    head.running = {1}

    one.claim(OLD)  # does not wait

    assert one.all() == {OLD: [one.own]}
    assert set(head.keys) == {one._key("claim", OLD)}


def test_two_backends_of_one_gateway_have_one_claim(
    make_site: Callable[[int], ClusterSite], deleted: list[str]
) -> None:
    """As while a reload replaces a failed model by itself."""
    site = make_site(1)
    use(site, OLD)
    use(site, OLD)

    asyncio.run(site.leave(OLD, delete=True))
    assert site.cluster.claims.of(OLD)
    asyncio.run(site.leave(OLD, delete=True))
    assert (site.cluster.claims.of(OLD), deleted) == ([], [OLD])


async def test_a_gateway_that_stops_does_not_wait_for_a_deployment(
    make_site: Callable[[int], ClusterSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cluster.site._RELEASE_S", 0.01)
    site = make_site(1)
    use(site, OLD)
    with site._turn:  # Serve does not answer
        async with asyncio.timeout(5):
            await site.leave(OLD, delete=False)


@pytest.mark.parametrize("is_deploying", [False, True], ids=["waits for its turn", "is being deployed"])
async def test_a_canceled_load_leaves_no_claim(
    make_site: Callable[[int], ClusterSite], monkeypatch: pytest.MonkeyPatch, *, is_deploying: bool
) -> None:
    """Also if Serve takes longer than the gateway waits to release its claim."""
    monkeypatch.setattr("gateway.cluster.site._RELEASE_S", 0.01)
    site = make_site(1)
    site._make_spec = lambda _entry: SimpleNamespace(name=NEW)  # type: ignore[assignment, return-value, method-assign]
    called, begun, answered, ended = (threading.Event() for _ in range(4))
    deploy = site.deploy

    def deploy_and_tell(spec: Any) -> None:
        called.set()
        deploy(spec)
        ended.set()

    def serve(_spec: object) -> None:
        begun.set()
        answered.wait(5)

    site.deploy = deploy_and_tell  # type: ignore[method-assign]
    site.cluster.deploy = serve  # type: ignore[method-assign]
    with nullcontext() if is_deploying else site._turn:
        loading = asyncio.create_task(site.use(ModelEntry(id="mini", source="./x")))
        await asyncio.to_thread((begun if is_deploying else called).wait, 5)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
    answered.set()
    assert await asyncio.to_thread(ended.wait, 5)

    assert begun.is_set() is is_deploying
    assert (site.cluster.claims.of(NEW), site._handles) == ([], {})


# ------------------------------------------------------------------------------------------------------------ reclaiming


class Deployments:
    """The deployments of a cluster, the gateways connected to their replicas, and the time."""

    def __init__(self, head: Head, deleted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = Cluster("auto")
        self.cluster.claims = claims_of(2)
        self.found = {name: Deployed(name, "RUNNING", "", 2) for name in (OLD, NEW, OTHER)}
        self.cluster.deployed = lambda: self.found  # type: ignore[method-assign]
        self.begun = {OLD, NEW, OTHER}
        self.cluster.has_begun = self.begun.__contains__  # type: ignore[method-assign]
        self.num_connected = 0
        self.now = 1000.0
        self.deleted = deleted
        self.reclaimer = Reclaimer(self.cluster, {NEW: object()})
        self.cluster.claims.claim(NEW)
        monkeypatch.setattr(reclaiming, "ask", self._ask)
        monkeypatch.setattr(command, "ask", self._ask)
        monkeypatch.setattr(reclaiming, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def _ask(self, cluster: Cluster, deployed: Deployed) -> DeploymentStatus:
        return DeploymentStatus(deployed, [], max(self.num_connected, len(cluster.claims.of(deployed.name))))

    async def look_after(self, seconds: float) -> list[str]:
        """Look, and return the deployments that have been deleted."""
        self.now += seconds
        await self.reclaimer.look()
        gone, self.deleted[:] = list(self.deleted), []
        return gone


@pytest.fixture
def deployments(head: Head, deleted: list[str], monkeypatch: pytest.MonkeyPatch) -> Deployments:
    """Return the deployments of a cluster, of which the reclaiming gateway uses ``NEW``."""
    return Deployments(head, deleted, monkeypatch)


async def test_deployments_without_a_gateway_are_deleted_after_a_while(deployments: Deployments) -> None:
    assert await deployments.look_after(0) == []
    assert await deployments.look_after(UNUSED_S - 1) == []
    assert await deployments.look_after(1) == [OLD, OTHER]


async def test_they_are_deleted_sooner_if_a_model_has_no_place(deployments: Deployments) -> None:
    deployments.found[NEW] = Deployed(NEW, "DEPLOYING", "", 0, 2)
    deployments.begun.clear()
    assert await deployments.look_after(0) == []
    assert await deployments.look_after(UNUSED_IN_NEED_S) == [OLD, OTHER]


async def test_a_model_that_loads_does_not_shorten_the_time_of_others_and_one_without_room_does(
    deployments: Deployments,
) -> None:
    deployments.found[NEW] = Deployed(NEW, "DEPLOYING", "", 1, 1)
    assert await deployments.look_after(0) == []
    assert await deployments.look_after(UNUSED_IN_NEED_S) == []
    deployments.found[NEW] = Deployed(NEW, "DEPLOYING", "", 1, 1, is_without_room=True)
    assert await deployments.look_after(1) == [OLD, OTHER]


async def test_a_deployment_is_kept_while_a_gateway_claims_it_or_is_connected(deployments: Deployments) -> None:
    gateway = claims_of(1)
    await deployments.look_after(0)
    for name in (OLD, OTHER):
        gateway.claim(name)
    assert await deployments.look_after(UNUSED_S) == []
    gateway.release(OLD)
    assert await deployments.look_after(1) == []  # the time counts from now
    deployments.num_connected = 1
    assert await deployments.look_after(UNUSED_S) == []
    deployments.num_connected = 0
    await deployments.look_after(1)
    assert await deployments.look_after(UNUSED_S) == [OLD]


async def test_a_gateway_that_comes_back_at_the_last_moment_keeps_its_deployment(
    deployments: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deployments.look_after(0)

    async def ask(_cluster: Cluster, deployed: Deployed) -> DeploymentStatus:
        claims_of(1).claim(deployed.name)
        return DeploymentStatus(deployed, [], 0)

    monkeypatch.setattr(reclaiming, "ask", ask)
    assert await deployments.look_after(UNUSED_S) == []


async def test_a_model_without_a_place_keeps_the_gateway_unready_while_older_gateways_serve_it(
    deployments: Deployments, head: Head
) -> None:
    older = claims_of(1)
    older.claim(OLD)
    site = ClusterSite("auto", None)  # type: ignore[arg-type]
    site._reclaimer = deployments.reclaimer
    models = [Model(ModelEntry(id=name, source="./x", enabled=True), None) for name in ("mini", "other")]  # type: ignore[arg-type]
    fleet = Fleet(models, site)
    fleet.started.set()
    models[0].report(ModelState.FAILED, "no room")
    models[1].report(ModelState.READY, "")

    await deployments.look_after(0)
    assert not fleet.is_ready
    models[0].report(ModelState.READY, "")
    assert fleet.is_ready
    models[0].report(ModelState.FAILED, "no room")
    head.running = {2}  # the older one has ended
    await deployments.look_after(0)
    assert fleet.is_ready
    head.running = {2, 3}
    claims_of(3).claim(OLD)  # a younger one waits for this one, not the other way round
    await deployments.look_after(0)
    assert fleet.is_ready


async def test_gateways_that_differ_for_more_than_a_rollout_are_a_warning_once(
    deployments: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaiming, "INTERVAL_S", 0.001)
    gateway = claims_of(1)
    gateway.claim(OLD)
    gateway.claim(OTHER)  # a model that this gateway does not have
    with capture_logs() as logs:
        task = asyncio.create_task(deployments.reclaimer.run())
        async with asyncio.timeout(5):
            while not any(line["event"] == "gateways_differ" for line in logs):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        task.cancel()

    [line] = [line for line in logs if line["event"] == "gateways_differ"]
    assert (line["deployment"], line["other"]) == (NEW, OLD)
    assert stem_of_model("mini") == "gateway-mini"


# ----------------------------------------------------------------------------------------------------------------- prune


async def test_prune_removes_what_no_gateway_uses_or_waits_for(deployments: Deployments) -> None:
    claims_of(1).claim(OTHER)

    lines = describe_pruned(*await prune(deployments.cluster))

    assert (lines, deployments.deleted) == ([f"removed {OLD}"], [OLD])


async def test_prune_says_why_there_is_nothing_to_do(deployments: Deployments) -> None:
    deployments.num_connected = 1
    assert describe_pruned(*await prune(deployments.cluster)) == ["nothing to remove: all deployments are in use"]
    deployments.found = {OLD: Deployed(OLD, "DELETING", "", 1)}
    assert describe_pruned(*await prune(deployments.cluster)) == ["no gateway has models on this cluster"]
    assert deployments.deleted == []
