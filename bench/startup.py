"""Measure the start of a gateway: the time until it serves and answers first, and its memory.

Starts the gateway several times as a separate process, with the registry of the project, and prints the medians.

    python -m bench.startup [--runs 3]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import httpx
import psutil

from bench.machine import describe_machine

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Run:
    """One start: seconds since the command, milliseconds per answer, resident memory in MiB."""

    alive_s: float
    ready_s: float
    first_answer_ms: float
    second_answer_ms: float
    ready_mib: float
    after_2048_texts_mib: float


LABELS = {
    "alive_s": "the server answers `/health/live`, s",
    "ready_s": "the model is loaded and warm (`/health/ready`), s",
    "first_answer_ms": "first embedding of one text, ms",
    "second_answer_ms": "second embedding of one text, ms",
    "ready_mib": "resident memory when ready, MiB",
    "after_2048_texts_mib": "resident memory after 2,048 texts in one request, MiB",
}


def measure() -> Run:
    """Start a gateway, time it, and stop it."""
    port = _free_port()
    base_url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", "--port", str(port)],
        env={**os.environ, "GATEWAY_LOG_LEVEL": "error"},
        stdout=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=base_url, timeout=_TIMEOUT_S) as client:
            _wait_until(lambda: client.get("/health/live").status_code == 200)
            alive_s = time.monotonic() - started
            _wait_until(lambda: client.get("/health/ready").status_code == 200)
            ready_s = time.monotonic() - started
            memory = psutil.Process(process.pid)
            ready_mib = memory.memory_info().rss / 2**20
            first_ms, second_ms = (_embed_ms(client, [f"Question {n} about the gateway"]) for n in range(2))
            _embed_ms(client, [f"Text number {n} of many, with a few words in it." for n in range(2048)])
            after_mib = memory.memory_info().rss / 2**20
    finally:
        process.terminate()
        process.wait(_TIMEOUT_S)
    return Run(alive_s, ready_s, first_ms, second_ms, ready_mib, after_mib)


def _embed_ms(client: httpx.Client, texts: list[str]) -> float:
    started = time.monotonic()
    client.post("/v1/embeddings", json={"input": texts}).raise_for_status()
    return (time.monotonic() - started) * 1000


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if is_true():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError("the gateway did not come up")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = [measure() for _ in range(parser.parse_args().runs)]
    print(f"{describe_machine()}\n\n| median of {len(runs)} starts | |\n|---|---|")
    for field in fields(Run):
        values = [getattr(run, field.name) for run in runs]
        print(f"| {LABELS[field.name]} | {statistics.median(values):.{1 if field.name.endswith('_s') else 0}f} |")


if __name__ == "__main__":
    main()
