"""The results of a judge: plain values, the source of the tables, the files and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Grades = Mapping[str, Mapping[str, int]]
"""Grades, 0 to 3, by query and document."""

DEPTH = 10
"""The number of documents of each arm that are graded for a query."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document that an arm finds for it, by their ids."""

    query: str
    document: str


class JudgeVerdict(StrEnum):
    """The conclusion on an arm against the baseline by the judge's grades.

    Only ``BETTER`` and ``WORSE`` are about quality; they need the check by people, because the judge may favor an arm.
    """

    BETTER = "better"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"
    PREFERRED = "preferred by the judge"
    NOT_PREFERRED = "baseline preferred by the judge"
    NO_PREFERENCE = "no preference"
    TOO_FEW_QUERIES = "too few queries"
    TOO_FEW_CHECKED = "too few queries checked"
    TOO_MANY_UNJUDGED = "too many unjudged"
    UNUSABLE = "judge cannot be used"


@dataclass(frozen=True, slots=True)
class JudgeContrast:
    """An arm against the baseline in nDCG@10, query by query.

    Attributes:
        judged: mean of (arm - baseline) by the judge's grades, over all queries.
        judged_p: two-sided p of ``judged``, after Holm's correction for the number of arms.
        people: the same difference by people's grades, over the queries that they checked; ``None`` without a check.
        corrected: the combined difference, see :func:`gateway.compare.judge.inference.corrected_difference`.
        corrected_p: two-sided p of ``corrected``, after Holm's correction.
        weight: the weight, from 0 to 1, of the judge's grades in ``corrected``.
        num_untied: queries in which arm and baseline differ: by people's grades with a check, otherwise by the judge's.
    """

    arm: str
    baseline: str
    judged: Figure
    judged_p: float
    people: Figure | None
    corrected: Figure | None
    corrected_p: float | None
    weight: float | None
    num_untied: int
    verdict: JudgeVerdict


@dataclass(frozen=True, slots=True)
class PeopleCheck:
    """The agreement of the judge with people.

    Attributes:
        num_queries: number of queries whose pooled documents were all graded by people.
        num_pairs: number of documents of these queries.
        kappa: Cohen's kappa with quadratic weights, and its 95 % bootstrap interval over the queries.
    """

    num_queries: int
    num_pairs: int
    kappa: Figure


@dataclass(frozen=True, slots=True)
class SelfAgreement:
    """The consistency of the judge's grades when the examples in its prompt are in another order.

    Attributes:
        num_pairs: number of pairs that were graded three times.
        share: the share of equal gradings among any two of a pair.
    """

    num_pairs: int
    share: float


@dataclass(frozen=True, slots=True)
class Usage:
    """The requests of this run.

    Attributes:
        num_calls: number of answered requests.
        num_cached: number of grades from earlier runs.
        prompt_tokens, completion_tokens: as the endpoint counts them; 0 if it does not.
    """

    num_calls: int
    num_cached: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class JudgeSetup:
    """The judge and its prompt.

    Attributes:
        url: the URL of the endpoint, without a query.
        model: the requested model.
        answered_as: ids of the models that answered.
        prompt: the messages, with ``{query}``, ``{document}`` and ``{code}`` for the parts that change.
        prompt_sha256: the hex sha256 of the messages.
        answer_format: the requested format of the answer: ``json_schema``, ``json_object`` or ``text``.
        temperature: the temperature; ``None`` if the model does not accept 0.
    """

    url: str
    model: str
    answered_as: Sequence[str]
    prompt: Sequence[Mapping[str, str]]
    prompt_sha256: str
    answer_format: str
    temperature: float | None


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """Everything that a judge contributes to a comparison.

    Attributes:
        num_refused: pairs that the judge, or a filter in front of it, refused to grade.
        num_unreadable: pairs whose answer has no grade, or broke off.
        num_cut: pairs whose answer was cut at its limit of tokens.
        levels: mean nDCG@10 of each arm by the judge's grades.
        contrasts: the contrast of each arm except the baseline.
        notes: caveats.
        grades: the judge's grades.
        check_notes: caveats on the check by people.
    """

    asked: JudgeSetup
    num_queries: int
    num_pairs: int
    num_refused: int
    num_unreadable: int
    usage: Usage
    self_agreement: SelfAgreement | None
    check: PeopleCheck | None
    levels: Mapping[str, Figure]
    contrasts: Sequence[JudgeContrast]
    notes: Sequence[str]
    grades: Grades = field(repr=False)
    check_notes: Sequence[str] = ()
    num_cut: int = 0  # an earlier version counted such answers

    @property
    def num_unjudged(self) -> int:
        """The number of the pairs that have no grade."""
        return self.num_refused + self.num_unreadable + self.num_cut

    @property
    def unjudged_share(self) -> float:
        """The share of the pairs that have no grade."""
        return self.num_unjudged / self.num_pairs if self.num_pairs else 0.0
