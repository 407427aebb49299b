"""How long requests take when fronts spread them over 1 to 1,000 replicas: p99 against load, simulated.

python -m bench.simulate             all tables, about two minutes
python -m bench.simulate --quick     with fewer requests, in seconds
python -m bench.simulate --update    also writes the tables and the figure into docs/scale.md and docs/scale.svg

The time of a batch is what `bench.cpu` measured, from its table in docs/performance.md: a replica is one stream of one core.
The rest is arithmetic; the machine that this runs on does not matter, except for the comparison with replicas that run.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.fake_replicas import FakeReplica, run_fakes
from bench.processes import ROOT
from bench.queueing import Policy, System, Times, bursts, poisson, simulate
from bench.report import note, number, table, update_page
from bench.simulate_figure import draw

PAGE = ROOT / "docs" / "scale.md"
FIGURE = ROOT / "docs" / "scale.svg"
MEASURED = ROOT / "docs" / "performance.md"
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
REPLICAS = (1, 10, 100, 1000)
POLICIES: tuple[Policy, ...] = ("random", "two", "least")
_FRONTS = (1, 4, 16, 64, 256)
_NAMES = {
    "random": "any replica",
    "two": "the better of two",
    "of 64": "the best of 64",
    "least": "least outstanding",
}
_LEAST_REQUESTS = 200_000
# Requests for each replica, by load: nearly full replicas take long to get into their usual state.
_PER_REPLICA = {0.3: 600, 0.5: 600, 0.7: 600, 0.8: 1500, 0.9: 2500}
_WARM_UP = 3  # this part of the requests is not counted
_SEED = 20
Arrivals = Callable[[float, int, np.random.Generator], Times]


@dataclass(frozen=True, slots=True)
class Curve:
    """The time of a batch, as it was measured at a few sizes; on a straight line between them.

    Attributes:
        max_batch: the largest size that was measured.
    """

    sizes: Sequence[int]
    seconds: Sequence[float]

    @property
    def max_batch(self) -> int:
        return self.sizes[-1]

    def table(self) -> list[float]:
        """Return the seconds of each size, from 0 on."""
        return [0.0, *(float(np.interp(size, self.sizes, self.seconds)) for size in range(1, self.max_batch + 1))]


def read_curve(page: Path = MEASURED) -> Curve:
    """Return the times of a batch of all-MiniLM-L6-v2 on one stream, from the table that `bench.cpu` wrote.

    Raises:
        ValueError: the page has no such table.
    """
    section = re.search(
        r"<!-- bench.cpu -->(.*?)<!-- end of bench.cpu -->", page.read_text(encoding="utf-8"), re.DOTALL
    )
    streams = section and re.search(r"(\d+) stream\(s\)", section[1])
    if section is None or streams is None:
        raise ValueError(f"{page} has no table of bench.cpu")
    # Texts per batch, and texts per second with shared rows: the first and third column of the first table.
    rows = re.findall(r"^\| (\d+) \| [\d,]+ \| ([\d,]+) \|", section[1].partition("**ModernBERT")[0], re.MULTILINE)
    sizes = [int(size) for size, _ in rows]
    rates = [float(rate.replace(",", "")) / int(streams[1]) for _, rate in rows]
    return Curve(sizes, [size / rate for size, rate in zip(sizes, rates, strict=True)])


def p99_ms(system: System, load: float, arrivals: Arrivals, scale: float) -> float:
    """Return the 99th percentile of the milliseconds of a request.

    Args:
        load: the requests per second, as a share of the replicas' capacity with full batches; one of ``LOADS``.
        scale: of the number of requests; 1 for the figures of the documentation.
    """
    count = int(scale * max(_LEAST_REQUESTS, _PER_REPLICA[load] * system.replicas))
    rng = np.random.default_rng(_SEED)
    seconds = simulate(system, arrivals(load * system.capacity, count, rng), rng)
    return 1000 * float(np.percentile(seconds[count // _WARM_UP :], 99))


class Simulations:
    """The tables, from one curve."""

    def __init__(self, curve: Curve, scale: float) -> None:
        self.curve = curve
        self._batch_s = curve.table().__getitem__
        self._scale = scale

    def system(self, replicas: int, policy: Policy, fronts: int = 1) -> System:
        return System(replicas, self._batch_s, self.curve.max_batch, fronts, policy)

    def by_load(self, arrivals: Arrivals, sizes: Sequence[int] = REPLICAS) -> dict[tuple[int, Policy], list[float]]:
        """Return p99 in ms, by replicas and policy, for each load."""
        found = {}
        for replicas in sizes:
            for policy in POLICIES if replicas > 1 else POLICIES[-1:]:
                note(f"{replicas} replicas, {policy}")
                system = self.system(replicas, policy)
                found[replicas, policy] = [p99_ms(system, load, arrivals, self._scale) for load in LOADS]
        return found

    def by_fronts(self, replicas: int, load: float, policies: Sequence[Policy] = POLICIES) -> dict[Policy, list[float]]:
        """Return p99 in ms by policy, for each number of fronts."""
        note(f"{replicas} replicas, {_FRONTS} fronts")
        return {
            policy: [p99_ms(self.system(replicas, policy, fronts), load, poisson, self._scale) for fronts in _FRONTS]
            for policy in policies
        }

    def of_some(self, replicas: int, load: float) -> dict[Policy, float]:
        """Return p99 in ms by policy, for one front of many replicas."""
        policies: tuple[Policy, ...] = ("two", "of 64", "least")
        return {policy: p99_ms(self.system(replicas, policy), load, poisson, self._scale) for policy in policies}


def load_table(found: dict[tuple[int, Policy], list[float]]) -> str:
    """Return p99 against load as Markdown."""
    rows = [
        [f"{replicas:,}", _NAMES[policy] if replicas > 1 else "", *map(number, values)]
        for (replicas, policy), values in found.items()
    ]
    return table(["replicas", "a front chooses", *(f"{load:.0%} load" for load in LOADS)], rows)


@dataclass(frozen=True, slots=True)
class Check:
    """A run of replicas that sleep, and its simulation: the mean and p90 in ms of both."""

    real_ms: tuple[float, float]
    simulated_ms: tuple[float, float]


def check(seconds: float, load: float = 0.7, slower: float = 8.0, max_batch: int = 8) -> Check:
    """Send Poisson arrivals to two fake replicas over HTTP as the gateway does, and simulate the same arrivals.

    Args:
        slower: how much longer batches take than measured, so that the work of this machine matters less.
    """
    batch_s = [slower * value for value in read_curve().table()].__getitem__
    system = System(2, batch_s, max_batch)
    rng = np.random.default_rng(_SEED)
    rate = load * system.capacity
    arrivals = poisson(rate, int(rate * seconds), rng)
    real = asyncio.run(run_fakes([FakeReplica(batch_s, max_batch) for _ in range(2)], arrivals))
    simulated = np.concatenate([simulate(system, arrivals, rng) for _ in range(20)])
    return Check(_mean_and_p90(real), _mean_and_p90(simulated))


def _mean_and_p90(seconds: Times) -> tuple[float, float]:
    return 1000 * float(seconds.mean()), 1000 * float(np.percentile(seconds, 90))


def markdown(simulations: Simulations, checked: Check) -> tuple[str, str]:
    """Return all tables as Markdown, and the figure as SVG."""
    curve = simulations.curve
    by_load = simulations.by_load(poisson)
    in_bursts = simulations.by_load(bursts, REPLICAS[:3])
    by_fronts = simulations.by_fronts(100, 0.8)
    some = simulations.of_some(300, 0.8)
    times = ", ".join(f"{size}: {number(1000 * value)}" for size, value in zip(curve.sizes, curve.seconds, strict=True))
    single = simulations.system(1, "least").capacity
    fronts = [[_NAMES[policy], *map(number, values)] for policy, values in by_fronts.items()]
    (real, real_90), (simulated, simulated_90) = checked.real_ms, checked.simulated_ms
    parts = [
        f"Milliseconds of a batch, by its texts (measured by `bench.cpu`): {times}. So a replica does {number(single)} "
        f"texts/s with full batches of {curve.max_batch}; that is 100 % load. Each request has one text.",
        "**p99 in ms, one front, requests at independent times**",
        load_table(by_load),
        "**The same, requests in bursts of 10 on average**",
        load_table(in_bursts),
        "**p99 in ms, 100 replicas at 80 % load, by the number of fronts: each knows only its own requests**",
        table(["a front chooses", *(f"{count} fronts" if count > 1 else "1 front" for count in _FRONTS)], fronts),
        "**p99 in ms, 300 replicas at 80 % load, one front**",
        table([_NAMES[policy] for policy in some], [[number(value) for value in some.values()]]),
        "**Compared with replicas that run** (two servers over HTTP that sleep for eight times as long, batches of at most "
        f"8, 70 % load): the mean is {number(real)} ms, simulated {number(simulated)}; p90 is {number(real_90)} ms, "
        f"simulated {number(simulated_90)}.",
    ]
    return "\n\n".join(parts), draw(by_load, LOADS, {policy: _NAMES[policy] for policy in POLICIES})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--update", action="store_true", help="write docs/scale.md and docs/scale.svg")
    options = parser.parse_args(arguments)
    simulations = Simulations(read_curve(), 0.1 if options.quick else 1.0)
    note("two replicas that run")
    text, figure = markdown(simulations, check(3 if options.quick else 30))
    print(f"\n{text}")
    if options.update:
        update_page("bench.simulate", text, PAGE)
        FIGURE.write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main()
