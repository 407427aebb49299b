"""``gateway serve`` with a model that fails on command: for ``loadtest.soak``, and nothing else.

Takes a command a line from standard input: ``fail N``: the next N forwards raise; ``oom N``: they find no memory, as the
allocator of a card says it; ``hang S``: the next one takes S seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import torch

from gateway.config.registry import load_registry
from gateway.config.settings import load_settings
from gateway.deployment import Deployment
from gateway.engine.model.encoder import Encoder
from gateway.server import serve
from gateway.telemetry.logs import configure_logs


class Faults:
    """Actions of the next forward passes instead of computing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = {"fail": 0, "oom": 0}
        self._hang_s = 0.0

    def command(self, line: str) -> None:
        """Take a command."""
        name, number = line.split()
        with self._lock:
            if name == "hang":
                self._hang_s = float(number)
            else:
                self._left[name] = int(number)

    def strike(self) -> None:
        """Apply the command to the forward pass that begins now."""
        with self._lock:
            hang_s, self._hang_s = self._hang_s, 0.0
            name = next((name for name, left in self._left.items() if left), "")
            if name:
                self._left[name] -= 1
        time.sleep(hang_s)
        if name == "oom":
            raise torch.OutOfMemoryError("injected: the allocator refuses")
        if name == "fail":
            raise RuntimeError("injected: the forward fails")


def main() -> int:
    """Serve until told to stop."""
    faults = Faults()
    compute = Encoder.forward

    def forward(encoder: Encoder, groups: Any) -> Any:
        faults.strike()
        return compute(encoder, groups)

    Encoder.forward = forward  # type: ignore[method-assign,assignment]

    def listen() -> None:
        for line in sys.stdin:
            faults.command(line)

    threading.Thread(target=listen, daemon=True).start()
    settings = load_settings(os.environ)
    configure_logs(settings.log_level, "json")

    def read() -> Any:
        return load_registry(settings.models, os.environ)

    serve(Deployment(read(), settings, read_registry=read), lambda _addresses, _has_keys: None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
