"""The head of a cluster: whether it answers at the start, and what a front does when it is lost."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest
from structlog.testing import capture_logs

from bench.simulated_cluster import Simulated
from gateway.cluster import head
from gateway.errors import StartError
from tests.listener import make_listener
from tests.peers import find_module

find_module("ray")


@pytest.fixture
def port() -> int:
    """Return a port on which nothing listens."""
    with make_listener() as free:
        found: int = free.getsockname()[1]
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(head, "_START_S", 0.05)


def test_a_head_that_does_not_answer_is_refused_before_ray_tries_for_minutes(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    from gateway.cluster.deploying import Cluster

    monkeypatch.setattr("ray.init", lambda **_options: pytest.fail("it would try for two minutes"))
    with pytest.raises(StartError) as caught:
        Cluster(f"127.0.0.1:{port}").connect()

    text = str(caught.value)
    assert text.startswith(f"GATEWAY_CLUSTER=127.0.0.1:{port}: no Ray cluster was found at 127.0.0.1:{port}, or it ")
    assert f":{port}: Connection refused)" in text


def listen(stack: ExitStack, port: int, answer: bytes) -> None:
    """Listen, and answer clients until the end of the stack."""
    listening = stack.enter_context(socket.create_server(("127.0.0.1", port)))

    def serve() -> None:
        with suppress(OSError):  # it was shut down
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listening.shutdown, socket.SHUT_RDWR)  # closing alone would not wake the thread


def test_a_head_that_is_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    settings = bytes((0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100))
    with ExitStack() as stack:
        monkeypatch.setattr("time.sleep", lambda _seconds: listen(stack, port, settings))
        head.require(f"127.0.0.1:{port}")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"-ERR\r\n"])
def test_another_server_than_a_head_is_refused_before_ray_tries_for_minutes(port: int, answer: bytes) -> None:
    """Such as the dashboard of the cluster, which has another port."""
    with ExitStack() as stack:
        listen(stack, port, answer)
        with pytest.raises(
            ConnectionError, match=f"^127.0.0.1:{port}: the server there is not the head of a Ray cluster"
        ):
            head.require(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("AuthenticationError", "Token authentication is enabled but no authentication token was found"),
        ("ConnectionError", "Failed to connect to Ray cluster at 10.0.0.1:6379"),  # with a wrong token, or none
    ],
)
def test_a_token_that_is_missing_or_wrong_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, reason: str) -> None:
    from ray import exceptions

    from gateway.cluster import deploying

    def refuse(**_options: object) -> None:
        raise ConnectionError(reason) if kind == "ConnectionError" else getattr(exceptions, kind)(reason)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(deploying, "_reached", lambda address: address)
    with pytest.raises(StartError) as caught:
        deploying.Cluster("10.0.0.1:6379").connect()

    text = str(caught.value)
    assert text.startswith(f"GATEWAY_CLUSTER=10.0.0.1:6379: {reason}. ")
    assert "Set RAY_AUTH_MODE and the token as on the head of the cluster: RAY_AUTH_TOKEN" in text


def test_a_machine_that_has_not_joined_the_cluster_learns_how(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error is the one for a wrong token, with another cause."""
    from gateway.cluster import deploying

    def refuse(**_options: object) -> None:
        cause = RuntimeError("No node info found matching attributes: {}, when trying to resolve node to connect to.")
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from cause

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(deploying, "_reached", lambda address: address)
    with pytest.raises(StartError, match=r"`ray start --address=HOST:6379` on the others$"):
        deploying.Cluster("10.0.0.1:6379").connect()


async def watched(
    port: int, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> tuple[asyncio.Task[None], list[str]]:
    monkeypatch.setattr(head, "patience_s", lambda: patience_s)
    lost: list[str] = []
    return asyncio.create_task(head.watch(f"127.0.0.1:{port}", lost.append)), lost


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0.005)


async def test_a_head_that_stays_away_ends_the_front_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    with capture_logs() as logs:
        watching, lost = await watched(port, monkeypatch, 0.1)
        await asyncio.wait_for(watching, 30)

    [reason] = lost
    assert reason.startswith(f"the head of the Ray cluster, 127.0.0.1:{port}, has not answered for 0 s: ")
    assert reason.endswith(": Connection refused")
    assert [line["event"] for line in logs] == ["cluster_head_lost"]


async def test_a_head_that_comes_back_ends_nothing(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    with capture_logs() as logs:
        watching, lost = await watched(port, monkeypatch, 600)
        await until(lambda: logs)
        with socket.create_server(("127.0.0.1", port)):
            await until(lambda: len(logs) == 2)
    watching.cancel()

    assert [line["event"] for line in logs] == ["cluster_head_lost", "cluster_head_back"]
    assert lost == []


@pytest.mark.parametrize(("set_to", "patience_s"), [(None, 45), ("600", 585), ("10", 5), ("", 45), ("soon", 45)])
def test_a_front_ends_before_ray_ends_it(
    monkeypatch: pytest.MonkeyPatch, set_to: str | None, patience_s: float
) -> None:
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    if set_to is not None:
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", set_to)

    assert head.patience_s() == patience_s


class Slow:
    """A cluster of Ray on a busy machine: the first tries to add a machine fail."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def add_node(self, **_resources: object) -> str:
        if self.num_failures:
            self.num_failures -= 1
            raise Exception("The current node timed out during startup.")
        return "a node"


def test_a_simulated_machine_that_does_not_start_in_time_is_started_again() -> None:
    simulated = Simulated("127.0.0.1:1", Slow(3), 1)

    assert simulated.add_machine() == "a node"
    assert simulated.workers == ["a node"]
    with pytest.raises(Exception, match="timed out during startup"):
        Simulated("127.0.0.1:1", Slow(4), 1).add_machine()


@pytest.mark.parametrize(
    ("address", "parts"),
    [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("[fd00::1]:6379", ("fd00::1", 6379)), ("head:1", ("head", 1))],
)
def test_an_address_has_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert head.split_address(address) == parts
