"""Locust itself, as a process, against a gateway that serves two fake models, one correct and one faulty."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import InferenceFailed
from gateway.server import server_config
from gateway.types import Embeddings, EmbedJob
from loadtest.run import locust_command
from tests.listener import make_listener

pytestmark = pytest.mark.slow

SENTENCES = "".join(f"sentence {'x' * (number % 9 + 1)} tells of some matter and then ends\n" for number in range(40))


class FailingBackend(FakeBackend):
    """Fails at every third request."""

    count = 0

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.count += 1
        if self.count % 3 == 0:
            raise InferenceFailed("it failed")
        return await super().embed(job)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    def make_backend(entry: ModelEntry) -> FakeBackend:
        kinds = {"right": FakeBackend, "failing": FailingBackend}
        return kinds.get(entry.id, FakeBackend)(fake_info(entry.id), delay_s=0.05 if entry.id == "slow" else 0.0)

    entries = tuple(ModelEntry(id=name, source="./x", enabled=True) for name in ("right", "slow", "failing"))
    settings = Settings()
    deployment = Deployment(
        Registry(path=Path("models.yaml"), version=1, models=entries), settings, make_backend=make_backend
    )
    server = uvicorn.Server(server_config(create_app(deployment), settings))
    with make_listener() as listener:

        async def run() -> None:
            await deployment.start()
            await server.serve(sockets=[listener])
            await deployment.stop()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def load(url: str, folder: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Run a short load test; return its exit code, its output, and its results by target."""
    texts = folder / "texts.txt"
    texts.write_text(SENTENCES)
    common = ["--host", url, "--texts", str(texts), "--out", str(folder), "--slot-s", "5", "--loglevel", "WARNING"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LOCUST", "LOADTEST"))}
    done = subprocess.run(
        locust_command([*common, *options]),
        env={**environ, "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert (folder / "results.json").exists(), done.stdout
    results = json.loads((folder / "results.json").read_text())
    return done.returncode, done.stdout, {target["label"]: target for target in results["targets"]}


def test_two_models_side_by_side(url: str, tmp_path: Path) -> None:
    code, printed, found = load(url, tmp_path, "--models", "right,slow", "--workload", "search", "--peak", "2")

    assert code == 0, printed
    assert found["right"]["answered"] > found["slow"]["answered"] > 20
    assert found["right"]["failures"] == found["slow"]["failures"] == {}
    assert 45 < found["slow"]["p50_ms"] < 500
    assert found["slow"]["stages_ms"]["total"] > 45
    assert found["slow"]["ratios"]["rps"] < 1 < found["slow"]["ratios"]["p95"]
    assert re.search(r"requests/s, x right", printed)
    page = (tmp_path / "report.html").read_text()
    assert "Every limit held." in page
    assert "slow@" in page  # the spaces are among the facts
    plots = set(re.findall(r'<div class="plot" id="(\w+)"><svg class="drawing" role="img"', page))
    assert plots >= {"throughput", "latency", "stages"}
    assert "<script" not in page
    assert len(page) < 100_000
    seconds = list(csv.DictReader((tmp_path / "timeline.csv").read_text().splitlines()))
    assert {row["target"] for row in seconds} == {"right", "slow"}
    assert sum(int(row["answered"]) for row in seconds) >= found["right"]["answered"] + found["slow"]["answered"]


def test_a_limit_that_does_not_hold_fails_the_run(url: str, tmp_path: Path) -> None:
    code, printed, found = load(
        url, tmp_path, "--models", "right,failing", "--workload", "search", "--peak", "2", "--p95-ms", "right=5000"
    )

    assert code == 1
    assert found["right"]["failures"] == {}
    assert found["failing"]["failures"].keys() == {"500 inference_failed"}
    assert re.search(r"FAILED  failing: 3[0-6]\.\d+ % failed; the limit is 1 %", printed)


def test_open_arrivals_over_two_workers_come_as_offered(url: str, tmp_path: Path) -> None:
    code, printed, found = load(
        url,
        tmp_path,
        "--models",
        "slow",
        "--workload",
        "search",
        "--arrivals",
        "open",
        "--peak",
        "40",
        "--slot-s",
        "8",
        "--processes",
        "2",
        "--golden",
        "--fixed-texts",
        "20",
    )

    assert code == 0, printed
    # A Poisson process of 40 a second over 6 s: 240 on average, within four standard deviations of 15.5.
    assert 178 < found["slow"]["offered_rps"] * found["slow"]["seconds"] < 302
    assert found["slow"]["rps"] == pytest.approx(found["slow"]["offered_rps"], rel=0.1)


def test_wrong_options_are_errors(url: str, tmp_path: Path) -> None:
    done = subprocess.run(
        locust_command(["--host", url, "--models", "right", "--golden"]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "loadtest: --golden needs --fixed-texts NUMBER" in done.stderr
