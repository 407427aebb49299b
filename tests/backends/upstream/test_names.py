"""A name with many addresses (``dns+http://``): each is a server, which gets requests once it has been checked.

The resolver is a list. The servers are real, each on its own address of this machine.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from gateway import golden
from gateway.backends.upstream import pool as pool_module
from gateway.backends.upstream import watch as watch_module
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.backends.upstream.dialects import make_dialect
from gateway.backends.upstream.pool import MAX_ADDRESSES, Name, Pool, Turns
from gateway.backends.upstream.resolver import Resolver
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import NotReachable, UpstreamUnavailable
from gateway.telemetry import metrics
from gateway.types import ModelState
from tests.backends.remote import States, entry, expected, job, loaded, wait_until
from tests.backends.stand_in import StandIn
from tests.listener import make_listener

HOST, SILENT = "pods.test", "127.0.0.1"


class Pods:
    """Servers at the addresses of one name, at the same port."""

    def __init__(self, stack: AsyncExitStack, port: int) -> None:
        self.port = port
        self.addresses: list[str] = []
        self.is_broken = False
        self.resolver = Resolver(self._look_up)
        self._stack = stack

    def _look_up(self, host: str, port: int) -> list[str]:
        assert (host, port) == (HOST, self.port)
        if self.is_broken:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self.addresses[::-1]  # resolvers rotate their answers

    async def add(self, number: int, weights: str = "first") -> StandIn:
        server = StandIn(port=self.port, host=f"127.0.0.{number}", weights=weights)
        await self._stack.enter_async_context(server.serving())
        self.addresses.append(server.host)
        return server

    def entry(self, kind: str = "openai", **upstream: object) -> ModelEntry:
        path = "/v1" if kind == "openai" else ""
        urls = (f"dns+http://{HOST}:{self.port}{path}",)
        return entry(kind=kind, upstream={"urls": urls, "resolve_interval_s": 0.1, **upstream})


@pytest.fixture
async def pods(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pods]:
    monkeypatch.setattr(pool_module, "LINGER_S", 0.0)
    with make_listener() as free:
        port = free.getsockname()[1]
    async with AsyncExitStack() as stack:
        yield Pods(stack, port)


def names(backend: UpstreamBackend) -> list[str]:
    return [server.name for server in backend.servers]


def working(backend: UpstreamBackend) -> list[str]:
    return [server.name.partition(":")[0] for server in backend.servers if server.breaker.is_closed]


@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_each_address_is_a_server_that_keeps_the_name(pods: Pods, kind: str) -> None:
    servers = [await pods.add(number) for number in (3, 1, 2)]

    async with loaded(pods.entry(kind), resolver=pods.resolver) as backend:
        assert names(backend) == [f"127.0.0.{number}:{pods.port}" for number in (1, 2, 3)]
        await wait_until(lambda: len(working(backend)) == 3)
        for _ in range(40):
            embeddings = await backend.embed(job())
        [replica, *_] = backend.replicas()

    cosines = np.sum(embeddings.vectors * expected(), axis=1) / np.linalg.norm(expected(), axis=1)
    assert cosines / np.linalg.norm(embeddings.vectors, axis=1) == pytest.approx(np.ones(10), abs=1e-5)
    assert all("text number 9" in str(server.bodies) for server in servers)
    assert {headers["host"] for server in servers for headers in server.headers} == {f"{HOST}:{pods.port}"}
    assert (replica.name, replica.state) == (f"127.0.0.1:{pods.port}", ModelState.READY)
    assert backend.replicas() == []


async def test_a_new_address_gets_requests_once_it_gives_the_right_vectors(pods: Pods) -> None:
    await pods.add(1)
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        wrong = await pods.add(2, weights="other")
        right = await pods.add(3)
        await wait_until(lambda: working(backend) == ["127.0.0.1", "127.0.0.3"])
        await wait_until(lambda: "different vectors" in backend.servers[1].breaker.reason)
        asked = len(wrong.bodies)
        for _ in range(20):
            await backend.embed(job(["a text of a client"]))

    assert not any("a text of a client" in str(body) for body in wrong.bodies[:asked])
    assert not any("a text of a client" in str(body) for body in wrong.bodies)
    assert any("a text of a client" in str(body) for body in right.bodies)


async def test_an_address_is_not_asked_before_its_check_has_ended(pods: Pods) -> None:
    await pods.add(1)
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        slow = await pods.add(2)
        slow.delay_s = 0.05
        await wait_until(lambda: len(backend.servers) == 2)

        assert backend.replicas()[1].reason == f"the vectors of 127.0.0.2:{pods.port} have not been checked yet"
        await backend.embed(job(["a text of a client"]))
        await wait_until(lambda: len(working(backend)) == 2)

    assert not any("a text of a client" in str(body) for body in slow.bodies)


async def test_a_removed_address_finishes_its_requests_and_then_loses_its_metrics(pods: Pods) -> None:
    await pods.add(1)
    leaving = await pods.add(2)
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        await wait_until(lambda: len(working(backend)) == 2)
        leaving.delay_s = 0.4
        bodies = len(leaving.bodies)
        requests = [asyncio.create_task(backend.embed(job())) for _ in range(6)]
        await wait_until(lambda: len(leaving.bodies) > bodies)
        pods.addresses.remove(leaving.host)
        await wait_until(lambda: len(backend.servers) == 1)
        label = ("far", f"{leaving.host}:{pods.port}")
        assert label in metrics.values(metrics.UPSTREAM_UP)

        answers = await asyncio.gather(*requests)
        await wait_until(lambda: label not in metrics.values(metrics.UPSTREAM_UP))
        last = len(leaving.bodies)
        for _ in range(5):
            await backend.embed(job())
        assert len(leaving.bodies) == last

    assert all(len(answer.vectors) == 10 for answer in answers)
    assert not [labels for labels in metrics.values(metrics.UPSTREAM_REQUESTS) if labels[1] == label[1]]


async def test_an_address_that_comes_back_while_it_leaves_is_checked_again(
    pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LINGER_S", 100.0)
    await pods.add(1)
    other = await pods.add(2)
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        await wait_until(lambda: len(working(backend)) == 2)
        pods.addresses.remove(other.host)
        await wait_until(lambda: len(backend.servers) == 1)
        other.weights = "other"
        pods.addresses.append(other.host)
        await wait_until(lambda: len(backend.servers) == 2 and "different vectors" in backend.servers[1].breaker.reason)

        assert working(backend) == ["127.0.0.1"]


async def test_names_that_cannot_be_looked_up_keep_their_servers(pods: Pods) -> None:
    await pods.add(1)
    states = States()
    async with loaded(pods.entry(), states, pods.resolver) as backend:
        before = metrics.values(metrics.UPSTREAM_LOOKUPS).get(("far", "failed"), 0)
        pods.is_broken = True
        await wait_until(lambda: metrics.values(metrics.UPSTREAM_LOOKUPS).get(("far", "failed"), 0) > before + 1)
        await backend.embed(job())
        pods.is_broken = False
        pods.addresses, kept = [], pods.addresses  # the answer of a Service without ready pods
        failed = metrics.values(metrics.UPSTREAM_LOOKUPS)["far", "failed"]
        await wait_until(lambda: metrics.values(metrics.UPSTREAM_LOOKUPS)["far", "failed"] > failed + 1)
        await backend.embed(job())
        pods.addresses = kept
        await pods.add(2)
        await wait_until(lambda: len(working(backend)) == 2)

    assert states.reported == []


async def test_when_all_pods_are_exchanged_at_once_the_old_ones_serve_until_a_new_one_works(pods: Pods) -> None:
    await pods.add(1)
    states = States()
    async with loaded(pods.entry(probe_interval_s=0.1), states, pods.resolver) as backend:
        new = await pods.add(2, weights="other")
        pods.addresses.remove("127.0.0.1")
        await wait_until(lambda: "different vectors" in backend.servers[0].breaker.reason)
        await backend.embed(job())
        assert working(backend) == ["127.0.0.1"]
        new.weights = "first"
        await wait_until(lambda: working(backend) == ["127.0.0.2"])
        await backend.embed(job())

    assert states.reported == []


async def test_old_pods_that_are_gone_leave_the_model_recovering_until_a_new_one_works(pods: Pods) -> None:
    states = States()
    async with AsyncExitStack() as old:
        first = StandIn(port=pods.port)
        await old.enter_async_context(first.serving())
        pods.addresses = [first.host]
        async with loaded(pods.entry(max_retries=0), states, pods.resolver, golden_interval_s=0.2) as backend:
            new = await pods.add(2, weights="other")
            await old.aclose()
            pods.addresses.remove(first.host)
            reason = await states.wait_for(ModelState.RECOVERING)
            with pytest.raises(UpstreamUnavailable):
                await backend.embed(job())
            new.weights = "first"
            await states.wait_for(ModelState.READY)
            await backend.embed(job())

    assert "127.0.0.2" in reason


async def test_a_name_without_addresses_keeps_the_model_from_loading_and_says_so(pods: Pods) -> None:
    pods.is_broken = True
    backend = UpstreamBackend(pods.entry(), Settings(), pods.resolver)

    with pytest.raises(NotReachable, match=r"'pods.test' cannot be resolved: Temporary failure in name resolution"):
        await backend.plan()

    pods.is_broken = False
    await pods.add(1)
    assert (await backend.plan()).engine == f"openai at {HOST}:{pods.port}"
    await backend.stop()


async def test_a_pod_with_other_weights_does_not_keep_the_others_from_loading(pods: Pods) -> None:
    await pods.add(1, weights="first")
    await pods.add(2, weights="other")
    await pods.add(3, weights="first")

    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        await wait_until(lambda: working(backend) == ["127.0.0.1", "127.0.0.3"])


async def test_a_pod_that_gives_other_vectors_than_the_golden_file_gets_no_requests(pods: Pods, tmp_path: Path) -> None:
    """Though it comes first, and nothing but the file says which of the two is right."""
    await pods.add(2, weights="right")
    path = tmp_path / "far.json"
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        golden.write(path, backend.base_fingerprint(), backend.probe)
    wrong = await pods.add(1, weights="other")
    model = pods.entry().model_copy(update={"golden": str(path)})

    async with loaded(model, resolver=pods.resolver) as backend:
        await wait_until(lambda: working(backend) == ["127.0.0.2"])
        for _ in range(20):
            await backend.embed(job(["a text"]))
        assert ["a text"] not in [body["input"] for body in wrong.bodies], "it gets only probes"


@contextmanager
def silent_address(port: int) -> Iterator[str]:
    """Listen on an address that accepts no further connection, like that of a machine that is switched off."""
    with socket.create_server((SILENT, port), backlog=0) as listener, ExitStack() as stack:
        for _ in range(3):  # as many as the queue holds; it is never emptied
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield SILENT


@pytest.mark.parametrize("kind", ["openai", "tei"])
@pytest.mark.parametrize("death", ["refuses", "is silent"])
async def test_a_dead_address_keeps_no_model_from_loading_and_gets_no_requests(
    pods: Pods, kind: str, death: str
) -> None:
    with ExitStack() as stack:
        dead = stack.enter_context(silent_address(pods.port)) if death == "is silent" else SILENT
        pods.addresses.append(dead)  # it comes first
        await pods.add(2)
        async with loaded(pods.entry(kind, connect_timeout_s=0.3), resolver=pods.resolver) as backend:
            await wait_until(lambda: working(backend) == ["127.0.0.2"])
            for _ in range(10):
                assert len((await backend.embed(job())).vectors) == 10
            [first, _] = backend.replicas()
            assert first.state is ModelState.RECOVERING
            assert f"{dead}:{pods.port}" in first.reason


async def test_an_address_that_dies_costs_no_request_and_comes_back(pods: Pods) -> None:
    await pods.add(2)
    async with AsyncExitStack() as mortal:
        server = StandIn(port=pods.port, host="127.0.0.1")
        await mortal.enter_async_context(server.serving())
        pods.addresses.append("127.0.0.1")
        async with loaded(pods.entry(), resolver=pods.resolver) as backend:
            await wait_until(lambda: len(working(backend)) == 2)
            await mortal.aclose()  # but the name keeps its address, as with a TTL that has not passed
            for _ in range(20):
                assert len((await backend.embed(job())).vectors) == 10
            await wait_until(lambda: working(backend) == ["127.0.0.2"])
            async with StandIn(port=pods.port, host="127.0.0.1").serving():
                await wait_until(lambda: len(working(backend)) == 2)


async def test_an_address_that_is_in_the_registry_too_is_one_server(pods: Pods) -> None:
    await pods.add(1)
    await pods.add(2)
    urls = (f"http://127.0.0.2:{pods.port}/v1", f"dns+http://{HOST}:{pods.port}/v1")

    async with loaded(pods.entry(urls=urls), resolver=pods.resolver) as backend:
        assert names(backend) == [f"127.0.0.2:{pods.port}", f"127.0.0.1:{pods.port}"]


async def test_there_is_an_end_to_the_addresses_of_a_name(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_ADDRESSES", 2)
    for number in (1, 2, 3):
        await pods.add(number)

    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        assert names(backend) == [f"127.0.0.{number}:{pods.port}" for number in (1, 2)]
    assert MAX_ADDRESSES == 1024


async def test_of_many_servers_a_working_one_is_found() -> None:
    addresses = [f"10.0.{i // 250}.{i % 250 + 1}" for i in range(500)]
    model = entry(upstream={"urls": (f"dns+http://{HOST}",)})
    assert model.upstream is not None
    dialect = make_dialect(model, model.upstream)
    pool = Pool(model.id, dialect, model.upstream, Resolver(lambda *_: addresses))
    await pool.find()
    for server in pool.servers[:-1]:
        server.hold()

    chosen = [pool.choose({}) for _ in range(10)]

    assert chosen == [pool.servers[-1]] * 10
    pool.servers[-1].hold()
    assert pool.choose({}) is None
    for server in pool.servers:
        server.let_in()
    for server in pool.servers[:450]:
        server.num_texts = 1
    assert all(server is not None and server.num_texts == 0 for server in (pool.choose({}) for _ in range(20)))
    await pool.close()


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch, pods: Pods) -> AsyncIterator[Pool]:
    """Return a pool of the addresses of ``pods``, where no server is asked."""
    pods.addresses = ["10.0.0.2", "10.0.0.1"]
    model = pods.entry(resolve_interval_s=1.0)
    assert model.upstream is not None
    pool = Pool(model.id, make_dialect(model, model.upstream), model.upstream, pods.resolver)
    await pool.find()
    yield pool
    await pool.close()


async def test_a_change_of_a_name_is_logged_once(pool: Pool, pods: Pods) -> None:
    one, two = (f"10.0.0.{number}:{pods.port}" for number in (1, 2))
    pods.addresses = ["10.0.0.1"]
    with capture_logs() as logs:
        await pool.find()
        await pool.find()
        pods.addresses = ["10.0.0.1", "10.0.0.2"]
        await pool.find()
        pods.is_broken = True
        await pool.find()
        await pool.find()
        pods.is_broken = False
        await pool.find()

    servers = [log for log in logs if log["event"] == "upstream_servers"]
    assert [(log["added"], log["gone"]) for log in servers] == [([], [two]), ([two], [])]
    lookups = [log for log in logs if log["event"] == "upstream_name"]
    assert [(log["log_level"], log["addresses"]) for log in lookups] == [("warning", 2), ("info", 2)]
    assert "Temporary failure" in lookups[0]["reason"]
    assert lookups[1]["reason"] == ""
    assert [server.name for server in pool.servers] == [one, two]


async def test_the_first_servers_of_a_name_are_not_logged_as_a_change(pods: Pods) -> None:
    pods.addresses = ["10.0.0.1"]
    model = pods.entry()
    assert model.upstream is not None
    pool = Pool(model.id, make_dialect(model, model.upstream), model.upstream, pods.resolver)
    with capture_logs() as logs:
        await pool.find()

    assert logs == []
    await pool.close()


async def test_a_server_that_leaves_is_closed_after_its_last_request_and_a_moment(
    pool: Pool, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = pool.servers[1]
    label = ("far", leaving.name)
    pods.addresses = ["10.0.0.1"]
    await pool.find()

    monkeypatch.setattr(pool_module, "LINGER_S", 100.0)
    await pool._close_left()
    assert leaving.name in pool.all_names
    monkeypatch.setattr(pool_module, "LINGER_S", 0.0)
    leaving.num_texts = 1
    await pool._close_left()
    assert leaving.name in pool.all_names
    assert label in metrics.values(metrics.UPSTREAM_UP)
    leaving.num_texts = 0
    await pool._close_left()
    assert leaving.name not in pool.all_names
    assert label not in metrics.values(metrics.UPSTREAM_UP)


async def test_a_server_that_comes_back_does_not_leave(pool: Pool, pods: Pods) -> None:
    both = list(pool.servers)
    for addresses in (["10.0.0.1"], ["10.0.0.1", "10.0.0.2"]):
        pods.addresses = addresses
        await pool.find()

    await pool._close_left()

    assert pool.servers == both
    assert ("far", both[1].name) in metrics.values(metrics.UPSTREAM_UP)


async def test_a_new_address_is_checked_at_once(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_LOOK_S", 100.0)
    await pods.add(1)
    async with loaded(pods.entry(), resolver=pods.resolver) as backend:
        await pods.add(2)
        await wait_until(lambda: len(working(backend)) == 2)


async def test_names_are_looked_up_about_once_per_interval(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 100.0 if len(bounds) == 4 else 0.1

    monkeypatch.setattr(pool_module.random, "uniform", uniform)
    await pods.add(1)
    async with loaded(pods.entry(), resolver=pods.resolver):
        await wait_until(lambda: len(bounds) == 4)
        await asyncio.sleep(0.05)

    assert bounds == [(0.9, 1.1)] * 4  # the fourth waits


async def test_there_are_as_many_turns_of_low_priority_as_servers() -> None:
    turns = Turns()
    turns.resize(2)
    await turns.acquire()
    await turns.acquire()
    third = asyncio.create_task(turns.acquire())
    await asyncio.sleep(0)
    assert not third.done()

    turns.resize(3)
    await third
    turns.resize(1)
    turns.release()
    turns.release()
    fourth = asyncio.create_task(turns.acquire())
    await asyncio.sleep(0)
    assert not fourth.done()
    turns.release()
    await fourth


async def test_an_address_of_ipv6_is_written_in_brackets() -> None:
    with make_listener(0, "::1") as free:
        port = free.getsockname()[1]
    async with StandIn(port=port, host="::1").serving() as server:
        model = entry(upstream={"urls": (f"dns+http://{HOST}:{port}/v1",)})
        async with loaded(model, resolver=Resolver(lambda _host, _port: ["::1"])) as backend:
            await backend.embed(job())
            assert names(backend) == [f"[::1]:{port}"]
    assert {headers["host"] for headers in server.headers} == {f"{HOST}:{port}"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a certificate for the name of the pods, signed by itself, and its key."""
    path = tmp_path_factory.mktemp("tls") / "pods.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-keyout", path, "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.mark.parametrize(("name", "works"), [(HOST, True), ("others.test", False)])
async def test_a_certificate_has_to_be_that_of_the_name(
    pods: Pods, certificate: Path, monkeypatch: pytest.MonkeyPatch, name: str, works: bool
) -> None:
    # As if it were a trusted certificate of the system.
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    model = entry(upstream={"urls": (f"dns+https://{name}:{pods.port}/v1",)})
    async with StandIn(port=pods.port, certificate=certificate).serving():
        backend = UpstreamBackend(model, Settings(), Resolver(lambda _host, _port: ["127.0.0.1"]))
        if works:
            await backend.plan()
            await backend.start(States())
            assert len((await backend.embed(job())).vectors) == 10
        else:
            with pytest.raises(NotReachable, match="ClientConnectorCertificateError"):
                await backend.plan()
        await backend.stop()


@pytest.mark.parametrize(
    ("url", "host", "port", "rest"),
    [
        ("dns+http://pods.test:8000/v1", "pods.test", 8000, "http://pods.test:8000/v1"),
        ("dns+https://pods.test/v1", "pods.test", 443, "https://pods.test/v1"),
        ("dns+http://pods.test", "pods.test", 80, "http://pods.test"),
    ],
)
def test_a_url_has_the_port_of_its_scheme(url: str, host: str, port: int, rest: str) -> None:
    name = Name.parse(url)

    assert (name.host, name.port, name.url) == (host, port, rest)
