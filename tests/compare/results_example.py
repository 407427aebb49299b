"""Example comparisons of a small synthetic support corpus: rankings from a seed, and figures computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.compare.bottom_line import decide
from gateway.compare.results import (
    MEASURES,
    Agreement,
    Arm,
    Comparison,
    Contrast,
    Cost,
    CostContrast,
    DatasetSummary,
    Estimate,
    Hit,
    Load,
    QueryResult,
    Ratio,
)
from gateway.compare.statistics import Design, contrast, with_verdicts

POOL = 40

THINGS = [
    "router", "invoice", "two-factor login", "e-mail archive", "parental controls", "VPN profile", "roaming package",
    "SIM card", "voicemail greeting", "direct debit", "fibre connection", "set-top box", "mesh repeater", "contract",
]  # fmt: skip
QUESTIONS = [
    "How do I reset my {}?", "{} stopped working after the update", "cancel {} before the end of the year",
    "Where can I see the status of my {}?", "what does error E-1704 mean for the {}", "move the {} to another address",
    "Wie richte ich {} neu ein?", "is a second {} included in the price", "كيف أغير إعدادات {}؟",
]  # fmt: skip
ANSWERS = [
    "To reset your {}, hold the button at the back for ten seconds until the light turns white, then wait two minutes.",
    "Changes to your {} take effect on the first day of the next month. You receive a confirmation by e-mail.",
    "If the {} reports E-1704, the line was interrupted during an update. Unplug it, wait, and start the update again.",
    "You can move your {} online under Account, Services, Move. We need the new address and the date of the move.",
    "A second {} is not part of the basic tariff. It costs a monthly fee, and can be canceled at any time.",
    "{}: bedienung, Ersteinrichtung und Zurücksetzen auf die Werkseinstellungen. Halten Sie die Taste gedrückt.",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Likeness:
    """An arm of the example: its quality and its cost."""

    name: str
    skill: float
    noise: float
    width: int
    p50_s: float
    texts_per_s: float
    blur: float = 0
    """Noise in addition to the model's own: the loss when its vectors are cut."""

    @property
    def model(self) -> str:
        """The name without the size that it was cut to."""
        return self.name.partition("@")[0]


JINA = Likeness("jina-embeddings-v3", skill=0.16, noise=0.10, width=1024, p50_s=0.0231, texts_per_s=74.6)
BGE = Likeness("bge-m3", skill=0.19, noise=0.1, width=1024, p50_s=0.0198, texts_per_s=96.2)
JINA_CUT = Likeness(
    "jina-embeddings-v3@256", skill=0.16, noise=0.10, width=256, p50_s=0.0229, texts_per_s=75.1, blur=0.02
)
MINILM = Likeness("all-minilm-l6-v2", skill=0.12, noise=0.11, width=384, p50_s=0.0031, texts_per_s=1180.0)


def make_comparison(
    *likenesses: Likeness,
    num_queries: int = 200,
    has_judgments: bool = True,
    has_cost: bool = True,
    seed: int = 7,
) -> Comparison:
    """Make a comparison of ``likenesses``; arms that rank alike get the very same rankings."""
    likenesses = likenesses or (JINA, BGE, JINA_CUT)
    names = [one.name for one in likenesses]
    queries = [_make_query(number, likenesses, seed, has_judgments=has_judgments) for number in range(num_queries)]
    dataset = DatasetSummary(
        folder="/home/ada/support-faq",
        split="test" if has_judgments else None,
        sha256="9f2c4b1e" * 8,
        num_documents=5183,
        num_queries=num_queries,
        num_judgments=3 * num_queries if has_judgments else 0,
        num_unjudged_queries=12 if has_judgments else 0,
        num_groups=num_queries,
    )
    arms = [_make_arm(one, queries, has_cost=has_cost) for one in likenesses]
    contrasts = _contrasts(names, queries) if has_judgments else []
    costs = [_cost_contrast(one, likenesses[0]) for one in likenesses[1:]] if has_cost else []
    return Comparison(
        created="2026-11-23T16:40:12Z",
        source="in process",
        dataset=dataset,
        seed=seed,
        num_resamples=100_000,
        margin=0.01,
        versions={"gateway": "0.3.0", "ir-measures": "0.4.3", "numpy": "1.26.4", "torch": "2.13.0"},
        notes=["12 queries were left out: no judgment names them."] if has_judgments else [],
        arms=arms,
        bottom_line=decide(arms, contrasts, costs, 0.01),
        contrasts=contrasts,
        cost_contrasts=costs,
        load=Load(0.4, 1.6, 16) if has_cost else None,
        agreements=[_agreement(name, names[0], queries) for name in names[1:]],
        queries=queries,
    )


def _make_query(number: int, likenesses: Sequence[Likeness], seed: int, *, has_judgments: bool) -> QueryResult:
    rng = np.random.default_rng((seed, number))
    thing, question = THINGS[rng.integers(len(THINGS))], QUESTIONS[rng.integers(len(QUESTIONS))]
    pool = rng.choice(5183, POOL, replace=False)
    relevance = np.zeros(POOL, dtype=int)
    relevance[: rng.integers(1, 4)] = 1
    relevance[0] = 2
    is_judged = (relevance > 0) | (rng.random(POOL) < 0.3)
    shared = rng.normal(0.55, 0.09, POOL)
    orders = {}
    for one in likenesses:
        own = np.random.default_rng((seed, number, *one.model.encode()))
        noise = own.normal(0, one.noise, POOL) + own.normal(0, one.blur, POOL)
        scores = shared + one.skill * relevance + noise
        orders[one.name] = [(int(place), float(scores[place])) for place in np.argsort(-scores)]

    def hit(place: int, score: float) -> Hit:
        document = int(pool[place])
        text = ANSWERS[document % len(ANSWERS)].format(thing if relevance[place] else THINGS[document % len(THINGS)])
        judged = int(relevance[place]) if has_judgments and is_judged[place] else None
        return Hit(f"faq/{document:04d}", round(min(score, 0.99), 4), text, judged)

    first, *others = (one.name for one in likenesses)
    tops = {name: [place for place, _ in order[:10]] for name, order in orders.items()}
    return QueryResult(
        id=f"q{number:05d}",
        text=question.format(thing),
        rankings={name: [hit(*pair) for pair in order[:10]] for name, order in orders.items()},
        quality={name: _quality([place for place, _ in order], relevance, is_judged) for name, order in orders.items()}
        if has_judgments
        else {},
        overlap={name: len({*tops[name]} & {*tops[first]}) / 10 for name in others},
        rbo={name: _rbo(tops[name], tops[first]) for name in others},
    )


def _quality(
    order: Sequence[int], relevance: npt.NDArray[np.int_], is_judged: npt.NDArray[np.bool_]
) -> Mapping[str, float]:
    gains = relevance[list(order)]
    ideal = np.sort(relevance)[::-1]
    discount = 1 / np.log2(np.arange(2, 12))
    first = int(np.flatnonzero(gains)[0])
    values = (
        (gains[:10] @ discount) / (ideal[:10] @ discount),
        (gains[:10] > 0).sum() / (gains > 0).sum(),
        (gains[:30] > 0).sum() / (gains > 0).sum(),
        1 / (first + 1) if first < 10 else 0,
        first == 0,
        is_judged[list(order[:10])].mean(),
    )
    return {measure: float(value) for measure, value in zip(MEASURES, values, strict=True)}


def _rbo(one: Sequence[int], other: Sequence[int], p: float = 0.9) -> float:
    agreement = [len({*one[:depth]} & {*other[:depth]}) / depth for depth in range(1, 11)]
    return float((1 - p) * sum(p**index * value for index, value in enumerate(agreement)) + p**10 * agreement[-1])


def _estimate(values: Sequence[float]) -> Estimate:
    mean = float(np.mean(values))
    if max(values) - min(values) < 1e-9:
        return Estimate(mean, None, None)
    margin = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return Estimate(mean, mean - margin, mean + margin)


def _make_arm(one: Likeness, queries: Sequence[QueryResult], *, has_cost: bool) -> Arm:
    has_tasks = one.model == JINA.model
    return Arm(
        name=one.name,
        model=one.model,
        space=f"{one.model}@{hash_like(one.name)}",
        dimensions=one.width,
        bytes_per_document=4 * one.width,
        device="cuda:0",
        dtype="bfloat16",
        query_task="retrieval.query" if has_tasks else None,
        passage_task="retrieval.passage" if has_tasks else None,
        quality={
            measure: _estimate([query.quality[one.name][measure] for query in queries])
            for measure in (MEASURES if queries[0].quality else ())
        },
        cost=Cost(one.texts_per_s, 83 * one.texts_per_s, one.p50_s, 1.6 * one.p50_s, 180, 30) if has_cost else None,
    )


def _cost_contrast(one: Likeness, baseline: Likeness) -> CostContrast:
    if one.model == baseline.model:
        return CostContrast(one.name, baseline.name, is_same_model=True, query_time=None, texts_per_s=None)
    time, rate = one.p50_s / baseline.p50_s, one.texts_per_s / baseline.texts_per_s
    return CostContrast(
        one.name,
        baseline.name,
        is_same_model=False,
        query_time=Ratio(time, 0.93 * time, 1.07 * time, 180, is_shown=True),
        texts_per_s=Ratio(rate, 0.93 * rate, 1.07 * rate, 30, is_shown=True),
    )


def hash_like(name: str) -> str:
    """Return twelve hex digits that differ between names."""
    return f"{int.from_bytes(name.encode()) % 16**12:012x}"


def _contrasts(names: Sequence[str], queries: Sequence[QueryResult]) -> list[Contrast]:
    design = Design(num_resamples=2_000, num_arms=len(names) - 1)

    def values(name: str, measure: str) -> Mapping[str, float]:
        return {query.id: query.quality[name][measure] for query in queries}

    found = {
        measure: with_verdicts(
            [
                contrast(name, names[0], measure, values(name, measure), values(names[0], measure), design)
                for name in names[1:]
            ],
            0.01,
        )
        for measure in MEASURES
    }
    return [one for name in names[1:] for contrasts in found.values() for one in contrasts if one.arm == name]


def _agreement(arm: str, baseline: str, queries: Sequence[QueryResult]) -> Agreement:
    return Agreement(
        arm,
        baseline,
        overlap=_estimate([query.overlap[arm] for query in queries]),
        rbo=_estimate([query.rbo[arm] for query in queries]),
        same_first=_estimate(
            [query.rankings[arm][0].document == query.rankings[baseline][0].document for query in queries]
        ),
    )
