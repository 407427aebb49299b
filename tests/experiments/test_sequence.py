"""The interval of a difference: its formula by hand, and how often it misses at any of many looks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.experiments.sequence import ALPHA, Difference, difference, margin, units_needed


def test_the_margin_is_that_of_the_paper() -> None:
    """The formula written out, at its narrowest, where it is 1.55 times that of a fixed test."""
    rho = (-2 * math.log(0.05) + math.log(1 - 2 * math.log(0.05))) / 1_000
    n = 1_000
    expected = math.sqrt(2 * (n * rho + 1) / (n**2 * rho) * math.log(math.sqrt(n * rho + 1) / 0.05))

    assert margin(n, 0.05) == pytest.approx(expected)
    assert margin(n, 0.05) / (1.96 / math.sqrt(n)) == pytest.approx(1.55, abs=0.02)


def test_the_estimate_is_weighted_by_the_planned_shares() -> None:
    control, new = np.repeat([0.0, 1.0], 150), np.repeat([1.0, 3.0], 50)
    mean = (150 + 200) / 400

    found = difference(control, new, share=0.25)

    assert found is not None
    zeta = [*((mean - control) / 0.75), *((new - mean) / 0.25)]
    spread = max(np.std(zeta), np.std([*control, *new]) / math.sqrt(0.25 * 0.75))
    assert found.estimate == pytest.approx(np.mean(zeta))
    assert found.estimate == pytest.approx(1.5)  # these arms have their shares
    assert (found.deviation, found.num) == (pytest.approx(spread), 400)
    assert found.high - found.estimate == pytest.approx(spread * margin(400, ALPHA))
    assert found.low + found.high == pytest.approx(2 * found.estimate)


@pytest.mark.parametrize(
    ("control", "new"),
    [
        pytest.param(np.arange(99.0), np.arange(500.0), id="99 units in an arm"),
        pytest.param(np.zeros(500), np.zeros(500), id="all are equal"),
        pytest.param(np.zeros(5_000), np.repeat([1.0, 0.0], [8, 4_992]), id="eight conversions"),
        pytest.param(np.ones(5_000), np.repeat([1e6, 1.0], [1, 4_999]), id="one unit decides"),
        pytest.param(np.empty(0), np.empty(0), id="nothing"),
    ],
)
def test_with_too_few_units_that_differ_there_is_no_verdict(control: np.ndarray, new: np.ndarray) -> None:
    assert difference(control, new, share=0.5) is None


def looks(rng: np.random.Generator, kind: str, shares: tuple[float, ...], num_units: int, effect: float = 0.0) -> bool:
    """Return whether the interval of any arm against the first ever leaves 0 out, looked at every 100 units."""
    arms = rng.choice(len(shares), size=num_units, p=shares)
    if kind == "conversion":
        values = (rng.random(num_units) < 0.1 + effect * (arms == 1)).astype(float)
    elif kind == "rare":
        values = (rng.random(num_units) < 0.01).astype(float)
    elif kind == "heavy":
        values = rng.pareto(1.5, num_units)
    else:
        values = rng.exponential(1 + effect * (arms == 1))
    alpha = ALPHA / (len(shares) - 1)
    for end in range(200, num_units + 1, 100):
        control = values[:end][arms[:end] == 0]
        for new in range(1, len(shares)):
            share = shares[new] / (shares[0] + shares[new])
            found = difference(control, values[:end][arms[:end] == new], share, alpha)
            if found is not None and not found.low <= 0 <= found.high:
                return True
    return False


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.4, 0.3, 0.3)])
@pytest.mark.parametrize("kind", ["conversion", "rare", "heavy", "exponential"])
def test_equal_arms_are_rarely_distinguished_at_any_look(kind: str, shares: tuple[float, ...]) -> None:
    """At most 5 % of experiments, looked at every 100 units up to 3,000."""
    rng = np.random.default_rng(11)

    num_wrong = sum(looks(rng, kind, shares, 3_000) for _ in range(100))

    assert num_wrong <= 7


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(12)

    assert sum(looks(rng, "exponential", (0.5, 0.5), 3_000, effect=0.2) for _ in range(20)) >= 17


@pytest.mark.parametrize("width", [0.5, 0.05, 0.001])
def test_the_predicted_number_of_units_makes_the_interval_that_narrow(width: float) -> None:
    num = units_needed(0.4, width)

    assert 0.4 * margin(num, ALPHA) <= width
    assert 0.4 * margin(int(num * 0.98) - 1, ALPHA) > width


def test_units_for_no_width_at_all_are_bounded() -> None:
    assert units_needed(1.0, 0.0) >= 10**12


def test_a_difference_has_its_verdict() -> None:
    assert Difference(0.1, 0.0, 0.2, 1.0, 400).num == 400
