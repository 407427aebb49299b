"""Compare arms on a data set: plan, embed, search, judge, measure the cost."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gateway import __version__
from gateway.cli.client import GatewayClient
from gateway.compare.agreement import overlap, rank_biased_overlap, same_first
from gateway.compare.arms import PlannedArm, parse_arms, plan_arm
from gateway.compare.cache import VectorCache
from gateway.compare.cost import measure_costs
from gateway.compare.dataset import Dataset
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
    """The arms and the data of a comparison.

    Attributes:
        arms: as written on the command line, such as ``MODEL@DIMENSIONS:PRECISION``; the first is the baseline.
        split: of the judgments; ``None`` for the only one, or ``test``.
        cache: folder of the vectors of earlier runs.
        num_resamples: of the bootstrap and of the randomization test.
    """

    arms: Sequence[str]
    data: Path
    cache: Path
    num_resamples: int
    measures_cost: bool
    split: str | None = None
    max_documents: int | None = None
    seed: int = 0


async def compare(
    request: CompareRequest, dataset: Dataset, client: GatewayClient, reporter: Reporter
) -> tuple[Comparison, Mapping[str, Ranking]]:
    """Compare the arms of a request; return the comparison, and the whole ranking of each query by arm.

    Args:
        dataset: of the request. The caller reads it, so that its errors appear before models load.

    Raises:
        CompareError: an arm cannot be compared.
        StartError: the gateway does not answer.
    """
    names = parse_arms(request.arms)
    arms = [await plan_arm(client, name) for name in names]
    with VectorCache(request.cache) as cache:
        rankings = {arm.name.text: await _rank(client, arm, dataset, cache, reporter) for arm in arms}
    costs: Mapping[str, Cost] = {}
    if request.measures_cost:
        texts = list(dataset.queries.values()), list(dataset.documents.values())
        costs = await measure_costs(client, arms, *texts, request.seed, reporter)
    qualities = {name: measure(ranking, dataset.judgments) for name, ranking in rankings.items()}
    contrasts = _contrasts(qualities, request)
    comparison = Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=client.source,
        dataset=dataset.summary(),
        seed=request.seed,
        num_resamples=request.num_resamples,
        versions={"gateway": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        notes=_notes(dataset, arms, qualities, cache, request),
        arms=[_arm(arm, qualities, costs, request) for arm in arms],
        contrasts=contrasts,
        agreements=[_agreement(name, names[0].text, rankings, request) for name in list(rankings)[1:]],
        queries=_queries(dataset, rankings, qualities),
    )
    return comparison, rankings


async def _rank(
    client: GatewayClient, arm: PlannedArm, dataset: Dataset, cache: VectorCache, reporter: Reporter
) -> Ranking:
    """Embed both sides, and search."""
    texts = list(dataset.documents.values())
    documents = await embed_side(client, arm, arm.passages, texts, cache, reporter, "documents")
    texts = list(dataset.queries.values())
    queries = await embed_side(client, arm, arm.queries, texts, cache, reporter, "queries")
    ids = list(dataset.documents)
    places = {document: place for place, document in enumerate(ids)}
    indices, scores = search(queries, documents, _DEPTH, [places.get(query) for query in dataset.queries])
    return make_ranking(list(dataset.queries), ids, indices, scores)


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
        bytes_per_vector=arm.bytes_per_vector,
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
            )
        )
    return results


def _ids(ranking: Sequence[tuple[str, float]]) -> list[str]:
    return [document for document, _score in ranking]


def _notes(
    dataset: Dataset, arms: Sequence[PlannedArm], qualities: Qualities, cache: VectorCache, request: CompareRequest
) -> list[str]:
    notes = [*dataset.notes, "The search is exact: the loss from the index of a vector database is not measured."]
    if len(dataset.queries) < MIN_QUERIES and dataset.judgments:
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
            f"The arms differ in how many of their first ten documents were judged ({shares}). A document without "
            "judgment counts as irrelevant, so an arm with fewer judged documents may look worse than it is."
        )
    notes += [
        _note_of_space(other, arm) for i, arm in enumerate(arms) for other in arms[:i] if _share_space(arm, other)
    ]
    notes += [
        f"{arm.name.text} has an instruction for queries but not for documents, so the gateway gives them two spaces: "
        f"{arm.queries.space} and {arm.passages.space}."
        for arm in arms
        if not is_same_space(arm.queries.space, arm.passages.space)
    ]
    if any(arm.is_quantized for arm in arms):
        notes.append(
            "int8 and uint8 vectors are compared by the dot product of their integers, binary ones by their Hamming "
            "distance, without another pass over float vectors."
        )
    if cache.num_reused:
        notes.append(f"{cache.num_reused:,} vectors were embedded by an earlier run, and read from {cache.folder}.")
    if not request.measures_cost:
        notes.append("The cost was not measured.")
    return notes


def _share_space(arm: PlannedArm, other: PlannedArm) -> bool:
    has_one_precision = arm.precision is other.precision
    is_one_space = is_same_space(arm.space, other.space) and is_same_space(arm.passages.space, other.passages.space)
    return has_one_precision and is_one_space


def _note_of_space(one: PlannedArm, other: PlannedArm) -> str:
    """Return a note on two arms of one space: they may still differ in their tasks."""
    names = f"{one.name.text} and {other.name.text}"
    if (one.queries.task, one.passages.task) == (other.queries.task, other.passages.task):
        return f"{names} are of one space: any difference is one of rounding."
    return f"{names} are of one space, and differ in the tasks that queries or documents are embedded with."
