"""A shutdown causes no errors for clients that respect readiness. Fake models, so that the process starts in a second."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

PROGRAM = """
import os, sys
from pathlib import Path
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import load_settings
from gateway.deployment import Deployment
from gateway.server import serve
from gateway.telemetry.logs import configure_logs

configure_logs("error", "json")
entry = ModelEntry(id="mini", source="./mini", enabled=True, required=True)
registry = Registry(path=Path("models.yaml"), version=1, models=(entry,))

def run(delay_s):
    backend = FakeBackend(fake_info("mini"), delay_s=delay_s)
    deployment = Deployment(registry, load_settings(os.environ), make_backend=lambda _entry: backend)
    serve(deployment, lambda addresses, _has_keys: print(os.getpid(), addresses.clients, flush=True))
"""
ONE = f"""{PROGRAM}
run(float(os.environ["DELAY_S"]))
"""
# Processes that share the imports, one for each delay; ends with 1 if one of them does not end with 0.
SEVERAL = f"""{PROGRAM}
delays_s = [float(delay_s) for delay_s in os.environ["DELAYS_S"].split()]
for delay_s in delays_s:
    if os.fork() == 0:
        run(delay_s)
        os._exit(0)
sys.exit(any([os.wait()[1] for _ in delays_s]))
"""
ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def gateway(delay_s: float = 0.02, **settings: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environ = {f"GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", ONE],
        env={"GATEWAY_PORT": "0", "GATEWAY_LOG_LEVEL": "error", "DELAY_S": str(delay_s), **environ},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def embed(client: httpx.Client, url: str) -> httpx.Response:
    return client.post(f"{url}/v1/embeddings", json={"input": "a b", "model": "mini"}, timeout=30)


def embed_ignoring_errors(client: httpx.Client, url: str) -> None:
    with suppress(httpx.HTTPError):
        embed(client, url)


class Load(threading.Thread):
    """A client that asks without a pause, until the load balancer sends it elsewhere."""

    def __init__(self, url: str, is_elsewhere: threading.Event) -> None:
        super().__init__()
        self.url = url
        self.is_elsewhere = is_elsewhere
        self.statuses: list[int] = []
        self.lost: list[str] = []

    def run(self) -> None:
        with httpx.Client() as client:
            while not self.is_elsewhere.is_set():
                try:
                    self.statuses.append(embed(client, self.url).status_code)
                except httpx.HTTPError as error:
                    self.lost.append(repr(error))


def test_a_stop_under_load_loses_no_request() -> None:
    with gateway(drain_delay_s=2, shutdown_grace_s=10) as (process, url), httpx.Client() as operator:
        is_elsewhere = threading.Event()
        clients = [Load(url, is_elsewhere) for _ in range(16)]
        for client in clients:
            client.start()
        while min(len(client.statuses) for client in clients) < 3 and all(client.is_alive() for client in clients):
            time.sleep(0.05)
        before = [len(client.statuses) for client in clients]
        process.send_signal(signal.SIGTERM)
        signaled = time.monotonic()
        time.sleep(0.2)
        while_draining = [len(client.statuses) for client in clients]
        ready = operator.get(f"{url}/health/ready")
        live = operator.get(f"{url}/health/live")
        time.sleep(0.8)  # the time that a load balancer takes to notice
        is_elsewhere.set()
        for client in clients:
            client.join(timeout=20)
        assert process.wait(timeout=20) == 0
        took_s = time.monotonic() - signaled

    assert min(before) >= 3
    assert (ready.status_code, ready.json()["status"], live.status_code) == (503, "draining", 200)
    assert [client.lost for client in clients] == [[]] * 16
    assert {status for client in clients for status in client.statuses} == {200}
    assert sum(len(client.statuses) for client in clients) > sum(while_draining)
    assert 2 < took_s < 12


def test_requests_in_flight_end_within_the_grace_time() -> None:
    with gateway(delay_s=1.0, shutdown_grace_s=10) as (process, url), httpx.Client() as client:
        answers: list[httpx.Response] = []
        request = threading.Thread(target=lambda: answers.append(embed(client, url)))
        request.start()
        wait_for_requests(url, 1)
        process.send_signal(signal.SIGTERM)
        request.join(timeout=20)

        assert process.wait(timeout=20) == 0
    assert [answer.status_code for answer in answers] == [200]


def test_while_it_drains_an_answer_sends_the_client_elsewhere() -> None:
    with gateway(drain_delay_s=60) as (process, url), httpx.Client() as client:
        before = embed(client, url)
        process.send_signal(signal.SIGTERM)
        while client.get(f"{url}/health/ready").status_code == 200:
            time.sleep(0.02)

        during = embed(client, url)

    assert (before.status_code, during.status_code) == (200, 200)
    assert "connection" not in before.headers
    assert during.headers["connection"] == "close"


class Kept(threading.Thread):
    """A client on one kept connection, with pauses, which disconnects when the server asks for it."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__()
        self.url = url
        self.pause_s = 0.001 * number
        self.num_answers = 0
        self.lost: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        connection.connect()
        while True:
            try:
                connection.request("POST", "/v1/embeddings", b'{"input": "a b", "model": "mini"}')
                answer = connection.getresponse()
                answer.read()
            except OSError as error:
                self.lost.append(repr(error))
                return
            except http.client.HTTPException as error:
                self.lost.append(repr(error))
                return
            self.num_answers += 1
            if answer.status != 200:
                self.lost.append(str(answer.status))
            if answer.will_close:
                return
            time.sleep(self.pause_s)


@contextmanager
def gateways(delays_s: Sequence[float]) -> Iterator[tuple[subprocess.Popen[str], dict[int, str]]]:
    """Run a gateway with default settings for each delay; give the process that ends with them, and URLs by process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SEVERAL],
        env={"GATEWAY_PORT": "0", "GATEWAY_LOG_LEVEL": "error", "DELAYS_S": " ".join(map(str, delays_s))},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in delays_s]
        yield process, {int(pid): url for pid, url in lines}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("wave", range(4))
def test_a_stop_with_default_settings_loses_no_request_on_a_kept_connection(wave: int) -> None:
    """uvicorn closes an idle connection at once, also one whose next request is on its way."""
    with gateways([0.00075 * number for number in range(5 * wave, 5 * wave + 5)]) as (process, urls):
        clients = {pid: [Kept(url, number) for number in range(24)] for pid, url in urls.items()}
        everyone = [client for some in clients.values() for client in some]
        for client in everyone:
            client.start()
        for pid, some in clients.items():
            while min(client.num_answers for client in some) < 3 and all(client.is_alive() for client in some):
                time.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
        for client in everyone:
            client.join(timeout=30)
        assert process.wait(timeout=30) == 0

    assert len(clients) == 5
    assert [client.lost for client in everyone if client.lost] == []
    assert all(client.num_answers > 3 for client in everyone)


def test_half_a_head_is_waited_for_when_it_stops() -> None:
    with gateway() as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nho")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(2)  # longer than an idle connection has
            connection.sendall(b"st: x\r\n\r\n")
            connection.settimeout(20)
            answer = http.client.HTTPResponse(connection)
            answer.begin()

            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert process.wait(timeout=20) == 0


def test_a_request_that_outlives_the_grace_time_gets_a_retry_after() -> None:
    with gateway(delay_s=60.0, shutdown_grace_s=1) as (process, url), httpx.Client() as client:
        answers: list[httpx.Response] = []
        request = threading.Thread(target=lambda: answers.append(embed(client, url)))
        request.start()
        wait_for_requests(url, 1)
        process.send_signal(signal.SIGTERM)
        request.join(timeout=20)

        assert process.wait(timeout=20) == 0
    assert [answer.status_code for answer in answers] == [503]
    assert answers[0].json()["error"]["code"] == "shutting_down"
    assert answers[0].headers["retry-after"]


def wait_for_requests(url: str, number: int) -> None:
    """Wait until this many requests are in flight, not counting the scrape itself."""
    with httpx.Client() as client:
        wait_until(lambda: f"gateway_requests_in_flight {number + 1}.0" in client.get(f"{url}/metrics").text)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_request_longer_than_the_grace_time_does_not_hold_up_the_stop() -> None:
    with gateway(delay_s=60.0, shutdown_grace_s=1) as (process, url), httpx.Client() as client:
        ended = threading.Event()

        def ask() -> None:
            with suppress(httpx.HTTPError):
                embed(client, url)
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        wait_for_requests(url, 1)
        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=10) == 0
        assert ended.wait(timeout=10)


def test_requests_that_the_stop_ends_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with gateway(delay_s=60.0, shutdown_grace_s=1) as (process, url), socket.socket() as half_sent:
        half_sent.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        half_sent.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\ncontent-length: 100\r\n\r\n{")
        answers: list[int] = []
        with httpx.Client() as client:
            waiting = threading.Thread(target=lambda: answers.append(embed(client, url).status_code))
            waiting.start()
            wait_for_requests(url, 2)
            process.send_signal(signal.SIGTERM)
            waiting.join(timeout=20)
        assert process.wait(timeout=20) == 0
        half_sent.settimeout(20)

        assert answers == [503]
        assert half_sent.recv(1000).startswith(b"HTTP/1.1 503")
        assert "Traceback" not in capfd.readouterr().err


def test_a_second_signal_does_not_wait_for_the_load_balancer() -> None:
    with gateway(drain_delay_s=60) as (process, _url):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=10) == 0


def test_a_third_signal_does_not_wait_for_running_requests() -> None:
    with gateway(delay_s=60.0, drain_delay_s=60, shutdown_grace_s=60) as (process, url), httpx.Client() as client:
        threading.Thread(target=embed_ignoring_errors, args=(client, url), daemon=True).start()
        wait_for_requests(url, 1)
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)

        assert process.wait(timeout=10) == 0


def test_however_many_signals_come_it_ends_with_exit_code_0() -> None:
    with gateway() as (process, _url):
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.005)

        assert process.returncode == 0


def test_the_operators_port_is_apart_and_stays_until_the_end() -> None:
    port = free_port()
    with gateway(delay_s=1.5, admin_port=port, admin_key="operator-key", api_keys="client-key") as (process, url):
        admin = f"http://127.0.0.1:{port}"
        operator = {"authorization": "Bearer operator-key"}
        assert httpx.get(f"{admin}/metrics").text.startswith("# HELP")
        assert httpx.get(f"{admin}/health/startup").status_code == 200
        assert httpx.post(f"{admin}/admin/reload").status_code == 403
        assert httpx.post(f"{admin}/admin/reload", headers=operator).json()["kept"] == ["mini"]
        assert httpx.post(f"{admin}/v1/embeddings", headers=operator).status_code in {401, 404}
        client = {"authorization": "Bearer client-key"}
        assert httpx.get(f"{url}/metrics", headers=operator).status_code == 404
        assert httpx.post(f"{url}/admin/reload", headers=operator).status_code == 404
        assert httpx.get(f"{url}/health/ready").status_code == 200
        request = threading.Thread(
            target=lambda: httpx.post(f"{url}/v1/embeddings", json={"input": "a", "model": "mini"}, headers=client)
        )
        request.start()
        wait_for_requests(admin, 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{admin}/health/ready").status_code == 503)

        assert httpx.get(f"{admin}/health/ready").json()["status"] == "draining"
        request.join(timeout=20)
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("setting", ["port", "admin_port"])
def test_a_port_in_use_is_reported_at_once(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = {"GATEWAY_PORT": "0", f"GATEWAY_{setting.upper()}": str(port), "DELAY_S": "0"}
        done = subprocess.run(
            [sys.executable, "-c", ONE],
            env=environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert f"GATEWAY_{setting.upper()}" in done.stderr
