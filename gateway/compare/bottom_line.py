"""The bottom line of a comparison: switch, stay, or what is missing to decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.compare.results import PRIMARY_MEASURE, Advice, Arm, BottomLine, Contrast, Verdict
from gateway.compare.sentences import EASY, fixed
from gateway.compare.statistics import MIN_QUERIES, num_queries


def decide(arms: Sequence[Arm], contrasts: Sequence[Contrast], margin: float) -> BottomLine:
    """Return the recommendation that follows from the verdicts and the costs.

    Args:
        contrasts: of all measures; only those of the primary one decide.
    """
    primary = {one.arm: one for one in contrasts if one.measure == PRIMARY_MEASURE}
    if not primary:
        return BottomLine(
            Advice.NO_JUDGMENTS, None, "Without judgments there is a difference, not a quality, and no recommendation."
        )
    by_name = {arm.name: arm for arm in arms}
    switch = _better(primary) or _cheaper(primary, by_name, margin)
    return switch or _undecided(primary, arms[0]) or _stay(primary, arms[0].name, margin)


def _better(primary: Mapping[str, Contrast]) -> BottomLine | None:
    better = [one for one in primary.values() if one.verdict is Verdict.BETTER]
    if not better:
        return None
    best = max(better, key=lambda one: one.difference.mean)
    others = ", ".join(one.arm for one in better if one is not best)
    also = f" So is {others}; the difference between them was not tested." if others else ""
    return BottomLine(
        Advice.SWITCH, best.arm, f"Switch to {best.arm}: it is better than {best.baseline} on these queries.{also}"
    )


def _cheaper(primary: Mapping[str, Contrast], arms: Mapping[str, Arm], margin: float) -> BottomLine | None:
    """Recommend an arm with smaller vectors that is as good, or not worse."""
    said = {
        Verdict.AS_GOOD: f"it is as good as {{}}, within {margin:g}",
        Verdict.NOT_WORSE: f"it is not worse than {{}} by more than {margin:g}",
    }
    cheaper = [one for one in primary.values() if one.verdict in said and _saves(arms[one.arm], arms[one.baseline])]
    if not cheaper:
        return None
    best = min(cheaper, key=lambda one: arms[one.arm].bytes_per_vector)
    reason = said[Verdict(str(best.verdict))].format(best.baseline)
    return BottomLine(Advice.SWITCH, best.arm, f"Switch to {best.arm}: {reason}, and its vectors are smaller.")


def _saves(arm: Arm, baseline: Arm) -> bool:
    return arm.bytes_per_vector < baseline.bytes_per_vector


def _undecided(primary: Mapping[str, Contrast], baseline: Arm) -> BottomLine | None:
    verdicts = {one.verdict for one in primary.values()}
    name = baseline.name
    if Verdict.TOO_FEW_QUERIES in verdicts:
        number = num_queries(next(iter(primary.values())))
        text = (
            f"Too few queries: at least {MIN_QUERIES} are needed to decide whether to replace {name}, not {number:,}."
        )
        return BottomLine(Advice.TOO_FEW_QUERIES, None, text)
    if Verdict.NOT_JUDGED_ALIKE in verdicts:
        text = f"Judge more documents first: whether to replace {name} depends on those without a judgment."
        return BottomLine(Advice.JUDGE_MORE, None, text)
    if Verdict.TOO_FEW_DIFFER in verdicts:
        level = baseline.quality[PRIMARY_MEASURE].mean
        if level >= EASY:
            text = (
                f"These queries are too easy: {name} has {PRIMARY_MEASURE} {fixed(level)}. Take harder ones, or more."
            )
            return BottomLine(Advice.TOO_EASY, None, text)
        text = f"Too few queries differ to decide whether to replace {name}: take more."
        return BottomLine(Advice.TOO_FEW_DIFFER, None, text)
    return None


def _stay(primary: Mapping[str, Contrast], baseline: str, margin: float) -> BottomLine:
    verdicts = [one.verdict for one in primary.values()]
    if all(verdict is Verdict.WORSE for verdict in verdicts):
        reason = "every other arm is worse" if len(verdicts) > 1 else f"{next(iter(primary))} is worse"
    elif all(verdict in {Verdict.WORSE, Verdict.AS_GOOD} for verdict in verdicts):
        reason = f"nothing is better by more than {margin:g}, or as good with smaller vectors"
    else:
        reason = "nothing is shown to be better"
        found = [one.detectable for one in primary.values() if one.detectable is not None]
        if found:
            reason += f"; a difference of {fixed(max(found))} would probably have been found"
    return BottomLine(Advice.STAY, baseline, f"Stay with {baseline}: {reason}.")
