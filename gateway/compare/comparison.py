"""Compare arms on a data set: plan, embed, search, judge, measure the cost."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gateway import __version__
from gateway.compare.agreement import overlap, rank_biased_overlap, same_first
from gateway.compare.arms import PlannedArm, parse_arms, plan_arm
from gateway.compare.client import GatewayClient
from gateway.compare.cost import measure_costs
from gateway.compare.dataset import Dataset, read_dataset
from gateway.compare.embedding import embed_side
from gateway.compare.progress import Reporter
from gateway.compare.quality import measure
from gateway.compare.results import (
    MEASURES,
    Agreement,
    Arm,
    Comparison,
    Contrast,
    Cost,
    Estimate,
    Hit,
    QueryResult,
)
from gateway.compare.search import Ranking, make_ranking, search
from gateway.compare.statistics import MIN_QUERIES, contrast, estimate, with_holm
from gateway.routing.spaces import is_same_space

_DEPTH = 100
_SHOWN_HITS = 10
_SHOWN_CHARACTERS = 300
_LIBRARIES = ("numpy", "scipy", "ir-measures", "pytrec-eval-terrier")

Qualities = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Value by arm, measure and query."""


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """What is to be compared.

    Attributes:
        arms: as they were given, ``MODEL`` or ``MODEL@DIMENSIONS``; the first is the baseline.
        split: of the judgements; ``None`` for the only one, or ``test``.
        cache: folder of vectors that were embedded before.
        num_resamples: of the bootstrap and of the randomisation test.
    """

    arms: Sequence[str]
    data: Path
    cache: Path
    split: str | None = None
    max_documents: int | None = None
    seed: int = 0
    num_resamples: int = 10_000
    measures_cost: bool = True


async def compare(
    request: CompareRequest, client: GatewayClient, reporter: Reporter
) -> tuple[Comparison, Mapping[str, Ranking]]:
    """Compare the arms of a request; return what was found, and the whole ranking of each query by arm.

    Raises:
        CompareError: the data cannot be read, an arm cannot be compared, or the gateway does not answer.
    """
    names = parse_arms(request.arms)
    dataset = read_dataset(request.data, request.split, request.max_documents, request.seed)
    arms = [await plan_arm(client, name) for name in names]
    rankings: dict[str, Ranking] = {}
    num_cached = 0
    for arm in arms:
        rankings[arm.name.text], found = await _rank(client, arm, dataset, request.cache, reporter)
        num_cached += found
    costs: Mapping[str, Cost] = {}
    if request.measures_cost:
        texts = list(dataset.queries.values()), list(dataset.documents.values())
        costs = await measure_costs(client, arms, *texts, request.seed, reporter)
    qualities = {
        name: measure(ranking, dataset.judgements) if dataset.judgements else {} for name, ranking in rankings.items()
    }
    contrasts = _contrasts(qualities, request)
    comparison = Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=client.source,
        dataset=dataset.summary(),
        seed=request.seed,
        num_resamples=request.num_resamples,
        versions={"gateway": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        notes=_notes(dataset, arms, qualities, num_cached, request),
        arms=[_arm(arm, qualities, costs, request) for arm in arms],
        contrasts=contrasts,
        agreements=[_agreement(name, names[0].text, rankings, request) for name in list(rankings)[1:]],
        queries=_queries(dataset, rankings, qualities),
    )
    return comparison, rankings


async def _rank(
    client: GatewayClient, arm: PlannedArm, dataset: Dataset, cache: Path, reporter: Reporter
) -> tuple[Ranking, int]:
    """Embed both sides, and search; returns how many vectors came from the cache as well."""
    texts = list(dataset.documents.values())
    documents, num_documents = await embed_side(client, arm, arm.passages, texts, cache, reporter, "documents")
    texts = list(dataset.queries.values())
    queries, num_queries = await embed_side(client, arm, arm.queries, texts, cache, reporter, "queries")
    ids = list(dataset.documents)
    places = {document: place for place, document in enumerate(ids)}
    indices, scores = search(queries, documents, _DEPTH, [places.get(query) for query in dataset.queries])
    return make_ranking(list(dataset.queries), ids, indices, scores), num_documents + num_queries


def _contrasts(qualities: Qualities, request: CompareRequest) -> list[Contrast]:
    baseline, *others = qualities
    if not qualities[baseline]:
        return []
    by_measure = [
        with_holm(
            [
                contrast(
                    arm,
                    baseline,
                    name,
                    qualities[arm][name],
                    qualities[baseline][name],
                    request.num_resamples,
                    request.seed,
                )
                for arm in others
            ]
        )
        for name in MEASURES
    ]
    return [one for arm in others for contrasts in by_measure for one in contrasts if one.arm == arm]


def _agreement(arm: str, baseline: str, rankings: Mapping[str, Ranking], request: CompareRequest) -> Agreement:
    pairs = [(_ids(rankings[arm][query]), _ids(rankings[baseline][query])) for query in rankings[baseline]]

    def mean(values: Sequence[float]) -> Estimate:
        return estimate(values, request.num_resamples, request.seed)

    return Agreement(
        arm=arm,
        baseline=baseline,
        overlap=mean([overlap(*pair) for pair in pairs]),
        rbo=mean([rank_biased_overlap(*pair) for pair in pairs]),
        same_first=mean([same_first(*pair) for pair in pairs]),
    )


def _arm(arm: PlannedArm, qualities: Qualities, costs: Mapping[str, Cost], request: CompareRequest) -> Arm:
    quality = qualities[arm.name.text]
    return Arm(
        name=arm.name.text,
        model=arm.card.id,
        space=arm.space,
        dimensions=arm.dimensions,
        bytes_per_vector=4 * arm.dimensions,
        device=arm.card.device or "",
        dtype=arm.card.dtype or "",
        query_task=arm.queries.task,
        passage_task=arm.passages.task,
        quality={
            name: estimate(list(values.values()), request.num_resamples, request.seed)
            for name, values in quality.items()
        },
        cost=costs.get(arm.name.text),
    )


def _queries(dataset: Dataset, rankings: Mapping[str, Ranking], qualities: Qualities) -> list[QueryResult]:
    baseline, *others = rankings
    results = []
    for query, text in dataset.queries.items():
        judgements = dataset.judgements.get(query, {})
        first = _ids(rankings[baseline][query])
        results.append(
            QueryResult(
                id=query,
                text=text,
                rankings={
                    arm: [
                        Hit(document, score, dataset.documents[document][:_SHOWN_CHARACTERS], judgements.get(document))
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
            )
        )
    return results


def _ids(ranking: Sequence[tuple[str, float]]) -> list[str]:
    return [document for document, _score in ranking]


def _notes(
    dataset: Dataset, arms: Sequence[PlannedArm], qualities: Qualities, num_cached: int, request: CompareRequest
) -> list[str]:
    notes = [*dataset.notes, "The search is exact: what the index of a vector database loses is not measured."]
    if len(dataset.queries) < MIN_QUERIES and dataset.judgements:
        notes.append(
            f"{len(dataset.queries)} queries are too few to tell models apart; at least {MIN_QUERIES} are needed."
        )
    judged = {
        name: sum(values.values()) / len(values)
        for name, quality in qualities.items()
        if (values := quality.get("Judged@10"))
    }
    if judged and max(judged.values()) - min(judged.values()) > 0.05:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in judged.items())
        notes.append(
            f"The arms differ in how many of their first ten documents were judged ({shares}). A document that nobody "
            "judged counts as irrelevant, so that the arm with fewer judged ones may look worse than it is."
        )
    notes += [
        f"{other.name.text} and {arm.name.text} are of one space: any difference is one of rounding."
        for index, arm in enumerate(arms)
        for other in arms[:index]
        if is_same_space(arm.space, other.space)
    ]
    if num_cached:
        notes.append(f"{num_cached:,} vectors were embedded by an earlier run, and read from {request.cache}.")
    if not request.measures_cost:
        notes.append("The cost was not measured.")
    return notes
