"""From grades to verdicts: each arm against the baseline in nDCG@10, by the judge and, if they checked it, by people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.compare.judge.inference import Tested, corrected_difference, mean_of
from gateway.compare.judge.pool import first_documents, unit_of
from gateway.compare.judge.values import Figure, Grades, JudgeContrast, JudgeVerdict, PeopleCheck
from gateway.compare.likelihood import TIE
from gateway.compare.quality import measure
from gateway.compare.results import PRIMARY_MEASURE
from gateway.compare.search import Ranking
from gateway.compare.statistics import ALPHA, MIN_QUERIES, MIN_UNTIED, holm
from gateway.comparisons.scale import MIN_KAPPA

MAX_UNJUDGED_SHARE = 0.02
"""Above this share of ungraded pairs, there is no verdict."""

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The grades behind the verdicts.

    Attributes:
        rankings: the rankings of every arm, baseline first.
        judged: the judge's grades.
        people: people's grades of the queries that they checked; empty without a check.
        check: the judge's agreement with people; ``None`` without a check.
        unjudged_share: the share of the pairs that the judge did not grade.
        groups: the group of each query that depends on others; a group counts as one query.
        num_drawn: number of queries that were drawn for people; a verdict needs their grades for all of them.
    """

    rankings: Mapping[str, Ranking]
    judged: Grades
    people: Grades
    check: PeopleCheck | None
    unjudged_share: float
    groups: Mapping[str, str] = field(default_factory=dict)
    num_drawn: int = 0


def quality(rankings: Mapping[str, Ranking], grades: Grades) -> dict[str, Values]:
    """Return nDCG@10 of each query by arm, in the order of the grades.

    A query without a document above grade 0 counts as 0 for every arm.
    """
    values = {}
    for arm, ranking in rankings.items():
        measured = measure(first_documents(ranking, grades), grades)
        values[arm] = measured.get(PRIMARY_MEASURE, {})
    return values


def levels(evidence: Evidence) -> dict[str, Figure]:
    """Return the mean nDCG@10 of each arm by the judge's grades."""
    values = quality(evidence.rankings, evidence.judged)
    return {
        arm: mean_of(list(_by_unit(arm_values, evidence.groups).values())).figure
        for arm, arm_values in values.items()
        if arm_values
    }


def conclude(evidence: Evidence) -> list[JudgeContrast]:
    """Compare each arm with the baseline."""
    judged = quality(evidence.rankings, evidence.judged)
    people = quality(evidence.rankings, evidence.people)
    baseline, *arms = evidence.rankings
    if not judged[baseline]:
        return []
    every_query = [_differences(arm, baseline, judged) for arm in arms]
    by_judge = [_by_unit(values, evidence.groups) for values in every_query]
    by_people = [_by_unit(_differences(arm, baseline, people), evidence.groups) for arm in arms]
    # For a group that people checked, only the judge's grades of the checked queries count.
    same = [
        _by_unit({query: differences[query] for query in evidence.people if query in differences}, evidence.groups)
        for differences in every_query
    ]
    simple = [mean_of(list(values.values())) for values in by_judge]
    corrected = [_corrected(theirs, all_ | ours) for theirs, all_, ours in zip(by_people, by_judge, same, strict=True)]
    simple_ps, corrected_ps = holm([tested.p for tested in simple]), _with_holm(corrected)
    contrasts = []
    for place, arm in enumerate(arms):
        both, checked = corrected[place], list(by_people[place].values())
        contrast = JudgeContrast(
            arm=arm,
            baseline=baseline,
            judged=simple[place].figure,
            judged_p=simple_ps[place],
            people=mean_of(checked).figure if checked else None,
            corrected=None if both is None else both.figure,
            corrected_p=corrected_ps[place],
            weight=None if both is None else both.weight,
            num_untied=_num_untied(by_people[place] if evidence.check else by_judge[place]),
            verdict=JudgeVerdict.INCONCLUSIVE,
        )
        contrasts.append(replace(contrast, verdict=_verdict(evidence, contrast)))
    return contrasts


def _differences(arm: str, baseline: str, values: Mapping[str, Values]) -> dict[str, float]:
    return {query: values[arm][query] - value for query, value in values[baseline].items()}


def _by_unit(values: Values, groups: Mapping[str, str]) -> dict[str, float]:
    """Return the mean value of each group; a query without a group is a group by itself."""
    found: dict[str, list[float]] = {}
    for query, value in values.items():
        found.setdefault(unit_of(query, groups), []).append(value)
    return {unit: sum(several) / len(several) for unit, several in found.items()}


def _num_untied(differences: Values) -> int:
    return sum(abs(value) > TIE for value in differences.values())


def _corrected(people: Values, judged: Values) -> Tested | None:
    known = {unit: value for unit, value in people.items() if unit in judged}
    return corrected_difference(known, judged) if len(known) >= 3 else None


def _with_holm(corrected: Sequence[Tested | None]) -> list[float | None]:
    ps = iter(holm([tested.p for tested in corrected if tested is not None]))
    return [None if tested is None else next(ps) for tested in corrected]


def _verdict(evidence: Evidence, found: JudgeContrast) -> JudgeVerdict:
    if evidence.unjudged_share > MAX_UNJUDGED_SHARE:
        return JudgeVerdict.TOO_MANY_UNJUDGED
    if len({unit_of(query, evidence.groups) for query in evidence.judged}) < MIN_QUERIES:
        return JudgeVerdict.TOO_FEW_QUERIES
    if evidence.check is None:
        if found.num_untied < MIN_UNTIED:
            return JudgeVerdict.NO_PREFERENCE
        direction = _direction(found.judged, found.judged_p)
        return (JudgeVerdict.NOT_PREFERRED, JudgeVerdict.NO_PREFERENCE, JudgeVerdict.PREFERRED)[direction + 1]
    if len(evidence.people) < evidence.num_drawn:
        return JudgeVerdict.TOO_FEW_CHECKED
    return _checked_verdict(evidence.check, found)


def _checked_verdict(check: PeopleCheck, found: JudgeContrast) -> JudgeVerdict:
    if check.kappa.low < MIN_KAPPA:
        return JudgeVerdict.UNUSABLE
    if found.corrected is None or found.corrected_p is None or found.num_untied < MIN_UNTIED:
        return JudgeVerdict.TOO_FEW_CHECKED
    direction = _direction(found.corrected, found.corrected_p)
    return (JudgeVerdict.WORSE, JudgeVerdict.INCONCLUSIVE, JudgeVerdict.BETTER)[direction + 1]


def _direction(difference: Figure, p: float) -> int:
    """Return 1 or -1 if the difference is shown, else 0: the test and the interval must agree."""
    if p >= ALPHA:
        return 0
    return 1 if difference.low > 0 else -1 if difference.high < 0 else 0
