"""Guardrails by unit: heavy users and long texts do not decide them, and a slow or failing arm is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.experiments.arms import REQUESTS, SERVER_ERRORS, ArmCounts, Generation, RequestRecord
from gateway.experiments.guardrails import guardrails
from gateway.experiments.report import Guardrail
from gateway.experiments.sequence import difference


def make_arms(
    rng: np.random.Generator, num_units: int, slower: float = 1.0, error_rates: tuple[float, float] = (0.05, 0.05)
) -> tuple[ArmCounts, ArmCounts]:
    """Return two arms: units of unequal speed, with texts of unequal length, and a few with most of the requests."""
    arms = (ArmCounts(), ArmCounts())
    for unit in range(num_units):
        arm = int(rng.random() < 0.5)
        num = int(min(500, 1 + rng.pareto(1.3) * 5))
        length = rng.normal(5, 1)  # log characters, of the unit
        failing = min(1.0, error_rates[arm] * rng.exponential())
        log_s = num * (math.log(0.01 * slower**arm) + 0.8 * length + rng.normal(0, 0.4)) + rng.normal(0, num**0.5)
        arms[arm].sums.add(unit, [num, rng.binomial(num, failing), num, log_s, num * length])
    return arms


def found(arms: tuple[ArmCounts, ArmCounts]) -> dict[str, Guardrail]:
    return {guardrail.metric: guardrail for guardrail in guardrails("b", *arms, share=0.5, alpha=0.05)}


def test_equal_arms_are_rarely_distinguished_if_some_units_send_most_requests() -> None:
    """By request, 38 to 57 % of such experiments have a difference in errors."""
    rng = np.random.default_rng(21)
    num_found = 0
    for _ in range(100):
        guardrails_now = found(make_arms(rng, 400)).values()
        num_found += any(guardrail.verdict in ("better", "worse") for guardrail in guardrails_now)

    assert num_found <= 5


def test_latency_and_errors_share_the_probability_of_a_miss() -> None:
    arms = make_arms(np.random.default_rng(24), 2_000)
    old, new = (arm.sums.columns() for arm in arms)

    expected = difference(old[SERVER_ERRORS] / old[REQUESTS], new[SERVER_ERRORS] / new[REQUESTS], 0.5, 0.05 / 2)

    assert expected is not None
    assert found(arms)["errors"].low == pytest.approx(expected.low)


def test_a_slower_arm_is_found_and_how_much_slower_it_is() -> None:
    latency = found(make_arms(np.random.default_rng(22), 2_000, slower=1.3))["latency"]

    assert latency.verdict == "worse"
    assert latency.low is not None
    assert latency.high is not None
    assert 1.0 < latency.low < 1.3 < latency.high
    assert latency.high / latency.low < 1.35
    assert latency.units == 2_000


def test_an_arm_that_fails_more_is_found() -> None:
    guardrail = found(make_arms(np.random.default_rng(23), 2_000, error_rates=(0.02, 0.1)))["errors"]

    assert guardrail.verdict == "worse"
    assert guardrail.estimate == pytest.approx(0.08, abs=0.02)
    assert found(make_arms(np.random.default_rng(24), 2_000, error_rates=(0.1, 0.02)))["errors"].verdict == "better"


@pytest.mark.parametrize(("code", "is_cut"), [("deadline_exceeded", True), ("upstream_failed", False)])
def test_an_arm_whose_server_hangs_is_slower(code: str, is_cut: bool) -> None:
    """Whichever limit ends the requests: without them, only the lucky units would be compared."""
    rng = np.random.default_rng(26)
    arms = (ArmCounts(), ArmCounts())
    for unit in range(4_000):
        is_hung = unit % 2 == 1 and rng.random() < 0.06
        elapsed_s = 60.0 if is_hung else 0.01 * math.exp(0.3 * rng.normal())
        failed = {"error_code": code, "is_server_error": True, "is_cut": is_cut} if is_hung else {}
        request = RequestRecord(
            "exp", "g", "ab"[unit % 2], "unit", True, f"{unit:016x}", "m", None, elapsed_s, **failed
        )
        arms[unit % 2].record(request, may_grow=True)

    assert found(arms)["latency"].verdict == "worse"
    assert arms[1].latency.quantile(0.95) == pytest.approx(60.0, rel=0.02)


def test_texts_of_other_lengths_make_no_difference() -> None:
    """The seconds of one arm are three times those of the other, and so is the work."""
    rng = np.random.default_rng(25)
    arms = (ArmCounts(), ArmCounts())
    for unit in range(400):
        length = rng.normal(5, 1) + (unit % 2) * math.log(3)
        arms[unit % 2].sums.add(unit, [1, 0, 1, length + rng.normal(0, 0.2), length])

    assert found(arms)["latency"].verdict == "no difference found"


def test_a_request_without_a_unit_counts_as_one() -> None:
    generation = Generation("now")
    for number in range(300):
        generation.record(
            RequestRecord(
                "exp", "g", "ab"[number % 2], "random", True, None, "m", None, elapsed_s=0.1 + number / 1_000, share=0.5,
                num_characters=100,
            )
        )  # fmt: skip

    latency = found((generation.arms["a"], generation.arms["b"]))["latency"]

    assert (latency.units, latency.verdict) == (300, "no difference found")
    assert generation.request_ratio.total == 300


def test_units_with_sums_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a client's invented ids; units that already have sums still add to them."""
    monkeypatch.setattr("gateway.experiments.arms.MAX_SUMS", 10)
    generation = Generation("now")
    for number in [*range(20), 0]:
        unit = f"{number:016x}"
        generation.record(RequestRecord("exp", "g", "ab"[number % 2], "unit", True, unit, "m", "s", elapsed_s=0.1))

    assert sum(len(arm.sums) for arm in generation.arms.values()) == 10
    assert generation.arms["a"].sums.columns()[0].sum() == 6
    assert generation.arms["a"].requests == 11
