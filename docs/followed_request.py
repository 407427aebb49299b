"""Follow one ``POST /v1/embeddings`` through a gateway: the modules that it enters, and the values that it creates.

:func:`follow` starts this file as a script in a separate process, where the gateway runs as it does in production, but under
Python's profiling hook. It follows several requests and leaves out what only some of them met, such as a timer that fired.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Final

MODEL: Final = "all-minilm-l6-v2"
NUM_REQUESTS: Final = 3
_TIMEOUT_S: Final = 300


def follow(project: Path) -> tuple[list[str], list[str]]:
    """Return the modules that a request enters and the types of the values that it makes, of the gateway in a checkout."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHON"))}
    environment |= {
        "GATEWAY_PORT": str(port),
        "GATEWAY_MODELS": str(project / "models.yaml"),
        "GATEWAY_HOST": "127.0.0.1",
    }
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        out = Path(folder) / "met.json"
        process = subprocess.Popen(
            [sys.executable, __file__, str(project), str(out)], env=environment, cwd=folder, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(f"{url}/health/ready")
            met = [_followed(url, process, out, number) for number in range(NUM_REQUESTS + 1)][1:]  # the first warms up
        finally:
            process.terminate()
            process.wait(timeout=_TIMEOUT_S)
    modules, values = (set.intersection(*(set(kind) for kind in kinds)) for kinds in zip(*met, strict=True))
    return sorted(modules), sorted(values)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    message = f"no gateway answers {url} after {_TIMEOUT_S} s"
    raise TimeoutError(message)


def _followed(url: str, process: subprocess.Popen[bytes], out: Path, number: int) -> tuple[list[str], list[str]]:
    """Send one request between the two signals; return the modules and values that it met."""
    body = json.dumps(
        {"model": MODEL, "input": [f"Request {number} is short.", f"It has {number + 2} texts."]}
    ).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", data=body, headers={"content-type": "application/json"})
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        answer.read()
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    recorded = out.with_name(f"{out.name}.{number + 1}")
    while not recorded.exists():
        time.sleep(0.05)
    modules, values = json.loads(recorded.read_text(encoding="utf-8"))
    return modules, values


class Recorder:
    """Notes the gateway's modules that are entered, and its values that are made, while it is on."""

    def __init__(self, project: Path, out: Path) -> None:
        self._source = f"{project / 'gateway'}{os.sep}"
        self._out = out
        self._is_on = False
        self._num_written = 0
        self._modules: set[str] = set()
        self._values: set[str] = set()

    def install(self) -> None:
        """Watch all threads, and obey SIGUSR1 (on) and SIGUSR2 (off, and write)."""
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)
        threading.setprofile(self._note)  # for threads that begin later; this one is watched from the first SIGUSR1 on

    def _begin(self, signal_number: int, frame: FrameType | None) -> None:
        sys.setprofile(self._note)
        self._modules.clear()
        self._values.clear()
        self._is_on = True

    def _end(self, signal_number: int, frame: FrameType | None) -> None:
        self._is_on = False
        self._num_written += 1
        unfinished = self._out.with_name("unfinished")
        unfinished.write_text(json.dumps([sorted(self._modules), sorted(self._values)]), encoding="utf-8")
        unfinished.rename(self._out.with_name(f"{self._out.name}.{self._num_written}"))

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._is_on or event not in {"call", "return"}:
            return
        code = frame.f_code
        if code.co_filename.startswith(self._source):
            if event == "call":
                self._modules.add(code.co_filename.removeprefix(self._source))
            elif hasattr(type(argument), "model_fields"):  # pydantic fills them without a call of Python
                self._note_value(type(argument))
        elif event == "call" and code.co_filename == "<string>" and code.co_name in {"__init__", "__new__", "<lambda>"}:
            made = frame.f_locals.get("_cls") or type(frame.f_locals.get("self"))
            self._note_value(made)

    def _note_value(self, cls: type) -> None:
        is_value = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields") or hasattr(cls, "model_fields")
        if is_value and cls.__module__.startswith("gateway.") and not cls.__module__.startswith("gateway.config."):
            self._values.add(cls.__qualname__)


def _serve_recorded(project: Path, out: Path) -> None:
    """Serve the gateway of a checkout under a recorder."""
    Recorder(project, out).install()
    sys.argv = ["gateway", "serve"]
    sys.path[0] = str(project)
    # 4b8f16e and older have no gateway/__main__.py.
    name = "gateway" if (project / "gateway" / "__main__.py").exists() else "gateway.cli"
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve_recorded(Path(sys.argv[1]), Path(sys.argv[2]))
