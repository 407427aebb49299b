"""The report on a judge: its grades, its check, the verdicts, and the notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from gateway.compare.dataset import Dataset
from gateway.compare.judge.answers import Outcome
from gateway.compare.judge.endpoint import CUT_REMEDY, MAX_THOUGHT_TOKENS, ChatEndpoint
from gateway.compare.judge.grading import Grader, Question
from gateway.compare.judge.inference import kappa, self_agreement
from gateway.compare.judge.makers import relatives
from gateway.compare.judge.pool import draw_checked
from gateway.compare.judge.prompt import MAX_DOCUMENT_CHARACTERS, ORDERS, prompt_hash, template
from gateway.compare.judge.values import Grades, JudgeReport, JudgeSetup, PeopleCheck, SelfAgreement, Usage
from gateway.compare.judge.verdicts import MAX_UNJUDGED_SHARE, Evidence, conclude, levels
from gateway.compare.search import Ranking
from gateway.comparisons.sheet import CHECK_FILE
from gateway.config.wording import count
from gateway.errors import CompareError

MIN_SELF_AGREEMENT = 0.8
"""Below this agreement, a note says that the judge's grades depend on chance."""

_NUM_RESAMPLES = 10_000  # for the interval of kappa


@dataclass(frozen=True, slots=True)
class Subject:
    """The comparison to judge.

    Attributes:
        rankings: the rankings of every arm, baseline first.
        sources: by arm, the names that identify the maker of its model.
    """

    dataset: Dataset
    rankings: Mapping[str, Ranking]
    sources: Mapping[str, str]
    seed: int


@dataclass(frozen=True, slots=True)
class Graded:
    """The questions that were asked, and the grader with the answers.

    Attributes:
        questions: one question for each pair.
        again: questions for the pairs that were graded again, with the examples in other orders.
        num_known: the number of these questions that earlier runs had asked.
    """

    grader: Grader
    questions: Sequence[Question]
    again: Sequence[Question]
    num_known: int


def describe(address: httpx.URL, endpoint: ChatEndpoint, answered_as: Sequence[str]) -> JudgeSetup:
    """Return the judge and its prompt, for the results."""
    return JudgeSetup(
        url=str(address.copy_with(query=None)),
        model=endpoint.model,
        answered_as=answered_as,
        prompt=template(),
        prompt_sha256=prompt_hash(),
        answer_format=endpoint.dialect.answer_format,
        temperature=0.0 if endpoint.dialect.has_temperature else None,
    )


def make_report(subject: Subject, asked: JudgeSetup, graded: Graded, checked: Grades | None) -> JudgeReport:
    """Conclude from the grades.

    Args:
        checked: people's grades of the completely checked queries; ``None`` without a check.

    Raises:
        CompareError: there is a check, but none of its queries is complete.
    """
    grades = _grades(graded, list(subject.dataset.queries))
    unjudged = graded.grader.unjudged(graded.questions)
    check = None if checked is None else check_by_people(checked, grades, subject.seed)
    unjudged_share = len(unjudged) / len(graded.questions)
    groups = subject.dataset.groups
    num_drawn = len(draw_checked(list(subject.dataset.queries), groups, subject.seed))
    evidence = Evidence(subject.rankings, grades, checked or {}, check, unjudged_share, groups, num_drawn)
    repeats, tally = _self_agreement(graded), graded.grader.tally
    return JudgeReport(
        asked=asked,
        num_queries=len(grades),
        num_pairs=len(graded.questions),
        num_refused=unjudged.count(Outcome.REFUSED),
        num_unreadable=unjudged.count(Outcome.UNREADABLE),
        num_cut=unjudged.count(Outcome.CUT),
        usage=Usage(tally.num_calls, graded.num_known, tally.prompt_tokens, tally.completion_tokens),
        self_agreement=repeats,
        check=check,
        levels=levels(evidence),
        contrasts=conclude(evidence),
        notes=[
            *_notes_on_grades(graded, unjudged, repeats),
            *_notes_on_judge(asked, subject),
            *_notes_on_data(graded, subject.dataset.groups),
        ],
        grades=grades,
    )


def _grades(graded: Graded, queries: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the judge's grades in the order of the queries, without ungraded queries."""
    found: dict[str, dict[str, int]] = {query: {} for query in queries}
    for question in graded.questions:
        if (grade := graded.grader.known(question)) is not None:
            found[question.pair.query][question.pair.document] = grade
    return {query: dict(sorted(scores.items())) for query, scores in found.items() if scores}


def check_by_people(checked: Grades, grades: Grades, seed: int) -> PeopleCheck:
    """Compare the judge's grades with those of people.

    Args:
        checked: people's grades of the completely checked queries.
        seed: the seed of the interval of kappa.

    Raises:
        CompareError: there is nothing to compare.
    """
    if not checked:
        raise CompareError(
            f"no query of the check is complete: each document that {CHECK_FILE} lists for it needs a score"
        )
    if not any(document in grades.get(query, {}) for query, scores in checked.items() for document in scores):
        raise CompareError("the judge has no grade for any document that people checked, so they cannot be compared")
    return PeopleCheck(
        num_queries=len(checked),
        num_pairs=sum(map(len, checked.values())),
        kappa=kappa(checked, grades, _NUM_RESAMPLES, seed),
    )


def _self_agreement(graded: Graded) -> SelfAgreement | None:
    gradings = []
    for pair in dict.fromkeys(question.pair for question in graded.again):
        grades = [graded.grader.known(Question(pair, order)) for order in range(len(ORDERS))]
        if None not in grades:
            gradings.append([grade for grade in grades if grade is not None])
    return SelfAgreement(len(gradings), self_agreement(gradings)) if gradings else None


def _notes_on_grades(graded: Graded, unjudged: Sequence[Outcome], repeats: SelfAgreement | None) -> list[str]:
    notes = []
    if unjudged:
        share = 100 * len(unjudged) / len(graded.questions)
        notes.append(
            f"{count(len(unjudged), 'pair has', 'pairs have')} no grade ({share:.1f} %): refused, cut, or answered without "
            f"one. Above {100 * MAX_UNJUDGED_SHARE:.0f} % there is no verdict."
        )
    if num_cut := unjudged.count(Outcome.CUT):
        notes.append(
            f"{count(num_cut, 'answer was', 'answers were')} cut at the limit of tokens: {MAX_THOUGHT_TOKENS:,}, or that of "
            f"the judge's server. A grade in such an answer does not count: {CUT_REMEDY}. Then run again: grades are kept."
        )
    if repeats and repeats.share < MIN_SELF_AGREEMENT:
        notes.append(
            f"With the examples of its prompt in another order, the judge repeats only {100 * repeats.share:.0f} % of its "
            "grades: they depend partly on chance."
        )
    return notes


def _notes_on_judge(asked: JudgeSetup, subject: Subject) -> list[str]:
    notes = [
        f"{arm} and the judge {asked.model} are both from {maker}: a judge prefers results of related models. Use another "
        "judge, or rely on the check by people."
        for arm, maker in relatives(asked.model, subject.sources).items()
    ]
    if len(asked.answered_as) > 1:
        notes.append(f"The grades are of several versions of the judge: {', '.join(asked.answered_as)}.")
    if asked.temperature is None:
        notes.append(f"{asked.model} does not accept temperature 0, so another run may give other grades.")
    return notes


def _notes_on_data(graded: Graded, groups: Mapping[str, str]) -> list[str]:
    notes = []
    texts = (graded.grader.texts(question.pair)[1] for question in graded.questions)
    if num_cut := len({text for text in texts if len(text) > MAX_DOCUMENT_CHARACTERS}):
        notes.append(
            f"The judge read only the first {MAX_DOCUMENT_CHARACTERS:,} characters of {count(num_cut, 'document')}."
        )
    if groups:
        notes.append("Queries that depend on each other count as one: the judge's figures are means over such groups.")
    return notes
