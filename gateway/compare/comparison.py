"""Compare arms on a data set: plan, embed, search, judge, measure the cost."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gateway import __version__
from gateway.cache.files import CacheFolder
from gateway.cli.client import GatewayClient
from gateway.compare.agreement import overlap, rank_biased_overlap, same_first
from gateway.compare.arms import PlannedArm, parse_arms, plan_arm
from gateway.compare.bottom_line import decide
from gateway.compare.conclusions import Quality, conclude
from gateway.compare.cost import CostRun, measure_costs
from gateway.compare.dataset import Dataset
from gateway.compare.notes import arm_notes, cut_notes, judgment_notes, run_notes
from gateway.compare.progress import Reporter
from gateway.compare.ranking import Ranked, rank
from gateway.compare.results import Agreement, Arm, Comparison, Cost, Estimate, Hit, QueryResult
from gateway.compare.search import Ranking
from gateway.compare.statistics import Design, estimate

_SHOWN_HITS = 10
_SHOWN_CHARACTERS = 300
_LIBRARIES = ("numpy", "scipy", "ir-measures", "pytrec-eval-terrier")


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """The arms and the data of a comparison.

    Attributes:
        arms: names of the arms as on the command line, such as ``MODEL@DIMENSIONS:PRECISION``; the first is the baseline.
        split: split of the judgments; ``None`` for the only split, or ``test``.
        cache: folder with the vectors of earlier runs.
        num_resamples: number of resamples of the randomization test.
        margin: a smaller difference does not matter.
        judged: more judgments, such as those of a filled-in ``to_judge.tsv``.
        queries: a file of captured queries that replace the data's queries.
    """

    arms: Sequence[str]
    data: Path
    cache: Path
    num_resamples: int
    measures_cost: bool
    split: str | None = None
    max_documents: int | None = None
    seed: int = 0
    margin: float = 0.01
    judged: Path | None = None
    queries: Path | None = None


async def compare(
    request: CompareRequest, dataset: Dataset, client: GatewayClient, reporter: Reporter
) -> tuple[Comparison, Mapping[str, Ranking]]:
    """Compare the arms of a request, and return the comparison and the full ranking of each query by arm.

    Args:
        dataset: the data set of the request. The caller reads it, so that its errors appear before models load.

    Raises:
        CompareError: an arm cannot be compared.
        StartError: the gateway does not answer.
    """
    design = Design(request.num_resamples, request.seed, request.margin, dataset.groups)
    names = parse_arms(request.arms)
    arms = [await plan_arm(client, name) for name in names]
    with CacheFolder(request.cache) as cache:
        ranked = {arm.name.text: await rank(client, arm, dataset, cache, reporter) for arm in arms}
    rankings = {name: ranked_arm.ranking for name, ranked_arm in ranked.items()}
    cost = CostRun({}, [], None)
    if request.measures_cost:
        texts = list(dataset.queries.values()), list(dataset.documents.values())
        cost = await measure_costs(client, arms, *texts, request.seed, reporter)
    found = conclude(rankings, dataset, design)
    results = [_arm(arm, ranked[arm.name.text], found.qualities, cost.costs, design) for arm in arms]
    comparison = Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=client.source,
        dataset=dataset.summary(),
        seed=request.seed,
        num_resamples=request.num_resamples,
        margin=request.margin,
        versions={"gateway": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        notes=[
            *dataset.notes,
            *judgment_notes(dataset, found),
            *arm_notes(arms),
            *cut_notes(
                {arm.card.id: (arm, ranked[arm.name.text]) for arm in arms},
                len(dataset.documents),
                len(dataset.queries),
            ),
            *run_notes(cache, cost.cached, measures_cost=request.measures_cost),
        ],
        arms=results,
        bottom_line=decide(results, found.contrasts, cost.contrasts, request.margin),
        contrasts=found.contrasts,
        cost_contrasts=cost.contrasts,
        load=cost.load,
        agreements=[_agreement(name, names[0].text, rankings, design) for name in list(rankings)[1:]],
        queries=_queries(dataset, rankings, found.qualities),
    )
    return comparison, rankings


def _agreement(arm: str, baseline: str, rankings: Mapping[str, Ranking], design: Design) -> Agreement:
    def mean(alike: Callable[[Sequence[str], Sequence[str]], float]) -> Estimate:
        pairs = {query: (_ids(rankings[arm][query]), _ids(rankings[baseline][query])) for query in rankings[baseline]}
        return estimate({query: alike(*pair) for query, pair in pairs.items()}, design.groups)

    return Agreement(
        arm=arm,
        baseline=baseline,
        overlap=mean(overlap),
        rbo=mean(rank_biased_overlap),
        same_first=mean(same_first),
    )


def _arm(
    arm: PlannedArm, ranked: Ranked, qualities: Mapping[str, Quality], costs: Mapping[str, Cost], design: Design
) -> Arm:
    quality = qualities[arm.name.text]
    return Arm(
        name=arm.name.text,
        model=arm.card.id,
        space=arm.space,
        dimensions=arm.dimensions,
        bytes_per_document=ranked.bytes_per_document,
        device=arm.card.device or "",
        dtype=arm.card.dtype or "",
        query_task=arm.queries.task,
        passage_task=arm.passages.task,
        quality={name: estimate(values, design.groups) for name, values in quality.items()},
        cost=costs.get(arm.name.text),
        source=arm.card.source or "",
    )


def _queries(dataset: Dataset, rankings: Mapping[str, Ranking], qualities: Mapping[str, Quality]) -> list[QueryResult]:
    baseline, *others = rankings
    results = []
    for query, text in dataset.queries.items():
        judgments = dataset.judgments.get(query, {})
        first = _ids(rankings[baseline][query])
        results.append(
            QueryResult(
                id=query,
                text=text,
                rankings={
                    arm: [
                        Hit(document, score, dataset.documents[document][:_SHOWN_CHARACTERS], judgments.get(document))
                        for document, score in ranking[query][:_SHOWN_HITS]
                    ]
                    for arm, ranking in rankings.items()
                },
                quality={
                    arm: {name: values[query] for name, values in quality.items()}
                    for arm, quality in qualities.items()
                    if quality
                },
                overlap={arm: overlap(_ids(rankings[arm][query]), first) for arm in others},
                rbo={arm: rank_biased_overlap(_ids(rankings[arm][query]), first) for arm in others},
                group=dataset.groups.get(query),
            )
        )
    return results


def _ids(ranking: Sequence[tuple[str, float]]) -> list[str]:
    return [document for document, _score in ranking]
