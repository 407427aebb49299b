"""``gateway download`` downloads the files of models and reports its steps; then a gateway serves without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.engine.checkpoint import fetch as fetching
from tests.hub import COMMIT, LARGE, Hub, Repo
from tests.nvml import FakeDriver, install

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": os.urandom(3 * LARGE),
    "onnx/model.onnx": os.urandom(LARGE),
}


@pytest.fixture
def hub(empty_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    empty_hub.repos = {
        "owner/one": Repo(FILES, {"license": "mit"}),
        "owner/two": Repo(FILES, {"license": "cc-by-nc-4.0"}),
    }
    install(monkeypatch, FakeDriver([]))
    return empty_hub


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(f"""\
version: 1
models:
  - {{id: one, source: owner/one, revision: {COMMIT}, enabled: true}}
  - {{id: two, source: owner/two, revision: {COMMIT}}}
  - {{id: near, source: ./near, enabled: true}}
  - {{id: elsewhere, source: a/b, backend: tei, upstream: {{urls: ["http://127.0.0.1:9"]}}}}
""")
    return path


def run(models: Path, *names: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["download", *names, "--models", str(models)])
    return result.exit_code, result.stdout, result.stderr


def test_models_that_would_load_are_downloaded_with_size_license_and_cache(
    hub: Hub, models: Path, tmp_path: Path
) -> None:
    status, output, errors = run(models)

    assert (status, errors) == (0, "")
    lines = output.splitlines()
    cache = tmp_path / "cache"
    assert lines[0] == f"one: 300 kB in 3 files, {hub.url}/owner/one at {COMMIT[:12]}, license mit, into {cache}"
    assert lines[1].startswith("two: not downloaded, because it would not be loaded here: no accelerator is present")
    assert lines[1].endswith("`gateway download two` does")
    assert lines[2:4] == [
        "near: nothing to download, its source is a folder",
        "elsewhere: runs on other servers, so nothing is downloaded for it",
    ]
    assert lines[4] == "one: 300 kB of 300 kB"
    assert lines[-1] == "Done. To serve without a network: HF_HUB_OFFLINE=1 gateway serve"
    assert hub.fetched() == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_second_time_nothing_is_fetched_and_the_hub_is_not_asked(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(models)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    status, output, _ = run(models, "one")

    assert status == 0
    assert output.startswith("one: is already here, in ")
    assert hub.requests == []


def test_a_named_model_needs_an_accepted_license_too(hub: Hub, models: Path) -> None:
    status, _, errors = run(models, "two")

    assert status == 1
    assert "two: its license, cc-by-nc-4.0, forbids commercial use: it is downloaded once its entry" in errors
    models.write_text(models.read_text().replace("id: two,", "id: two, license_accepted: true,"))
    assert run(models, "two")[0] == 0


def test_a_model_that_fails_does_not_keep_the_others_from_their_download(hub: Hub, models: Path) -> None:
    models.write_text(models.read_text().replace("id: two,", "id: two, enabled: true,"))
    del hub.repos["owner/one"]

    status, output, errors = run(models)

    assert status == 1
    assert "one: owner/one at " in errors
    assert "no such repository on" in errors
    assert "two: 300 kB of 300 kB" in output
    assert "Done" not in output


def test_a_disk_that_is_too_small_for_all_together_is_reported_first(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "free_bytes", lambda _folder: 400_000)
    models.write_text(models.read_text().replace("id: two,", "id: two, enabled: true,"))

    status, _, errors = run(models)

    assert status == 1
    assert "600 kB would be downloaded, but only 400 kB are free" in errors
    assert hub.fetched() == []


def test_a_stop_keeps_the_received_bytes(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = fetching.fetch

    def stop(done: int, _total: int) -> None:
        if done > LARGE:
            raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "fetch", lambda repository, _report: fetch(repository, stop))
    status, _, errors = run(models, "one")
    monkeypatch.setattr(fetching, "fetch", fetch)
    hub.requests.clear()

    assert (status, errors) == (
        1,
        "one: stopped. The downloaded parts are kept, and the same command continues from there\n",
    )
    status, output, _ = run(models, "one")
    assert status == 0
    assert output.startswith("one: 1")
    assert " kB of 300 kB in 3 files" in output
    assert hub.ranges() == ["bytes=110000-"]


def test_a_disk_that_fills_up_is_reported_and_the_next_attempt_continues(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = fetching.fetch

    def fill(done: int, _total: int) -> None:
        if done > LARGE:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "fetch", lambda repository, _report: fetch(repository, fill))
    status, output, errors = run(models, "one")
    monkeypatch.setattr(fetching, "fetch", fetch)
    hub.requests.clear()

    assert status == 1
    assert "the disk of " in errors
    assert "is full; make room, or set HF_HOME to a folder on another disk" in errors
    assert "Done" not in output
    assert run(models, "one")[0] == 0
    assert hub.ranges() == ["bytes=110000-"]


def test_a_gated_repository_without_a_token_says_what_to_do(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["owner/one"] = Repo(FILES, token="right", is_gated=True)

    status, _, errors = run(models, "one")

    assert status == 1
    assert f"the repository is gated; accept its terms on {hub.url}/owner/one, and set HF_TOKEN to a token" in errors
    monkeypatch.setenv("HF_TOKEN", "right")
    assert run(models, "one")[0] == 0


@contextmanager
def running_proxy() -> Iterator[tuple[str, list[str]]]:
    """Run a proxy on a free port of 127.0.0.1; give its URL, and the URLs that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            asked.append(self.path)
            parts = urlsplit(self.path)
            connection = HTTPConnection(parts.netloc, timeout=10)
            connection.request(self.command, self.path.partition(parts.netloc)[2], headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"connection", "date", "server"}:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._pass_on()

        def do_HEAD(self) -> None:
            self._pass_on()

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def test_everything_goes_through_a_proxy_if_there_is_one(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_proxy() as (url, asked):
        monkeypatch.setenv("HTTP_PROXY", url)
        close_session()  # which has read the environment
        try:
            status, output, errors = run(models, "one")
        finally:
            close_session()

    assert (status, errors) == (0, "")
    assert "one: 300 kB of 300 kB" in output
    assert sorted(urlsplit(one).path for one in asked) == sorted(path for _, path, _ in hub.requests)
    assert hub.ranges() == [""]


def test_the_command_reads_the_environment(hub: Hub, models: Path, tmp_path: Path) -> None:
    """In a separate process: huggingface_hub reads HF_ENDPOINT, HF_TOKEN and HF_HOME when it is imported."""
    hub.repos["owner/one"] = Repo(FILES, token="right")
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "right",
        "HF_HOME": str(tmp_path / "home"),
    }
    command_line = [sys.executable, "-m", "gateway", "download", "one", "--models", str(models)]

    done = subprocess.run(command_line, check=False, capture_output=True, text=True, env=environ, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert f"into {tmp_path / 'home' / 'hub'}" in done.stdout
    assert (
        tmp_path / "home/hub/models--owner--one/snapshots" / COMMIT / "model.safetensors"
    ).stat().st_size == 3 * LARGE
