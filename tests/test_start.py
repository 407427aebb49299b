"""An unexpected error during a start, a reload or a stop is logged and counted, and ends as documented."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60

# ``gateway serve`` around fake models, in which one thing after the other is broken by the test.
PROGRAM = """
import os, sys, time
sys.argv = ["gateway", "serve", "--port", "0", "--models", os.environ["MODELS"]]
import gateway.cli.main
import gateway.deployment
from gateway.backends.fake import FakeBackend, fake_info

class Backend(FakeBackend):
    async def start(self, report):
        info = await super().start(report)
        {start}
        return info

gateway.deployment.make_real_backend = lambda entry, *_rest: Backend(fake_info(entry.id))
{before}
gateway.cli.main.main()
"""
BREAK_FLEET = """
import gateway.backends.enabled
def why_disabled(entry):
    raise OSError("libcuda.so.1: cannot open shared object file")
gateway.backends.enabled.why_disabled = why_disabled
"""
BREAK_SERVER = """
import gateway.server
def server_config(app, settings):
    raise RuntimeError("the framework is broken")
gateway.server.server_config = server_config
"""
BREAK_RELOAD = """
import gateway.deployment
rules, number = gateway.deployment.broken_rules, 0
def broken_rules(*arguments):
    global number
    number += 1
    if number == 2:
        raise RuntimeError("a rule is broken itself")
    return rules(*arguments)
gateway.deployment.broken_rules = broken_rules
"""
HANG = "await __import__('asyncio').to_thread(lambda: (print('loading', flush=True), time.sleep(600)))"


@contextmanager
def gateway(
    tmp_path: Path, before: str = "", start: str = "pass", **popen: object
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run the gateway with its log in a file; yield the process and the file."""
    models, log = tmp_path / "models.yaml", tmp_path / "log"
    models.write_text("version: 1\nmodels:\n  - {id: mini, source: ./mini, enabled: true}\n")
    program = PROGRAM.replace("{before}", before).replace("{start}", start)
    environ = {"MODELS": str(models), "PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environ,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            **popen,  # type: ignore[call-overload]
        )
    try:
        yield process, log
    finally:
        process.kill()
        process.communicate()


def entries(log: Path, event: str) -> list[dict[str, object]]:
    found = []
    for line in log.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["event"] == event:
                found.append(entry)
    return found


def wait_for(log: Path, event: str, number: int = 1) -> list[dict[str, object]]:
    deadline = time.monotonic() + PATIENCE_S
    while len(entries(log, event)) < number:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    return entries(log, event)


def url_of(log: Path) -> str:
    return str(wait_for(log, "listening")[0]["url"])


@pytest.mark.parametrize(
    ("before", "event", "message"),
    [
        (BREAK_FLEET, "start_failed", "libcuda.so.1: cannot open shared object file"),
        (BREAK_SERVER, "serve_failed", "the framework is broken"),
    ],
    ids=["while models load", "before"],
)
def test_every_failure_of_the_start_is_logged_and_ends_the_process_with_1(
    tmp_path: Path, before: str, event: str, message: str
) -> None:
    with gateway(tmp_path, before) as (process, log):
        assert process.wait(PATIENCE_S) == 1

    [entry] = entries(log, event)
    assert message in str(entry["exception"])
    assert message in log.read_text().splitlines()[-1]  # the last line that a person reads


def test_a_reload_that_breaks_is_logged_and_counted_and_the_next_one_works(tmp_path: Path) -> None:
    with gateway(tmp_path, BREAK_RELOAD) as (process, log):
        url = url_of(log)
        wait_for(log, "model_ready")
        process.send_signal(signal.SIGHUP)
        [entry] = wait_for(log, "reload_failed")
        assert "a rule is broken itself" in str(entry["exception"])
        assert 'gateway_reloads_total{outcome="refused"} 1.0' in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/health/ready").status_code == 200

        process.send_signal(signal.SIGHUP)
        wait_for(log, "reloaded")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0

    assert "never retrieved" not in log.read_text()


@pytest.mark.parametrize("after_s", [0.3, 1.0])
def test_a_hangup_while_it_starts_is_taken_when_it_serves(tmp_path: Path, after_s: float) -> None:
    """The imports alone take a second."""
    with gateway(tmp_path) as (process, log):
        time.sleep(after_s)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
        url = url_of(log)
        wait_for(log, "reloaded")
        assert httpx.get(f"{url}/health/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_a_hangup_while_it_stops_does_not_end_it_otherwise(tmp_path: Path) -> None:
    with gateway(tmp_path) as (process, log):
        url = url_of(log)
        wait_for(log, "model_ready")
        with socket.create_connection((url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))):
            process.send_signal(signal.SIGTERM)
            while process.poll() is None:
                process.send_signal(signal.SIGHUP)
                time.sleep(0.01)

        assert process.returncode == 0


def test_a_stop_does_not_wait_for_a_load_that_never_ends(tmp_path: Path) -> None:
    with gateway(tmp_path, start=HANG) as (process, log):
        url_of(log)
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE_S) == 0


def test_an_unread_table_holds_nothing_up(tmp_path: Path) -> None:
    before = "import gateway.cli.tables as t\nt.print_serving = lambda *_a, **_k: print('x' * 1_000_000, flush=True)"
    with gateway(tmp_path, before) as (process, log):
        url = url_of(log)
        wait_for(log, "model_ready")
        body = {"input": "a", "model": "mini"}
        assert httpx.post(f"{url}/v1/embeddings", json=body, timeout=PATIENCE_S).status_code == 200
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE_S) == 0


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_a_limit_of_files_that_is_reached_is_logged_and_counted_and_passes(tmp_path: Path) -> None:
    with gateway(tmp_path, preexec_fn=limit_files) as (process, log):
        url = url_of(log)
        wait_for(log, "model_ready")
        address = (url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))
        with httpx.Client() as kept:
            assert kept.get(f"{url}/health/live").status_code == 200
            connections = [socket.create_connection(address) for _ in range(120)]
            [entry] = wait_for(log, "no_file_descriptor_left")
            assert entry["limit"] == 64
            assert 20 < int(str(entry["num_connections"])) < 64
            assert kept.get(f"{url}/health/live", timeout=PATIENCE_S).status_code == 200
            for connection in connections:
                connection.close()

            shown = kept.get(f"{url}/metrics").text
            reached = next(line for line in shown.splitlines() if line.startswith("gateway_file_limit_reached_total "))
            assert float(reached.split()[1]) > 0
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/live").status_code == 200:
                    break
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


COUNT_OBJECTS = """
import gc
import gateway.cli.tables
gateway.cli.tables.print_serving = lambda *_a, **_k: print(len(gc.get_objects()), gc.get_freeze_count(), flush=True)
"""


def test_a_full_garbage_collection_has_little_to_scan(tmp_path: Path) -> None:
    """Libraries, routes and models are not scanned: with them, it would stop all requests for a tenth of a second."""
    with gateway(tmp_path, COUNT_OBJECTS) as (process, _log):
        assert process.stdout is not None
        watched, frozen = (int(number) for number in process.stdout.readline().split())

    assert frozen > 50_000
    assert watched < 20_000


TELL_ORDER = """
import fastapi
from gateway.deployment import Deployment
loaded = []
load, describe = Deployment.start, fastapi.FastAPI.openapi
async def start(deployment):
    await load(deployment)
    loaded.append(deployment)
def openapi(app):
    print("described once loaded:", bool(loaded), flush=True)
    return describe(app)
Deployment.start, fastapi.FastAPI.openapi = start, openapi
"""


def test_the_documentation_does_not_delay_the_load(tmp_path: Path) -> None:
    """Both need the interpreter: describing all routes takes a tenth of the start."""
    with gateway(tmp_path, TELL_ORDER) as (process, _log):
        assert process.stdout is not None
        [line] = islice((line for line in process.stdout if line.startswith("described")), 1)

    assert line == "described once loaded: True\n"
