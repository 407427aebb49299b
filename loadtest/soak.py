"""``make soak``: inject one fault after another into a gateway under mixed load, and count lost and wrong responses.

python -m loadtest.soak                    ten minutes
python -m loadtest.soak --seconds 3600     an hour
python -m loadtest.soak --cluster          the model has two replicas on a simulated Ray cluster, which loses its parts
python -m loadtest.soak --update           also writes the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.machine import describe_machine
from bench.processes import ROOT
from bench.report import update_page
from bench.servers import clean_environ, free_port
from loadtest.batch import BatchOutcome, RunningBatch
from loadtest.faults import FAULTS, MODEL, Outcome, Victim, inflict, write_registry
from loadtest.run import locust_command

PAGE = ROOT / "docs" / "reliability.md"
_FORWARD_TIMEOUT_S = 5
_SETTINGS = {"GATEWAY_LOG_LEVEL": "error", "GATEWAY_BODY_TIMEOUT_S": "2", "GATEWAY_HEADER_TIMEOUT_S": "2"}
_START_S = 120.0
_NUM_TEXTS = 100
_BURN_S = 5.0
_BATCH_LINES = 300
_BATCH_PATIENCE_S = 120.0
_COUNTED = "gateway_embed_requests_total"
# Memory may grow by this much: a reload leaves fragments.
MAX_GROWTH = 1.1
_LEAST_SAMPLES = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """The gateway's process at a time."""

    second: float
    memory_mib: float
    num_files: int


@dataclass(frozen=True, slots=True)
class Soak:
    """The results of a run.

    Attributes:
        answered: requests that were answered with the right vectors.
        failures: the others, by cause; a status is an answer, ``no answer`` is not.
        batches: one for each round of faults, which runs at the same time.
        first_round_ended: when everything had happened once, by ``time.monotonic``: from then on nothing is new.
    """

    seconds: float
    answered: int
    failures: Counter[str]
    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    exit_code: int
    first_round_ended: float
    batches: Sequence[BatchOutcome] = ()

    @property
    def lost(self) -> int:
        """How many requests had no answer."""
        return sum(count for cause, count in self.failures.items() if cause.startswith(("no answer", "not sent")))

    @property
    def wrong(self) -> int:
        """The number of responses with status 200 that did not fit their request."""
        return sum(count for cause, count in self.failures.items() if cause.startswith("wrong answer"))

    @property
    def growth(self) -> float:
        """Median memory of the last half over that of the first, after the first round; NaN if there was no other."""
        memory = [sample.memory_mib for sample in self.samples if sample.second > self.first_round_ended]
        half = len(memory) // 2
        return (
            statistics.median(memory[half:]) / statistics.median(memory[:half]) if half >= _LEAST_SAMPLES else math.nan
        )

    @property
    def problems(self) -> list[str]:
        """The failures of the run; empty if there are no failures."""
        found = [f"{self.lost} requests had no answer"] if self.lost else []
        found += [f"{self.wrong} answers were wrong"] if self.wrong else []
        found += [f"{one.name}: {one.problem}" for one in self.outcomes if one.problem]
        found += [f"not well again after: {one.name}" for one in self.outcomes if math.isnan(one.recovered_s)]
        found += [f"a batch: {problem}" for batch in self.batches for problem in batch.problems]
        found += [f"exit code {self.exit_code}"] if self.exit_code else []
        found += [f"memory grew to {self.growth:.2f} times its first value"] if self.growth > MAX_GROWTH else []
        return found


def soak(seconds: float, peak: int) -> Soak:
    """Run a gateway under load for about ``seconds``, and do everything to it, again and again."""
    with tempfile.TemporaryDirectory() as folder:
        victim = _start(Path(folder), _burn_s(seconds))
        try:
            return _run(victim, Path(folder), seconds, peak, FAULTS)
        finally:
            victim.process.kill()
            victim.process.communicate()


def soak_cluster(seconds: float, peak: int) -> Soak:
    """Do the same to a gateway whose model is on a simulated cluster, and to the cluster."""
    from loadtest import cluster_faults

    with (
        tempfile.TemporaryDirectory() as folder,
        cluster_faults.gateways_on_a_cluster(Path(folder), _SETTINGS, _burn_s(seconds)) as victim,
    ):
        return _run(victim, Path(folder), seconds, peak, cluster_faults.FAULTS)


def _burn_s(seconds: float) -> float:
    return min(_BURN_S, seconds / 10)  # a short run does not take the processor for half of it


def _start(folder: Path, burn_s: float) -> Victim:
    port = free_port()
    environ = {
        **clean_environ(),
        **_SETTINGS,
        "GATEWAY_PORT": str(port),
        "GATEWAY_MODELS": str(folder / "models.yaml"),
        "GATEWAY_BATCH_DIR": str(folder / "batches"),
        "GATEWAY_FORWARD_TIMEOUT_S": str(_FORWARD_TIMEOUT_S),
    }
    write_registry(folder / "models.yaml", 2048)
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.faulty_gateway"],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
    victim = Victim(process, port, folder / "models.yaml", burn_s=burn_s)
    if math.isnan(victim.recover()):
        process.kill()
        raise RuntimeError(f"the gateway does not start:\n{(folder / 'gateway.log').read_text()[-2000:]}")
    return victim


def _run(victim: Victim, folder: Path, seconds: float, peak: int, faults: Sequence[Callable[[Victim], None]]) -> Soak:
    samples: list[Sample] = []
    with loading(_load_command(victim.url, folder, seconds, peak)) as load, _watched(victim.process.pid, samples):
        started = time.monotonic()
        _wait_for_load(victim)
        outcomes: list[Outcome] = []
        batches: list[BatchOutcome] = []
        first_round_ended = math.inf
        batch = RunningBatch(victim.url, _BATCH_LINES)
        for fault in itertools.cycle(faults):
            outcomes.append(inflict(victim, fault))
            first_round_ended = time.monotonic() if len(outcomes) == len(faults) else first_round_ended
            print(f"{outcomes[-1].name}: well after {outcomes[-1].recovered_s:.1f} s", flush=True)
            is_last = time.monotonic() - started > seconds - 10 and len(outcomes) >= len(faults)
            if is_last or len(outcomes) % len(faults) == 0:
                batches.append(batch.finish(_BATCH_PATIENCE_S))
                batch = batch if is_last else RunningBatch(victim.url, _BATCH_LINES)
            if is_last:
                break
        load.send_signal(signal.SIGINT)  # locust writes its results then; with SIGTERM it does not
        printed, _ = load.communicate(timeout=300)
    elapsed_s = time.monotonic() - started
    victim.process.terminate()
    exit_code = victim.process.wait(60)
    results = folder / "results.json"
    if not results.exists():
        raise RuntimeError(f"the load test has no results:\n{printed.decode()[-2000:]}")
    [target] = json.loads(results.read_text())["targets"]
    failures = Counter(target["failures"])
    return Soak(
        elapsed_s, target["answered"], failures, outcomes, samples, exit_code, first_round_ended, tuple(batches)
    )


@contextmanager
def loading(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the load, and end it with the run, even if the run fails."""
    # A command in a shell's background ignores SIGINT, and so would the load, which that signal ends: it gets this handler's
    # default instead.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGINT, ignored)
    try:
        yield load
    finally:
        load.kill()
        load.communicate()


@contextmanager
def _watched(pid: int, samples: list[Sample]) -> Iterator[None]:
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(pid, samples, is_over))
    watch.start()
    try:
        yield
    finally:
        is_over.set()
        watch.join()


def _wait_for_load(victim: Victim) -> None:
    """Wait until the load has begun: the vectors of all texts are asked for first."""
    deadline = time.monotonic() + _START_S
    with httpx.Client(base_url=victim.url) as client:
        while time.monotonic() < deadline:
            families = text_string_to_metric_families(client.get("/metrics").text)
            answered = [
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == _COUNTED and sample.labels["outcome"] == "ok"
            ]
            if sum(answered) > 1.5 * _NUM_TEXTS:
                return
            time.sleep(0.5)
    raise RuntimeError("no load has come")


def _load_command(url: str, folder: Path, seconds: float, peak: int) -> list[str]:
    options = {
        "--host": url,
        "--models": MODEL,
        "--load-profile": "soak",
        "--workload": "mixed",
        "--arrivals": "open",
        "--peak": str(peak),
        "--rounds": "1",
        "--slot-s": str(seconds + 300),  # it is stopped when the last fault is over
        "--fixed-texts": str(_NUM_TEXTS),
        "--max-fail-ratio": "1",
        "--loglevel": "WARNING",
        "--out": str(folder),
    }
    return locust_command([*itertools.chain.from_iterable(options.items()), "--golden"])


def _watch(pid: int, samples: list[Sample], is_over: threading.Event) -> None:
    process = psutil.Process(pid)
    while not is_over.wait(1.0) and process.is_running():
        samples.append(Sample(time.monotonic(), process.memory_info().rss / 2**20, process.num_fds()))


def as_table(soak: Soak) -> str:
    """Return the results as Markdown."""
    by_fault: dict[str, list[Outcome]] = {}
    for outcome in soak.outcomes:
        by_fault.setdefault(outcome.name, []).append(outcome)
    files = [sample.num_files for sample in soak.samples]
    memory = [sample.memory_mib for sample in soak.samples]
    lines = [
        f"{describe_machine()}; {soak.seconds:.0f} s",
        "",
        "| counted | |",
        "|---|---|",
        f"| requests answered with the right vectors | {soak.answered:,} |",
        f"| requests without an answer | {soak.lost} |",
        f"| wrong vectors | {soak.wrong} |",
        *(f"| answered with {cause} | {count} |" for cause, count in soak.failures.most_common() if cause[0].isdigit()),
        f"| batches; their lines answered with vectors, and with an error | {len(soak.batches)}; "
        f"{sum(batch.answered for batch in soak.batches):,}, {sum(batch.failures.total() for batch in soak.batches)} |",
        f"| resident memory, MiB: first, most, last | {memory[0]:.0f}, {max(memory):.0f}, {memory[-1]:.0f} |",
        f"| memory after everything had happened once: last half / first half | {_growth(soak)} |",
        f"| open files: first, most, last | {files[0]}, {max(files)}, {files[-1]} |",
        f"| exit code after SIGTERM | {soak.exit_code} |",
        "",
        "| fault | times | lasted, s | until recovered, s (worst) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {len(found)} | {max(o.lasted_s for o in found):.1f} | {max(o.recovered_s for o in found):.1f} |"
            for name, found in by_fault.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _growth(soak: Soak) -> str:
    return "the run was too short" if math.isnan(soak.growth) else f"{soak.growth:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 1 if anything was lost, wrong, or not well again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=600, help="how long, at least until everything has happened once"
    )
    parser.add_argument("--peak", type=int, default=12, help="turns a second at the top of the waves")
    parser.add_argument("--cluster", action="store_true", help="the model has replicas on a simulated Ray cluster")
    parser.add_argument("--update", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args(arguments)
    # A shell that runs this in the background has it ignored, here and in processes that this one starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = (soak_cluster if options.cluster else soak)(options.seconds, options.peak)
    table = as_table(result)
    print(f"\n{table}")
    for problem in result.problems:
        print(f"FAILED  {problem}")
    if options.update:
        update_page("loadtest.soak --cluster" if options.cluster else "loadtest.soak", table, PAGE)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
