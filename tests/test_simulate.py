"""The simulation of many replicas, compared with queueing theory and with real replicas."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench import fronts as fronts_module
from bench import simulate as simulate_module
from bench.fronts import bytes_per_vector, count_requests, front_rates, plan_table
from bench.queueing import Policy, System, Times, bursts, poisson, simulate
from bench.simulate import LOADS, Curve, Simulations, check, load_table, read_curve
from bench.simulate_figure import draw


def run(system: System, load: float, count: int = 150_000, seed: int = 3) -> Times:
    """Return the seconds of requests that come at independent times; each takes 1 s on average."""
    rng = np.random.default_rng(seed)
    return simulate(system, poisson(load * system.replicas, count, rng), rng)[count // 4 :]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_replica_with_a_fixed_time_waits_as_in_an_m_d_1_queue(load: float) -> None:
    waited = run(System(1, lambda _size: 1.0), load).mean() - 1

    assert waited == pytest.approx(load / (2 * (1 - load)), rel=0.06)


def erlang_c(servers: int, load: float) -> float:
    """Return the mean wait in an M/M/c queue, in times of a request (Erlang, 1917)."""
    offered = servers * load
    top = offered**servers / math.factorial(servers) / (1 - load)
    waits = top / (sum(offered**k / math.factorial(k) for k in range(servers)) + top)
    return waits / (servers * (1 - load))


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (2, 0.8), (5, 0.8), (20, 0.9)])
def test_replicas_with_one_queue_wait_as_in_an_m_m_c_queue(servers: int, load: float) -> None:
    rng = np.random.default_rng(7)
    system = System(servers, lambda _size: float(rng.exponential(1.0)), policy="one queue")

    seconds = run(system, load, 250_000)

    assert seconds.mean() - 1 == pytest.approx(erlang_c(servers, load), rel=0.1)


@pytest.mark.parametrize(
    ("policy", "replicas", "expected"),
    [
        ("random", 10, 1 / (1 - 0.9)),  # each replica is an M/M/1 queue
        ("two", 200, sum(0.9 ** (2**i - 2) for i in range(1, 30))),  # Mitzenmacher, 2001, for many replicas
    ],
)
def test_many_replicas_without_a_common_queue_take_as_long_as_was_proven(
    policy: Policy, replicas: int, expected: float
) -> None:
    rng = np.random.default_rng(7)
    system = System(replicas, lambda _size: float(rng.exponential(1.0)), policy=policy)

    assert run(system, 0.9, 250_000).mean() == pytest.approx(expected, rel=0.07)


def test_a_replica_takes_what_waits_as_one_batch() -> None:
    system = System(1, [0.0, 1.0, 1.5, 2.0].__getitem__, max_batch=3)

    seconds = simulate(system, np.array([0.0, 0.1, 0.2, 0.3, 0.4]), np.random.default_rng(0))

    # One alone, three together, and the last one alone again.
    assert seconds == pytest.approx([1.0, 2.9, 2.8, 2.7, 3.6])


def test_every_front_knows_its_own_requests_only() -> None:
    """Two fronts with one request each may take the same replica; one front never does."""
    arrivals = np.zeros(2)
    slowest = {}
    for fronts in (1, 2):
        system = System(2, lambda _size: 1.0, fronts=fronts)
        slowest[fronts] = [simulate(system, arrivals, np.random.default_rng(seed)).max() for seed in range(40)]

    assert set(slowest[1]) == {1.0}
    assert set(slowest[2]) == {1.0, 2.0}


def test_the_counts_of_a_front_are_those_of_its_requests() -> None:
    """The fewest requests, as found by comparing all replicas."""
    rng = np.random.default_rng(5)
    system = System(7, lambda size: 0.5 + 0.1 * size, max_batch=4, policy="least")
    found = simulate(system, poisson(30, 5000, rng), np.random.default_rng(1))
    of_all = System(7, system.batch_s, max_batch=4, policy="of 64")
    other = simulate(of_all, poisson(30, 5000, np.random.default_rng(5)), np.random.default_rng(2))

    assert found.mean() == pytest.approx(other.mean(), rel=0.1)


@pytest.mark.parametrize("arrivals", [poisson, bursts])
def test_arrivals_have_their_rate(arrivals: simulate_module.Arrivals) -> None:
    times = arrivals(50.0, 100_000, np.random.default_rng(4))

    assert len(times) == 100_000
    assert np.all(np.diff(times) >= 0)
    assert len(times) / times[-1] == pytest.approx(50, rel=0.05)
    assert (np.mean(np.diff(times) == 0) > 0.8) == (arrivals is bursts)


def test_the_times_of_a_batch_come_from_the_page() -> None:
    curve = read_curve()

    assert curve.sizes[0] == 1
    assert curve.max_batch == 90
    assert list(curve.sizes) == sorted(curve.sizes)
    assert all(0.001 < seconds < 1 for seconds in curve.seconds)
    assert curve.table()[1] == curve.seconds[0]


def test_the_tables_and_the_figure_have_every_series() -> None:
    simulations = Simulations(Curve((1, 4), (0.01, 0.02)), 0.005)

    found = simulations.by_load(poisson, (1, 10))

    assert set(found) == {(1, "least"), (10, "random"), (10, "two"), (10, "least")}
    lines = load_table(found).splitlines()
    assert len(lines) == 2 + 4
    assert all(line.count("|") == 3 + len(LOADS) for line in lines)
    drawn = draw(found, LOADS, {"random": "any", "two": "of two", "least": "fewest"})
    figure = ET.fromstring(drawn)  # noqa: S314  our own
    assert len(figure.findall("{*}polyline")) == 4


async def test_counting_a_request_and_a_vector_have_their_price() -> None:
    cost = await count_requests("memory://", None, 320)
    sizes = await bytes_per_vector()

    assert 0 < cost.alone_ms < 50
    assert 0 < cost.front_ms < 50
    assert cost.storage_ms == 0
    assert sizes["base64"] == pytest.approx(1024 * 4 * 4 / 3, rel=0.05)
    assert sizes["float"] > 2 * sizes["base64"]
    assert 1024 / 8 < sizes["binary"] < 1024


def test_the_plan_counts_with_redis_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fronts on other machines cannot reach its socket, over which it counts more."""

    async def count(uri: str, _storage: object, _requests: int) -> fronts_module.Cost:
        return fronts_module.Cost(alone_ms=1.0, front_ms=1.0, storage_ms=0.1 if uri.startswith("redis://") else 0.05)

    @contextmanager
    def redis() -> Iterator[tuple[int, Path, psutil.Process]]:
        yield 6379, Path("redis.sock"), psutil.Process()

    monkeypatch.setattr(fronts_module, "count_requests", count)
    monkeypatch.setattr(fronts_module, "redis", redis)

    assert fronts_module.quota_table(1)[1] == 10_000


def test_the_number_of_parts_follows_from_their_rate_and_the_planned_load() -> None:
    rows = plan_table({1: 1000.0, 32: 500.0}, 20_000.0, {"float": 10_000.0, "base64": 5000.0}).splitlines()

    # 1,000,000 / (0.7 x 900), / (0.7 x 1,000), / (0.7 x 32 x 500), / (0.7 x 20,000), / (0.7 x 32 x 20,000)
    assert rows[-1] == "| 1,000,000 | 1,588 | 1,429 | 90 | 72 | 3 | 80.0 | 40.0 |"
    assert front_rates()[1] > front_rates()[32] > 100


def test_replicas_that_run_take_as_long_as_simulated() -> None:
    """Over real HTTP, as the gateway sends them. A busy machine adds to the real ones, but not in each of five runs."""
    ratios = []
    for _ in range(5):
        checked = check(seconds=2.5)
        ratios = [real / simulated for real, simulated in zip(checked.real_ms, checked.simulated_ms, strict=True)]
        assert min(ratios) > 0.8
        if max(ratios) < 1.8:
            return
    raise AssertionError(ratios)
