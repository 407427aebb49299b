"""A separate environment, and a process in it that runs clients."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path(__file__).parents[3] / "build" / "clients"
_WORKER = Path(__file__).with_name("worker.py")


class ClientError(Exception):
    """A client raised an error.

    Attributes:
        name: of its class.
    """

    def __init__(self, name: str, message: str, trace: str) -> None:
        super().__init__(message)
        self.name = name
        self.add_note(trace)


class Environment:
    """Runs the functions of ``calls.py`` in another environment."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def call(self, function: str, **arguments: object) -> Any:
        """Call a function and return its result, as JSON holds it.

        Raises:
            ClientError: it raised something.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process has ended with {self._process.wait(10)}; its output is in the output of the test"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"], answer["trace"])
        return answer["result"]


@contextmanager
def running(name: str, folder: Path) -> Iterator[Environment]:
    """Start a process in the environment of a dependency group; ``folder`` is where its clients may write."""
    python = ENVIRONMENTS / name / "bin" / "python"
    assert python.exists(), f"{python} is not there: make install-clients"
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "NO_PROXY": "127.0.0.1",
        "ANONYMIZED_TELEMETRY": "False",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
    }
    process = subprocess.Popen(
        [python, _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=folder
    )
    with process:
        try:
            yield Environment(process)
        finally:
            process.kill()
