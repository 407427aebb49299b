"""Arms compared by outcomes: compared with results by hand, and the rate of false differences over many looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from gateway.config.registry import Experiment
from gateway.experiments import sequence
from gateway.experiments.sequence import ALPHA
from gateway.experiments.split import Split
from gateway.outcomes.comparing import Comparison, compare, describe
from gateway.outcomes.joining import Branch, Changes, Exposures, Outcomes, join, signed
from gateway.outcomes.values import Per
from gateway.outcomes.verdicts import report_outcomes

A, B, C = (Branch("", name, f"model-{name}", None, 0.0) for name in "abc")


def branches(*shares: float, generation: str = "g") -> list[Branch]:
    return [Branch(generation, n, f"model-{n}", None, share) for n, share in zip("abc", shares, strict=False)]


def exposed(arms: Sequence[Branch], branch: Sequence[int], unit: Sequence[int], time: Sequence[float]) -> Exposures:
    return Exposures(arms, np.array(unit, np.int64), np.array(branch, np.int64), np.array(time, np.float64))


def posted(*rows: tuple[int, float, float, float, bool]) -> Outcomes:
    """Return outcomes from (unit, value, of, time, is_before)."""
    unit, value, of, time, is_before = zip(*rows, strict=True) if rows else [()] * 5
    return Outcomes(
        np.array(unit, np.int64),
        np.array(value, np.float64),
        np.array(of, np.float64),
        np.array(time, np.float64),
        np.array(is_before, np.bool_),
    )


# ---------------------------------------------------------------------------------------------------------- the join


def test_an_outcome_belongs_to_the_last_exposure_of_its_unit_until_then() -> None:
    """Unit 7 was in the control from 10 on, and in the new arm of the next generation from 20 on."""
    arms = [*branches(0.9, 0.1), *branches(0.5, 0.5, generation="h")]
    exposures = exposed(arms, [0, 1, 3, 2], [7, 8, 7, 8], [10, 11, 20, 21])
    rows = [(7, 1, 9.9), (7, 2, 10), (7, 4, 19.9), (7, 8, 20), (7, 16, math.inf), (8, 32, 15), (9, 64, 50)]

    joined = join(exposures, posted(*((unit, value, 1.0, time, False) for unit, value, time in rows)))

    assert joined.value.tolist() == [6, 32, 24, 0]
    assert joined.of.tolist() == [2, 1, 2, 0]
    assert joined.num_unmatched == 2
    assert np.isnan(joined.before).all()


def test_weights_that_come_back_bring_the_units_back_into_their_earlier_arms() -> None:
    """A ramp is taken back: unit 7 moves to the new arm and back, which records no second exposure to the control.

    Unit 8 stays in the control all the time, and unit 9 is the first that arrives after the weights have come back.
    """
    arms = [*branches(0.9, 0.1), *branches(0.5, 0.5, generation="h")]
    exposures = exposed(arms, [0, 0, 3, 2, 0], [7, 8, 7, 8, 9], [10, 11, 20, 21, 30])
    times = (12, 22, 31, math.inf)
    rows = [
        (unit, factor * 2**number, time) for unit, factor in ((7, 1), (8, 100)) for number, time in enumerate(times)
    ]

    joined = join(exposures, posted(*((unit, value, 1.0, time, False) for unit, value, time in rows)))

    assert joined.value.tolist() == [13, 1_300, 2, 200, 0]
    assert joined.num_unmatched == 0


def test_weights_that_are_known_to_have_come_back_count_at_once() -> None:
    """The same ramp, but no new unit arrives after it was taken back."""
    arms = [*branches(0.9, 0.1), *branches(0.5, 0.5, generation="h")]
    exposures = exposed(arms, [0, 0, 3, 2], [7, 8, 7, 8], [10, 11, 20, 21])
    changes = Changes(np.array([9.0, 19.0, 25.0, 40.0]), ["g", "h", "g", "another salt"])
    rows = [(7, 1.0, 22), (7, 2.0, 24.9), (7, 4.0, 26), (8, 8.0, 26), (7, 16.0, 41)]

    joined = join(replace(exposures, changes=changes), posted(*((unit, v, 1.0, time, False) for unit, v, time in rows)))

    assert joined.value.tolist() == [4, 8, 3 + 16, 0]


def test_a_value_from_before_belongs_to_the_unit_at_any_time_of_the_post() -> None:
    exposures = exposed(branches(0.5, 0.5), [0, 1, 1], [7, 8, 9], [10, 10, 10])

    joined = join(exposures, posted((7, 3, 4, 5, True), (7, 1, 4, 50, True), (9, 2, 1, 5, True), (9, 5, 1, 50, False)))

    assert joined.before.tolist()[::2] == [4, 2]
    assert joined.before_of.tolist()[::2] == [8, 1]
    assert np.isnan(joined.before[1])
    assert joined.value.tolist() == [0, 0, 5]


def test_nothing_can_be_joined_with_nothing() -> None:
    joined = join(exposed([], [], [], []), posted())

    assert len(joined.value) == 0
    assert compare(joined, A, B, "unit", ALPHA) == Comparison(None, 0, 0, uses_before=False, mismatch=None)
    assert describe(joined, A, "unit", ALPHA).mean is None


@pytest.mark.parametrize(
    ("unit", "number"), [("0" * 16, 0), ("f" * 16, -1), ("8" + "0" * 15, -(2**63)), ("7" + "f" * 15, 2**63 - 1)]
)
def test_a_hash_is_a_signed_number(unit: str, number: int) -> None:
    assert signed(unit) == number


# ------------------------------------------------------------------------------------------------------ the estimands


def small(per: Per, **_: object) -> tuple[float | None, float | None]:
    """Return the means of two arms of four units: some without outcomes, some with many chances."""
    exposures = exposed(branches(0.5, 0.5), [0, 0, 0, 0, 1, 1, 1, 1], range(8), [0.0] * 8)
    rows = [(0, 1, 2), (0, 1, 2), (1, 3, 3), (4, 2, 2), (5, 0, 4), (6, 1, 1)]
    joined = join(exposures, posted(*((unit, value, of, 1.0, False) for unit, value, of in rows)))
    return describe(joined, A, per, ALPHA).mean, describe(joined, B, per, ALPHA).mean


def test_per_unit_counts_units_without_outcomes_as_zero() -> None:
    assert small("unit") == (5 / 4, 3 / 4)


def test_a_mean_of_units_leaves_out_those_without_outcomes() -> None:
    assert small("mean") == (pytest.approx((2 / 4 + 1) / 2), pytest.approx((1 + 0 + 1) / 3))


def test_a_ratio_is_that_of_the_sums() -> None:
    assert small("ratio") == (pytest.approx(5 / 7), pytest.approx(3 / 7))


def test_one_unit_with_most_of_the_chances_does_not_decide_a_ratio() -> None:
    rng = np.random.default_rng(1)
    num = 1_000
    exposures = exposed(branches(0.5, 0.5), [i % 2 for i in range(num)], range(num), [0.0] * num)
    of = rng.integers(1, 10, num).astype(float)
    of[1] = 100_000
    rows = ((i, of[i] * (0.9 if i == 1 else 0.1), of[i], 1.0, False) for i in range(num))

    mean = describe(join(exposures, posted(*rows)), B, "ratio", ALPHA).mean

    assert mean == pytest.approx(0.1, abs=0.01)


# ------------------------------------------------------------------------------------------------- error rates by look


def looked(
    rng: np.random.Generator,
    shares: Sequence[float],
    values: np.ndarray,
    *,
    per: Per = "unit",
    of: np.ndarray | None = None,
    effect: float = 0.0,
) -> str | None:
    """Return the verdict of the first look that has one, of ten looks while units come."""
    num = len(values)
    arm = rng.choice(len(shares), num, p=shares)
    arms = branches(*shares)
    counted = np.ones(num) if of is None else of
    value = values * (1 + effect * (arm == 1)) * counted
    for end in np.linspace(num / 10, num, 10).astype(int):
        unit = np.arange(end)
        exposures = Exposures(arms, unit, arm[:end], np.zeros(end))
        outcomes = Outcomes(unit, value[:end], counted[:end], np.ones(end), np.zeros(end, np.bool_))
        joined = join(exposures, outcomes)
        for branch in (B, C)[: len(shares) - 1]:
            found = compare(joined, A, branch, per, ALPHA / (len(shares) - 1))
            if found.difference is not None and found.difference.low > 0:
                return "better"
            if found.difference is not None and found.difference.high < 0:
                return "worse"
    return None


KINDS = {
    "conversion": lambda rng, n: (rng.random(n) < 0.1).astype(float),
    "heavy users": lambda rng, n: np.minimum(500, rng.pareto(1.5, n)),
    "ratings": lambda rng, n: rng.normal(3, 1, n),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.5, 0.3, 0.2)])
def test_equal_arms_are_rarely_distinguished(shares: tuple[float, ...], kind: str) -> None:
    rng = np.random.default_rng(31)

    wrong = [looked(rng, shares, KINDS[kind](rng, 2_000)) for _ in range(50)]

    assert sum(verdict is not None for verdict in wrong) <= 4


@pytest.mark.parametrize("per", ["mean", "ratio"])
def test_nor_by_ratios_though_some_units_have_most_chances(per: Per) -> None:
    """Randomized by chance instead of by unit, 36 to 52 % of such experiments find a difference."""
    rng = np.random.default_rng(32)
    wrong = []
    for _ in range(60):
        of = np.ceil(np.minimum(1_000, rng.pareto(1.5, 2_000) + 0.1))
        rate = rng.beta(2, 5, 2_000)
        wrong.append(looked(rng, (0.5, 0.5), rng.binomial(of.astype(int), rate) / of, per=per, of=of))

    assert sum(verdict is not None for verdict in wrong) <= 4


def test_an_effect_is_found_and_its_direction_is_right() -> None:
    rng = np.random.default_rng(33)

    assert [looked(rng, (0.5, 0.5), rng.exponential(size=4_000), effect=0.2) for _ in range(10)].count("better") >= 9
    assert [looked(rng, (0.9, 0.1), rng.exponential(size=6_000), effect=-0.4) for _ in range(10)].count("worse") >= 9


def ramped(rng: np.random.Generator, num: int, effect: float = 0.0) -> tuple[Comparison, float]:
    """Return the comparison over two generations, 90/10 and 50/50, of the same units in better weeks, and a naive one.

    Every unit has a habit that lasts. Half of the units have been there from the beginning; outcomes of the second
    generation are higher in both arms.
    """
    race = rng.random(num)
    first, second = race < 0.1, race < 0.5  # as ramping does it: units only move into the arm
    old = np.arange(num) < num // 2
    habit = rng.exponential(size=num)
    arms = [*branches(0.9, 0.1), *branches(0.5, 0.5, generation="h")]
    unit = np.concatenate([np.arange(num)[old], np.arange(num)])
    branch = np.concatenate([first[old].astype(int), 2 + second.astype(int)])
    time = np.concatenate([np.zeros(old.sum()), np.full(num, 10.0)])
    is_new = np.concatenate([first[old], second])
    value = (habit[unit] + rng.exponential(size=len(unit)) * 0.3 + (time > 0) * 2) * (1 + effect * is_new)
    outcomes = Outcomes(unit, value, np.ones(len(unit)), time + 1, np.zeros(len(unit), np.bool_))
    joined = join(Exposures(arms, unit, branch, time), outcomes)
    return compare(joined, A, B, "unit", ALPHA), float(value[is_new].mean() - value[~is_new].mean())


def test_generations_are_compared_within_themselves_and_units_in_both_count_once() -> None:
    rng = np.random.default_rng(34)
    wrong, naive = [], []
    for _ in range(60):
        found, difference = ramped(rng, 5_000)
        assert found.difference is not None
        assert found.num_generations == 2
        wrong.append(not found.difference.low <= 0 <= found.difference.high)
        naive.append(difference)

    assert sum(wrong) <= 3
    assert np.mean(naive) > 0.5  # adding up the units compares the weeks


def test_the_interval_over_generations_covers_an_effect() -> None:
    rng = np.random.default_rng(35)
    found, _ = ramped(rng, 4_000, effect=0.3)

    assert found.difference is not None
    assert found.difference.low > 0


def test_generations_of_another_model_are_left_out() -> None:
    num = 400
    arms = [*branches(0.5, 0.5), Branch("old", "a", "model-a", None, 0.5), Branch("old", "b", "another", None, 0.5)]
    exposures = exposed(arms, [i % 4 for i in range(num)], range(num), [0.0] * num)
    rows = ((i, 5.0 if i % 4 == 3 else float(i % 3), 1.0, 1.0, False) for i in range(num))
    joined = join(exposures, posted(*rows))

    found = compare(joined, A, B, "unit", ALPHA)

    assert (found.num_generations, found.units) == (1, 200)


def test_values_from_before_narrow_the_interval() -> None:
    rng = np.random.default_rng(36)
    num = 2_000
    arm = rng.integers(0, 2, num)
    habit = rng.exponential(2, num)
    value = habit + rng.normal(0, 0.3, num) + 0.1 * arm
    unit = np.arange(num)
    after = (unit, value, np.ones(num), np.ones(num), np.zeros(num, np.bool_))
    before = (unit[: num // 2], habit[: num // 2], np.ones(num // 2), np.zeros(num // 2), np.ones(num // 2, np.bool_))
    exposures = Exposures(branches(0.5, 0.5), unit, arm, np.full(num, 0.5))

    plain = compare(join(exposures, Outcomes(*after)), A, B, "unit", ALPHA)
    both = Outcomes(*(np.concatenate(columns) for columns in zip(after, before, strict=True)))
    adjusted = compare(join(exposures, both), A, B, "unit", ALPHA)

    assert plain.difference is not None
    assert adjusted.difference is not None
    assert (plain.uses_before, adjusted.uses_before) == (False, True)
    assert adjusted.difference.deviation < 0.8 * plain.difference.deviation
    assert adjusted.difference.low <= 0.1 <= adjusted.difference.high


def test_an_arm_that_was_removed_still_counts_among_the_arms_that_are_compared() -> None:
    """If the worst of two new arms is removed, and the other is tested as if it had been alone, more than 5 % err."""
    arms = ({"name": "a", "model": "model-a", "weight": 1}, {"name": "b", "model": "model-b", "weight": 1})
    experiment = Experiment.model_validate(
        {"id": "exp", "kind": "cross_space", "unit": ("body:user",), "outcome": {"name": "kept"}, "arms": arms}
    )
    generation, num = Split(experiment).generation, 600
    both = branches(0.5, 0.5, generation=generation)
    all_three = branches(0.4, 0.3, 0.3, generation=f"{generation[:-1]}x")

    def margin(arms: list[Branch], branch: list[int]) -> float:
        exposures = exposed(arms, branch, range(num), [0.0] * num)
        kept = posted(*((i, float(i % 3), 1.0, 1.0, False) for i in range(num)))
        [one] = report_outcomes(experiment, exposures, {"kept": kept}, 10.0).report.outcomes[0].comparisons
        assert one.low is not None
        assert one.high is not None
        return one.high - one.low

    alone = margin(both, [i % 2 for i in range(num)])
    of_two = margin([*both, *all_three], [i % 2 for i in range(num - 1)] + [4])

    assert of_two / alone == pytest.approx(sequence.margin(num, ALPHA / 2) / sequence.margin(num, ALPHA), rel=0.01)


def test_a_mismatch_in_any_generation_is_found() -> None:
    arms = [*branches(0.5, 0.5), *branches(0.6, 0.4, generation="h")]
    num = 2_000
    branch = [i % 2 for i in range(num)] + [2 + i % 2 for i in range(num)]  # the second is not 60/40
    exposures = exposed(arms, branch, range(2 * num), [1.0] * num + [2.0] * num)
    joined = join(exposures, posted(*((i, float(i % 5), 1.0, 3.0, False) for i in range(2 * num))))

    mismatch = compare(joined, A, B, "unit", ALPHA).mismatch

    assert mismatch is not None
    assert mismatch.arm == "a"
    assert mismatch.verdict.endswith("; under the shares a 0.6, b 0.4 (generation h)")


def test_a_later_generation_is_tested_more_strictly() -> None:
    """A ramp has many generations, and each of them may look wrong by chance."""
    num = 2_000
    arms = [*branches(0.5, 0.5), *branches(0.52, 0.48, generation="h")]
    off = [int(i * 0.618034 % 1 < 0.549) for i in range(num)]
    sound = [2 + int(i * 0.618034 % 1 < 0.48) for i in range(num)]

    def mismatch(time_off: float, time_sound: float) -> bool:
        times = [time_off] * num + [time_sound] * num
        exposures = exposed(arms, [*off, *sound], range(2 * num), times)
        return compare(join(exposures, posted()), A, B, "unit", ALPHA).mismatch is not None

    assert mismatch(1.0, 2.0)
    assert not mismatch(2.0, 1.0)


@pytest.mark.parametrize("per", ["unit", "mean", "ratio"])
def test_a_mismatch_is_found_though_an_arm_has_lost_nearly_all_units(per: Per) -> None:
    """Such an arm has too few units to be compared, and the report would only ask for more of them."""
    num = 3_000
    branch = [int(i % 50 == 0) for i in range(num)]
    exposures = exposed(branches(0.5, 0.5), branch, range(num), [0.0] * num)
    joined = join(exposures, posted(*((i, float(i % 5), 1.0, 1.0, False) for i in range(num))))

    found = compare(joined, A, B, per, ALPHA)

    assert found.difference is None
    assert found.mismatch is not None


@pytest.mark.parametrize("value", [5e-324, 1e-200, 1e-160, 0.1, 1e12])
@pytest.mark.parametrize("per", ["unit", "mean", "ratio"])
def test_equal_values_of_any_size_tell_nothing_and_do_not_fail(per: Per, value: float) -> None:
    num = 600
    exposures = exposed(branches(0.5, 0.5), [i % 2 for i in range(num)], range(num), [10.0] * num)
    joined = join(exposures, posted(*((unit, value, 1.0, 20.0, False) for unit in range(num))))

    found = compare(joined, A, B, per, ALPHA)

    # The rounding error of equal values does not count as a difference either.
    assert found.difference is None or found.difference.low <= 0 <= found.difference.high
