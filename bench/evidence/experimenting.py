"""Simulations of experiments: the sample ratio, outcomes and guardrails, evaluated repeatedly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from bench.evidence.registry import Case, Simulation
from gateway.errors import DeadlineExceeded, UpstreamFailed
from gateway.experiments.arms import ArmCounts, RequestRecord
from gateway.experiments.guardrails import guardrails
from gateway.experiments.sample_ratio import ArmCount, check_sample_ratio, largest_log_e, num_tests_of
from gateway.experiments.sequence import ALPHA, Values
from gateway.outcomes.comparing import Comparison, compare
from gateway.outcomes.joining import Branch, Exposures, Numbers, Outcomes, join
from gateway.outcomes.values import Per

_NUM_LOOKS = 20
_SPLITS = {
    "50/50": (0.5, 0.5),
    "90/10": (0.9, 0.1),
    "99/1": (0.99, 0.01),
    "40/30/30": (0.4, 0.3, 0.3),
}


# ----------------------------------------------------------------------------------------------------- sample ratio


def is_flagged(shares: Sequence[float], units: int, lost: float, rng: np.random.Generator) -> bool:
    """Return whether the split is ever called wrong, looked at after every unit.

    Args:
        lost: the share of its units that the last arm loses.
    """
    arms = rng.choice(len(shares), units, p=shares)
    arms = arms[(arms < len(shares) - 1) | (rng.random(units) >= lost)]
    return _is_mismatch(arms, shares, 1)


def ramp_is_flagged(shares: Sequence[float], units: int, returning: bool, rng: np.random.Generator) -> bool:
    """Return whether a correct split is ever called wrong under any of several weights.

    Args:
        shares: the new arm's share under each of the weights.
        units: number of units under all weights together.
        returning: whether the same units come back under all weights, rather than new ones.
    """
    race = rng.random(units)
    parts = np.split(race[: units - units % len(shares)], len(shares))
    return any(
        _is_mismatch((parts[0 if returning else place] < share).astype(int), (1 - share, share), place + 1)
        for place, share in enumerate(shares)
    )


def _is_mismatch(arms: Numbers, shares: Sequence[float], generation: int) -> bool:
    counts = [ArmCount(str(arm), int((arms == arm).sum()), share) for arm, share in enumerate(shares)]
    log_e = largest_log_e([arms == arm for arm in range(len(shares))], np.array(shares))
    return check_sample_ratio(counts, log_e, num_tests=num_tests_of(generation)).mismatch


# --------------------------------------------------------------------------------------------------------- outcomes


def _draw(kind: str, rng: np.random.Generator, num: int) -> tuple[Values, Values]:
    """Return the values and the chances of some units."""
    ones = np.ones(num)
    match kind:
        case "conversions of 10 %":
            return (rng.random(num) < 0.1).astype(np.float64), ones
        case "conversions of 1 %":
            return (rng.random(num) < 0.01).astype(np.float64), ones
        case "purchases":
            return rng.exponential(size=num), ones
        case "heavy users":
            return np.minimum(1_000, np.ceil(rng.pareto(1.5, num))), ones
    of = np.ceil(np.minimum(1_000, rng.pareto(1.5, num) + 0.1))
    return rng.binomial(of.astype(int), rng.beta(2, 5, num)).astype(np.float64), of


def _branches(shares: Sequence[float], generation: str = "g") -> list[Branch]:
    return [Branch(generation, str(arm), f"model-{arm}", None, share) for arm, share in enumerate(shares)]


def _compare(
    arms: list[Branch], unit: Numbers, branch: Numbers, time: Values, values: tuple[Values, Values], per: Per
) -> list[Comparison]:
    """Compare each arm of the first branches with their control."""
    outcomes = Outcomes(unit, *values, time + 1, np.zeros(len(unit), np.bool_))
    joined = join(Exposures(arms, unit, branch, time), outcomes)
    named = [branch for branch in arms if branch.generation == arms[0].generation]
    alpha = ALPHA / (len(named) - 1)
    return [compare(joined, named[0], arm, per, alpha) for arm in named[1:]]


def looks_different(
    kind: str, per: Per, shares: Sequence[float], units: int, effect: float, rng: np.random.Generator
) -> bool:
    """Return whether any look finds any arm different, of 20 looks while units come.

    Args:
        effect: the share by which the values of the second arm are higher; then only "better" counts.
    """
    arm = rng.choice(len(shares), units, p=shares)
    value, of = _draw(kind, rng, units)
    value = value * (1 + effect * (arm == 1))
    unit = np.arange(units)
    for end in np.linspace(units / _NUM_LOOKS, units, _NUM_LOOKS).astype(int):
        seen = slice(0, end)
        found = _compare(_branches(shares), unit[seen], arm[seen], np.zeros(end), (value[seen], of[seen]), per)
        for difference in (one.difference for one in found if one.difference is not None):
            if difference.low > 0 or (difference.high < 0 and not effect):
                return True
    return False


def ramp_looks_different(units: int, effect: float, rng: np.random.Generator) -> bool:
    """Return whether any of 20 looks at a ramp from 90/10 to 50/50 finds the arms different.

    The users have lasting habits. Half of them come with the second weights, in a better week. The others come back then,
    and keep their arm or move into the new one.

    Args:
        effect: how much higher the values of the second arm are; then only "better" counts.
    """
    race, habit = rng.random(units), rng.exponential(size=units)
    is_old = np.arange(units) < units // 2
    unit = np.concatenate([np.arange(units)[is_old], np.arange(units)])
    branch = np.concatenate([(race[is_old] < 0.1).astype(int), 2 + (race < 0.5)])
    time = np.concatenate([np.zeros(int(is_old.sum())), np.full(units, 10.0)])
    value = habit[unit] + 0.3 * rng.exponential(size=len(unit)) + 2 * (time > 0) + effect * (branch % 2)
    arms = [*_branches((0.9, 0.1)), *_branches((0.5, 0.5), "h")]
    for end in np.linspace(len(unit) / _NUM_LOOKS, len(unit), _NUM_LOOKS).astype(int):
        seen = slice(0, end)
        (found,) = _compare(arms, unit[seen], branch[seen], time[seen], (value[seen], np.ones(end)), "unit")
        difference = found.difference
        if difference is not None and (difference.low > 0 or (difference.high < 0 and not effect)):
            return True
    return False


# --------------------------------------------------------------------------------------------------------- guardrails


def guardrail_is_worse(metrics: Sequence[str], units: int, rng: np.random.Generator) -> bool:
    """Return whether one of two equal arms looks slower or worse, though a few users send most requests.

    Args:
        metrics: the metrics of which any counts.
    """
    arms = (ArmCounts(), ArmCounts())
    for unit in range(units):
        num = int(min(500, 1 + rng.pareto(1.3) * 5))
        length, failing = rng.normal(5, 1), min(1.0, 0.05 * rng.exponential())
        log_s = num * (0.8 * length - 4.6 + rng.normal(0, 0.4)) + rng.normal(0, math.sqrt(num))
        arms[int(rng.random() < 0.5)].sums.add(unit, [num, rng.binomial(num, failing), num, log_s, num * length])
    found = guardrails("b", *arms, share=0.5, alpha=ALPHA)
    return any(one.verdict in {"better", "worse"} for one in found if one.metric in metrics)


def hung_looks_slower(
    rates: tuple[float, float], code: str, units: int, is_better_told: bool, rng: np.random.Generator
) -> bool:
    """Return whether an arm looks slower, if some requests of each arm hang until a time limit ends them after 60 s.

    Args:
        rates: the share of the requests that hang, in each arm.
        code: the error that ends them.
        is_better_told: whether an arm that looks faster counts too.
    """
    arms = (ArmCounts(), ArmCounts())
    for unit in range(units):
        arm, is_hung = unit % 2, rng.random() < rates[unit % 2]
        elapsed_s = 60.0 if is_hung else 0.01 * math.exp(0.3 * rng.normal())
        request = RequestRecord(
            "e", "g", "ab"[arm], "unit", True, f"{unit:016x}", "m", None, elapsed_s, num_characters=100,
            error_code=code if is_hung else None, is_server_error=is_hung,
            is_cut=is_hung and code == DeadlineExceeded.code,
        )  # fmt: skip
        arms[arm].record(request, may_grow=True)
    verdict = next(one.verdict for one in guardrails("b", *arms, share=0.5, alpha=ALPHA) if one.metric == "latency")
    return verdict == "worse" or (is_better_told and verdict == "better")


_LIMITS = {"its own": DeadlineExceeded.code, "another server's": UpstreamFailed.code}

_KINDS: tuple[tuple[str, Per], ...] = (
    ("conversions of 10 %", "unit"),
    ("conversions of 1 %", "unit"),
    ("purchases", "unit"),
    ("heavy users", "unit"),
    ("clicks per search", "ratio"),
    ("clicks of a user", "mean"),
)

SIMULATIONS = (
    Simulation(
        "ratio",
        "Sample ratio of a correct split",
        "mismatches at any look",
        "<=",
        0.01,
        [
            Case(name, f"{units:,} units", partial(is_flagged, shares, units, 0.0), runs, quick)
            for name, shares in _SPLITS.items()
            for units, runs, quick in ((1_000, 10_000, 400), (10_000, 10_000, 200), (100_000, 2_000, 50))
        ]
        + [
            Case(name, f"{units:,} units", partial(ramp_is_flagged, shares, units, returning), runs, quick)
            for name, shares, returning in (
                ("5, 10, 25 and 50 %, new units", (0.05, 0.1, 0.25, 0.5), False),
                ("the same, returning units", (0.05, 0.1, 0.25, 0.5), True),
                ("50, 49, … 43 %, returning units", tuple(0.5 - step / 100 for step in range(8)), True),
            )
            for units, runs, quick in ((1_000, 4_000, 400), (10_000, 4_000, 200), (100_000, 2_000, 50))
        ],
        "Evaluated after every unit. A chi-square test at 0.1 %, evaluated every 100 units, flags 2.5 % by 100,000. Under "
        "several weights, a test at 1 % for each of them flags up to 4 %, and a product of their e-values 5 %, if the users "
        "return.",
    ),
    Simulation(
        "lost",
        "Sample ratio of an arm that loses units",
        "found by the last unit",
        ">=",
        0.9,
        [
            Case(f"{lost:.0%} lost, {units:,} units", "50/50", partial(is_flagged, (0.5, 0.5), units, lost), 400, 60)
            for lost, units in ((0.1, 10_000), (0.05, 40_000))
        ],
    ),
    Simulation(
        "outcome",
        "Outcomes of equal arms",
        "better or worse at any look, of any arm",
        "<=",
        ALPHA,
        [
            Case(kind, name, partial(looks_different, kind, per, shares, 4_000, 0.0), 400, 40)
            for kind, per in _KINDS
            for name, shares in _SPLITS.items()
            if name != "99/1"
        ],
        "Evaluated 20 times, up to 4,000 units. By click instead of by unit, a third of such experiments look different.",
    ),
    Simulation(
        "effect",
        "Outcomes of a better arm",
        "called better by the last look",
        ">=",
        0.8,
        [
            Case(
                "purchases, 20 % more", name, partial(looks_different, "purchases", "unit", shares, units, 0.2), 300, 30
            )
            for name, shares, units in (
                ("50/50, 3,000 units", (0.5, 0.5), 3_000),
                ("90/10, 8,000 units", (0.9, 0.1), 8_000),
            )
        ],
    ),
    Simulation(
        "ramp",
        "Outcomes of equal arms over a ramp",
        "better or worse at any look",
        "<=",
        ALPHA,
        [
            Case("90/10, then 50/50", f"{units:,} units", partial(ramp_looks_different, units, 0.0), 400, 30)
            for units in (1_000, 5_000)
        ],
        "Evaluated 20 times. The second week is better for all: added up, the arm that grew would look better.",
    ),
    Simulation(
        "ramped",
        "Outcomes of a better arm over a ramp",
        "called better by the last look",
        ">=",
        0.8,
        [Case("90/10, then 50/50, 20 % more", "5,000 units", partial(ramp_looks_different, 5_000, 0.2), 300, 30)],
    ),
    Simulation(
        "guardrail",
        "Guardrails of equal arms",
        "slower, faster, or other errors",
        "<=",
        ALPHA,
        [
            Case(" or ".join(metrics), f"{units:,} units", partial(guardrail_is_worse, metrics, units), 300, 30)
            for metrics in (("latency",), ("errors",), ("latency", "errors"))
            for units in (300, 1_000)
        ]
        + [
            Case(
                f"latency, 6 % hang: {limit} limit",
                f"{units:,} units",
                partial(hung_looks_slower, (0.06, 0.06), code, units, True),
                300,
                30,
            )
            for units in (300, 1_000)
            for limit, code in _LIMITS.items()
        ],
        "Requests per unit are Pareto: by request, 38 to 57 % of such experiments differ in errors.",
    ),
    Simulation(
        "hung",
        "Guardrail of an arm that hangs in 6 % of its requests",
        "called slower",
        ">=",
        0.8,
        [
            Case(
                f"{limit} time limit",
                "4,000 units",
                partial(hung_looks_slower, (0.0, 0.06), code, 4_000, False),
                100,
                20,
            )
            for limit, code in _LIMITS.items()
        ],
        "A request that fails on the server after more than the median latency counts as at least that time.",
    ),
)
