"""The bottom line of a comparison: switch, stay, or the missing evidence for a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.compare.results import PRIMARY_MEASURE, Advice, Arm, BottomLine, Contrast, CostContrast, Verdict
from gateway.compare.sentences import EASY, TIMES, fixed
from gateway.compare.statistics import MIN_QUERIES, num_queries


def decide(
    arms: Sequence[Arm], contrasts: Sequence[Contrast], costs: Sequence[CostContrast], margin: float
) -> BottomLine:
    """Return the recommendation that follows from the verdicts and the costs.

    Args:
        contrasts: the contrasts of all measures; only those of the primary measure decide.
    """
    primary = {contrast.arm: contrast for contrast in contrasts if contrast.measure == PRIMARY_MEASURE}
    if not primary:
        return BottomLine(
            Advice.NO_JUDGMENTS, None, "Without judgments there is a difference, not a quality, and no recommendation."
        )
    compared = {cost.arm: cost for cost in costs}
    prices = {arm.name: _price(arm, arms[0], compared.get(arm.name)) for arm in arms[1:]}
    switch = _better(primary, prices) or _cheaper(primary, prices, margin)
    return switch or _undecided(primary, arms[0]) or _stay(primary, arms[0].name, margin)


def _better(primary: Mapping[str, Contrast], prices: Mapping[str, _Price]) -> BottomLine | None:
    better = [contrast for contrast in primary.values() if contrast.verdict is Verdict.BETTER]
    if not better:
        return None
    best = max(better, key=lambda contrast: contrast.difference.mean)
    others = ", ".join(contrast.arm for contrast in better if contrast is not best)
    text = f"Switch to {best.arm}: it is better than {best.baseline} on these queries."
    if others:
        text += f" So is {others}; the difference between them was not tested."
    if prices[best.arm].more:
        text += f" The price: {' and '.join(prices[best.arm].more)}."
    return BottomLine(Advice.SWITCH, best.arm, text)


def _cheaper(primary: Mapping[str, Contrast], prices: Mapping[str, _Price], margin: float) -> BottomLine | None:
    """Recommend the cheapest arm that is as good, or not worse: first by the size of its vectors, then by its speed."""
    reasons = {
        Verdict.AS_GOOD: f"it is as good as {{}}, within {margin:g}",
        Verdict.NOT_WORSE: f"it is not worse than {{}} by more than {margin:g}",
    }
    cheaper = [
        contrast
        for contrast in primary.values()
        if contrast.verdict in reasons and prices[contrast.arm].less and not prices[contrast.arm].more
    ]
    if not cheaper:
        return None
    best = min(cheaper, key=lambda contrast: (prices[contrast.arm].size, prices[contrast.arm].time))
    reason = reasons[Verdict(str(best.verdict))].format(best.baseline)
    less = " and ".join(prices[best.arm].less)
    return BottomLine(Advice.SWITCH, best.arm, f"Switch to {best.arm}: {reason}, with {less}.")


@dataclass(frozen=True, slots=True)
class _Price:
    """The costs of an arm that differ from the baseline's, in words.

    Attributes:
        size: ratio of the bytes per document.
        time: ratio of the times of one query; 1 if no difference was found.
    """

    less: Sequence[str]
    more: Sequence[str]
    size: float
    time: float


def _price(arm: Arm, baseline: Arm, cost: CostContrast | None) -> _Price:
    size = arm.bytes_per_document / baseline.bytes_per_document
    time = cost.query_time if cost else None
    rate = cost.texts_per_s if cost else None
    ratios = [
        (size, "the bytes per document", 1.0),
        (time.ratio if time and time.is_shown else 1.0, "the time per query", 1.0),
        # Lower throughput is a higher price.
        (rate.ratio if rate and rate.is_shown else 1.0, "the throughput", -1.0),
    ]
    changes = [(ratio**sign, f"{TIMES} {fixed(ratio, 2)} {label}") for ratio, label, sign in ratios]
    return _Price(
        less=[text for value, text in changes if value < 1],
        more=[text for value, text in changes if value > 1],
        size=size,
        time=ratios[1][0],
    )


def _undecided(primary: Mapping[str, Contrast], baseline: Arm) -> BottomLine | None:
    verdicts = {contrast.verdict for contrast in primary.values()}
    name = baseline.name
    if Verdict.TOO_FEW_QUERIES in verdicts:
        number = num_queries(next(iter(primary.values())))
        text = (
            f"Too few queries: at least {MIN_QUERIES} are needed to decide whether to replace {name}, not {number:,}."
        )
        return BottomLine(Advice.TOO_FEW_QUERIES, None, text)
    if Verdict.NOT_JUDGED_ALIKE in verdicts:
        text = f"Judge more documents first: the decision to replace {name} depends on documents without a judgment."
        return BottomLine(Advice.JUDGE_MORE, None, text)
    if Verdict.TOO_FEW_DIFFER in verdicts:
        level = baseline.quality[PRIMARY_MEASURE].mean
        if level >= EASY:
            text = (
                f"These queries are too easy: {name} has {PRIMARY_MEASURE} {fixed(level)}. Use harder queries, or more."
            )
            return BottomLine(Advice.TOO_EASY, None, text)
        text = f"Too few queries differ to decide whether to replace {name}: use more queries."
        return BottomLine(Advice.TOO_FEW_DIFFER, None, text)
    return None


def _stay(primary: Mapping[str, Contrast], baseline: str, margin: float) -> BottomLine:
    verdicts = [contrast.verdict for contrast in primary.values()]
    if all(verdict is Verdict.WORSE for verdict in verdicts):
        reason = "every other arm is worse" if len(verdicts) > 1 else f"{next(iter(primary))} is worse"
    elif all(verdict in {Verdict.WORSE, Verdict.AS_GOOD} for verdict in verdicts):
        reason = f"nothing is better by more than {margin:g}, or as good and cheaper"
    else:
        reason = "nothing is shown to be better"
        found = [contrast.detectable for contrast in primary.values() if contrast.detectable is not None]
        if found:
            reason += f"; a difference of {fixed(max(found))} would probably have been found"
    return BottomLine(Advice.STAY, baseline, f"Stay with {baseline}: {reason}.")
