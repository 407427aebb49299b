"""The results of a comparison: plain values, the source of the tables, the JSON files and the page.

Every mapping by arm has the arms in the order of the command line; the first arm is the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import nan

PRIMARY_MEASURE = "nDCG@10"
"""The measure of the verdict, chosen before anything is computed."""

JUDGED = "Judged@10"
"""Not a quality: the share of the first ten documents that have a judgment."""

MEASURES = (PRIMARY_MEASURE, "R@10", "R@100", "RR@10", "Success@1", JUDGED)
"""Every measure, by its name in ``ir-measures``."""


class Verdict(StrEnum):
    """The conclusion on an arm against the baseline.

    Attributes:
        AS_GOOD: any difference is below the margin.
        NOT_WORSE: the arm is not worse by more than the margin; whether it is better is not shown.
        TOO_FEW_DIFFER: nearly all queries are tied.
        NOT_JUDGED_ALIKE: the conclusion depends on whether documents without judgment count as irrelevant.
    """

    BETTER = "better"
    WORSE = "worse"
    AS_GOOD = "as good"
    NOT_WORSE = "not worse"
    INCONCLUSIVE = "inconclusive"
    TOO_FEW_QUERIES = "too few queries"
    TOO_FEW_DIFFER = "too few differ"
    NOT_JUDGED_ALIKE = "not judged alike"


class Advice(StrEnum):
    """The recommended action for the baseline."""

    SWITCH = "switch"
    STAY = "stay"
    TOO_FEW_QUERIES = "too few queries"
    TOO_EASY = "too easy"
    TOO_FEW_DIFFER = "too few differ"
    JUDGE_MORE = "judge more"
    NO_JUDGMENTS = "no judgments"


@dataclass(frozen=True, slots=True)
class BottomLine:
    """The recommendation that follows from a comparison.

    Attributes:
        arm: the arm to use from now on; ``None`` if the comparison does not decide.
        text: the recommendation with its reason, as one or two sentences.
    """

    advice: Advice
    arm: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the queries, with the bounds of its 95 % interval.

    Attributes:
        low: ``None``, like ``high``, if the values do not vary: equal values, or a single value, say nothing about other
            queries.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Cost:
    """The speed of an arm, measured on a sample of the texts, in turns with the other arms.

    Attributes:
        texts_per_s: passages per second, in batches, one batch at a time; a median.
        tokens_per_s: the same throughput in the model's own tokens.
        p50_s: median time of one query, sent alone.
        p95_s: 95th percentile of that time; ``None`` with too few requests.
        num_queries: number of requests behind the times of one query.
        num_batches: number of requests behind the throughput.
    """

    texts_per_s: float
    tokens_per_s: float
    p50_s: float
    p95_s: float | None
    num_queries: int
    num_batches: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median ratio of paired requests with the same texts.

    Attributes:
        low: bound of the interval; all intervals of a comparison hold at once in 95 % of comparisons. ``None``, like
            ``high``, with too few pairs.
        is_shown: whether the interval excludes all values within 10 % of 1. Otherwise no difference was found.
    """

    ratio: float
    low: float | None
    high: float | None
    num_pairs: int
    is_shown: bool


@dataclass(frozen=True, slots=True)
class CostContrast:
    """The speed of an arm against that of the baseline.

    Attributes:
        is_same_model: both arms are one model on one device, which was measured once.
        query_time: ratio of the times of one query; above 1, the arm is slower.
        texts_per_s: ratio of the throughputs; above 1, the arm is faster.
    """

    arm: str
    baseline: str
    is_same_model: bool
    query_time: Ratio | None
    texts_per_s: Ratio | None


@dataclass(frozen=True, slots=True)
class Load:
    """The average number of running or waiting processes over a minute, before and after the cost was measured."""

    before: float
    after: float
    num_cores: int


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of the comparison: a model with a vector size.

    Attributes:
        name: the name on the command line, such as ``jina-embeddings-v3@256``.
        model: id of the model that answered.
        space: id of the vectors' space.
        dimensions: dimensions of the dense vectors; 0 without dense vectors.
        bytes_per_document: average size of a document's stored vectors.
        query_task: the task of the queries; ``None`` for a model without tasks.
        quality: mean of each measure over the queries; empty without judgments.
        cost: the cost; ``None`` if it was not measured.
        source: the source of the model's weights; empty if the gateway does not report it.
    """

    name: str
    model: str
    space: str
    dimensions: int
    bytes_per_document: int
    device: str
    dtype: str
    query_task: str | None
    passage_task: str | None
    quality: Mapping[str, Estimate]
    cost: Cost | None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Contrast:
    """An arm against the baseline in one measure, query by query.

    Attributes:
        difference: mean of (arm - baseline), with its interval, which is not corrected for the number of arms; without
            bounds if too few queries differ.
        standard_error: standard error of that mean.
        p: two-sided p: the larger p of the paired randomization test and the empirical likelihood ratio test.
        p_error: standard error of ``p`` from random draws; 0 without random draws.
        p_holm: ``p`` after Holm's correction for the number of arms, not of measures.
        wins: number of queries in which the arm is better than the baseline.
        num_independent: number of queries, or of groups of dependent queries.
        num_untied: number of these that are not tied.
        verdict: the verdict on the primary measure; ``None`` for other measures, as are the fields below.
        detectable: the difference that such queries would show in 80 % of comparisons; ``None`` if too few differ.
        queries_needed: the number of such queries that would show a small difference as often.
        unseen: the largest share of queries with a total loss (or gain) that the sample may lack by chance, if only such
            queries prevent a clearer verdict.
        condensed: the difference without unjudged documents, if the arms are not judged alike.
        condensed_verdict: the verdict on ``condensed``.
        simultaneous: ``difference``, with its interval corrected for the number of arms (Bonferroni), with bounds in any
            case; like the fields below, absent from the files of earlier releases.
        p_random: the p of the randomization test alone.
        largest: the largest possible difference of a query, given the baseline's values.
    """

    arm: str
    baseline: str
    measure: str
    difference: Estimate
    standard_error: float
    p: float
    p_error: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    num_independent: int
    num_untied: int
    verdict: Verdict | None = None
    detectable: float | None = None
    queries_needed: int | None = None
    unseen: float | None = None
    condensed: Estimate | None = None
    condensed_verdict: Verdict | None = None
    simultaneous: Estimate = Estimate(nan, None, None)
    p_random: float = nan
    largest: float = nan


@dataclass(frozen=True, slots=True)
class Agreement:
    """The similarity of the rankings of an arm and the baseline; it does not measure quality.

    Attributes:
        overlap: mean share of documents that both rankings have among their first ten.
        rbo: mean rank-biased overlap with p = 0.9 (Webber et al. 2010, https://doi.org/10.1145/1852102.1852106).
        same_first: share of the queries with the same first document.
    """

    arm: str
    baseline: str
    overlap: Estimate
    rbo: Estimate
    same_first: Estimate


@dataclass(frozen=True, slots=True)
class Hit:
    """A document in a ranking.

    Attributes:
        text: the beginning of the document, for people.
        relevance: its judgment for the query; ``None`` if it was not judged.
    """

    document: str
    score: float
    text: str
    relevance: int | None


@dataclass(frozen=True, slots=True)
class QueryResult:
    """One query: the first ten documents of every arm, and their quality.

    Attributes:
        quality: value of each measure by arm; empty without judgments.
        overlap: overlap@10 with the baseline, by arm, without the baseline.
        rbo: rank-biased overlap with the baseline, by arm, without the baseline.
        group: the group of a query that depends on others.
    """

    id: str
    text: str
    rankings: Mapping[str, Sequence[Hit]]
    quality: Mapping[str, Mapping[str, float]]
    overlap: Mapping[str, float]
    rbo: Mapping[str, float]
    group: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """The data set of a comparison.

    Attributes:
        sha256: hex hash over the used documents, queries and judgments.
        num_judgments: number of judgments; 0 without judgments.
        num_unjudged_queries: number of queries that were left out because no judgment names them.
        num_groups: number of groups of dependent queries; an independent query is a group by itself.
    """

    folder: str
    split: str | None
    sha256: str
    num_documents: int
    num_queries: int
    num_judgments: int
    num_unjudged_queries: int
    num_groups: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole comparison.

    Attributes:
        created: the time when the comparison ended, ISO 8601 in UTC.
        source: the gateway of the vectors: a URL, or ``in process``.
        num_resamples: number of resamples of the randomization test.
        margin: a smaller difference does not matter.
        versions: versions of the gateway and of the libraries that affect the figures, by name.
        notes: caveats on the figures, such as arms with different shares of judged documents.
        contrasts: for each arm except the baseline, all measures in order; empty without judgments.
        cost_contrasts: the cost contrast of each arm except the baseline; empty if the cost was not measured.
        load: load of the client's machine; ``None`` if the cost was not measured.
        agreements: the agreement of each arm except the baseline.
    """

    created: str
    source: str
    dataset: DatasetSummary
    seed: int
    num_resamples: int
    margin: float
    versions: Mapping[str, str]
    notes: Sequence[str]
    arms: Sequence[Arm]
    bottom_line: BottomLine
    contrasts: Sequence[Contrast]
    cost_contrasts: Sequence[CostContrast]
    load: Load | None
    agreements: Sequence[Agreement]
    queries: Sequence[QueryResult]

    @property
    def baseline(self) -> Arm:
        """The first arm, with which the others are compared."""
        return self.arms[0]

    @property
    def has_judgments(self) -> bool:
        """Whether quality was measured, not only a difference."""
        return self.dataset.num_judgments > 0
