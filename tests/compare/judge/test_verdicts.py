"""Verdicts from grades: the unit that counts as one query, and the correction for several arms."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from gateway.compare.judge.sentences import judge_bottom_line
from gateway.compare.judge.values import Figure, JudgeContrast, JudgeReport, JudgeSetup, JudgeVerdict, Usage
from gateway.compare.judge.verdicts import Evidence, conclude, levels


def make_evidence(num_queries: int, *, copies: int = 1, shift: float = 0.3, num_arms: int = 2) -> Evidence:
    """Make arms that find one of two documents first, each query in several copies that depend on each other."""
    chance = random.Random(4)
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {f"arm{i}": {} for i in range(num_arms)}
    grades, groups = {}, {}
    for number in range(num_queries):
        wins = [chance.random() < (0.5 + shift if arm else 0.5) for arm in range(num_arms)]
        for copy in range(copies):
            query = f"q{number}.{copy}"
            grades[query] = {"good": 3, "bad": 0}
            if copies > 1:
                groups[query] = f"topic {number}"
            for arm, wins_here in enumerate(wins):
                order = ("good", "bad") if wins_here else ("bad", "good")
                rankings[f"arm{arm}"][query] = [(order[0], 2.0), (order[1], 1.0)]
    return Evidence(rankings, grades, {}, None, 0.0, groups)


def test_copies_of_a_query_do_not_make_the_interval_narrower() -> None:
    [once], [five_times] = conclude(make_evidence(60)), conclude(make_evidence(60, copies=5))
    assert five_times == once
    assert levels(make_evidence(60, copies=5)) == levels(make_evidence(60))


def test_copies_of_a_query_do_not_count_as_queries() -> None:
    [contrast] = conclude(make_evidence(40, copies=5))
    assert contrast.verdict is JudgeVerdict.TOO_FEW_QUERIES


def test_several_arms_are_corrected_together() -> None:
    """Holm: of two equal arms, each p counts twice."""
    evidence = make_evidence(60)
    [alone] = conclude(evidence)
    twice = {**evidence.rankings, "again": evidence.rankings["arm1"]}
    first, second = conclude(Evidence(twice, evidence.judged, {}, None, 0.0))
    assert first.judged_p == second.judged_p == pytest.approx(2 * alone.judged_p)


def test_few_queries_that_differ_show_no_preference() -> None:
    """Ten wins of 200 queries: Student's t would call this significant."""
    evidence = make_evidence(200, shift=0.0)
    same = {query: [("good", 2.0), ("bad", 1.0)] for query in evidence.judged}
    worse = {
        query: [("bad", 2.0), ("good", 1.0)] if place < 10 else hits for place, (query, hits) in enumerate(same.items())
    }
    [contrast] = conclude(Evidence({"old": worse, "new": same}, evidence.judged, {}, None, 0.0))
    assert contrast.judged.low > 0
    assert contrast.num_untied == 10
    assert contrast.verdict is JudgeVerdict.NO_PREFERENCE


def test_the_bottom_line_names_the_best_of_several_better_arms() -> None:
    """Not the first on the command line."""
    figure = Figure(0.1, 0.05, 0.15)
    small = JudgeContrast("small", "old", figure, 0.01, figure, figure, 0.01, 0.5, 40, JudgeVerdict.BETTER)
    large = replace(small, arm="large", judged=Figure(0.05, 0.01, 0.1), corrected=Figure(0.2, 0.1, 0.3))
    report = make_report_of([small, large])

    assert judge_bottom_line(report) == (
        "Switch to large: by the judge, corrected by people, it is better than old. So is small; the difference between "
        "them was not tested."
    )
    alone = [replace(one, corrected=None, verdict=JudgeVerdict.PREFERRED) for one in (small, large)]
    assert judge_bottom_line(make_report_of(alone)).startswith("The judge prefers small to old")


def make_report_of(contrasts: list[JudgeContrast]) -> JudgeReport:
    asked = JudgeSetup("http://judge", "judge", [], [], "", "text", 0.0)
    return JudgeReport(asked, 60, 600, 0, 0, Usage(600, 0, 0, 0), None, None, {}, contrasts, [], {})
