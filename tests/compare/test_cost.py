"""Every arm is measured on the same texts, in turns, and nothing that a gateway computes once is counted twice."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gateway.cli.client import EmbeddedTexts, GatewayClient
from gateway.compare import cost
from gateway.compare.arms import ArmName, PlannedArm, Side
from gateway.compare.cost import BATCHES, MIN_FOR_P95, QUERIES, CostRun, measure_costs, ratio_of
from gateway.compare.mixes import Mix
from gateway.compare.progress import Silent
from gateway.compare.results import Ratio
from gateway.precision import Precision
from gateway.types import Output
from tests.cli.cards import make_card

DOCUMENTS = [f"document {i}" for i in range(200)]
TEXTS = [f"query {i}" for i in range(50)]
TOKENS_A_TEXT = 3
FIRST_REQUEST_S = 60.0


def arm(name: str, model: str = "", dimensions: int = 8) -> PlannedArm:
    card = make_card(model or name)
    queries = Side("retrieval.query", "retrieval.query", "native", f"space of {name}")
    passages = Side("retrieval.passage", "retrieval.passage", "native", f"space of {name}")
    return PlannedArm(ArmName(name, model or name, dimensions), card, 8, dimensions, queries, passages)


class SteadyClient(GatewayClient):
    """Takes so many seconds per text for each model, but a minute for the first two requests; and keeps its requests.

    Args:
        noise: standard deviation of the logarithm of each time.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0, **seconds_a_text: float) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, str | None, int | None, str | None, list[str]]] = []
        self.outputs: defaultdict[str, set[tuple[Output, ...]]] = defaultdict(set)
        self._seconds_a_text = seconds_a_text
        self._noise = noise
        self._numbers: Counter[tuple[str, str | None]] = Counter()
        self._rng = np.random.default_rng(seed)

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        task: str | None = None,
        dimensions: int | None = None,
        expect_space: str | None = None,
        precision: Precision = Precision.FLOAT,
        outputs: Sequence[Output] = (Output.DENSE,),
    ) -> EmbeddedTexts:
        self.outputs[model].add(tuple(outputs))
        self.asked.append((model, task, dimensions, expect_space, list(texts)))
        self._numbers[model, task] += 1
        is_first = self._numbers[model, task] <= 2
        elapsed_s = FIRST_REQUEST_S if is_first else len(texts) * self._seconds_a_text[model]
        elapsed_s *= float(np.exp(self._noise * self._rng.normal()))
        self.now += elapsed_s
        vectors = np.zeros((len(texts), 8), np.float32)
        return EmbeddedTexts(vectors, "space", model, task, TOKENS_A_TEXT * len(texts), elapsed_s, is_experiment=False)

    def of(self, model: str, task: str | None) -> list[list[str]]:
        """Return the texts of each request for a model with a task."""
        return [request[4] for request in self.asked if request[:2] == (model, task)]

    async def measure(
        self,
        *arms: PlannedArm,
        queries: Sequence[str] = TEXTS,
        documents: Sequence[str] = DOCUMENTS,
        seed: int = 0,
        reporter: Silent | None = None,
    ) -> CostRun:
        return await measure_costs(self, arms, queries, documents, seed, reporter or Silent(), lambda: self.now)


@pytest.fixture
def client() -> SteadyClient:
    return SteadyClient(quick=0.001, slow=0.003)


def test_a_median_ratio_has_an_interval_of_two_ratios() -> None:
    """The second of nine values: fewer than two of nine are below the median in 2 % of samples."""
    ratio = ratio_of([1, 256, 2, 128, 64, 4, 16, 8, 32], [1] * 9, 0.05)
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((16, 2, 128))
    assert (ratio.num_pairs, ratio.is_shown) == (9, True)
    assert 2 * stats.binom.cdf(1, 9, 0.5) < 0.05 < 2 * stats.binom.cdf(2, 9, 0.5)


def test_five_pairs_have_no_interval() -> None:
    assert ratio_of([2.0] * 5, [1] * 5, 0.05) == Ratio(2, None, None, 5, is_shown=False)
    assert ratio_of([2.0] * 6, [1] * 6, 0.05) == Ratio(2, pytest.approx(2), pytest.approx(2), 6, is_shown=True)


def test_ratios_in_a_row_that_are_alike_count_as_fewer() -> None:
    rng = np.random.default_rng(0)
    alike = np.exp(np.repeat(rng.normal(size=20), 5))
    mixed = ratio_of(rng.permutation(alike), [1] * 100, 0.05)
    in_a_row = ratio_of(alike, [1] * 100, 0.05)
    assert mixed.ratio == in_a_row.ratio
    assert None not in {mixed.low, mixed.high, in_a_row.low, in_a_row.high}
    width = [np.log(ratio.high / ratio.low) for ratio in (mixed, in_a_row)]
    assert width[1] > 1.7 * width[0]
    two = ratio_of(np.exp(np.repeat([1.0, -1.0], [60, 40])), [1] * 100, 0.05)
    assert not two.is_shown, "these are two observations"


def test_differences_below_a_tenth_are_not_shown() -> None:
    for factor, is_shown in ((1.09, False), (1.11, True), (1 / 1.09, False), (1 / 1.11, True)):
        ratio = ratio_of([factor] * 100, [1] * 100, 0.05)
        assert (ratio.low, ratio.is_shown) == (pytest.approx(factor), is_shown)


async def test_some_requests_in_between_do_not_count(client: SteadyClient) -> None:
    """They interrupt the rhythm in which the workers of a model alternate."""
    found = await client.measure(arm("quick"), arm("slow"))
    counted = found.costs["quick"].num_queries + QUERIES.discarded
    for model in ("quick", "slow"):
        assert 1.05 * counted < len(client.of(model, "retrieval.query")) < 1.5 * counted


async def test_all_ratios_hold_at_once_in_95_of_100_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two arms has a ratio of single queries and one of batches: each may be wrong in a quarter of the 5 %."""
    levels: set[float] = set()

    def noted(ones: Sequence[float], others: Sequence[float], alpha: float) -> Ratio:
        levels.add(alpha)
        return ratio_of(ones, others, alpha)

    monkeypatch.setattr(cost, "ratio_of", noted)
    await SteadyClient(a=0.01, b=0.01, c=0.01).measure(arm("a"), arm("b"), arm("c"))

    assert levels == {0.05 / 4}


async def test_figures_leave_the_first_requests_out(client: SteadyClient) -> None:
    found = await client.measure(arm("quick"), arm("slow"))
    assert list(found.costs) == ["quick", "slow"]
    for name, seconds in (("quick", 0.001), ("slow", 0.003)):
        assert found.costs[name].texts_per_s == pytest.approx(1 / seconds)
        assert found.costs[name].tokens_per_s == pytest.approx(TOKENS_A_TEXT / seconds)
        assert found.costs[name].p50_s == pytest.approx(seconds)
        assert (found.costs[name].num_queries, found.costs[name].num_batches) == (QUERIES.least, BATCHES.least)
    (ratios,) = found.contrasts
    assert (ratios.arm, ratios.baseline, ratios.is_same_model) == ("slow", "quick", False)
    assert ratios.query_time == Ratio(
        pytest.approx(3), pytest.approx(3), pytest.approx(3), QUERIES.least, is_shown=True
    )
    assert ratios.texts_per_s is not None
    assert (ratios.texts_per_s.ratio, ratios.texts_per_s.is_shown) == (pytest.approx(1 / 3), True)


async def test_both_arms_get_the_same_texts_one_after_the_other(
    client: SteadyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_UNCOUNTED", 0)
    await client.measure(arm("quick"), arm("slow"))
    assert client.of("quick", "retrieval.query") == client.of("slow", "retrieval.query")
    assert client.of("quick", "retrieval.passage") == client.of("slow", "retrieval.passage")
    models = [request[0] for request in client.asked]
    assert all({*pair} == {"quick", "slow"} for pair in zip(models[::2], models[1::2], strict=True))
    # Each order is followed by its reverse, and which one comes first is drawn.
    fours = ["".join(model[0] for model in models[start : start + 4]) for start in range(0, len(models), 4)]
    assert {*fours} == {"qssq", "sqqs"}


async def test_noise_is_measured_until_the_ratio_is_known(client: SteadyClient) -> None:
    noisy = SteadyClient(noise=0.3, quick=0.001, slow=0.003)
    found = await noisy.measure(arm("quick"), arm("slow"))
    ratio = found.contrasts[0].query_time
    assert ratio is not None
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.num_pairs > 2 * QUERIES.least
    assert ratio.high / ratio.low < 1.1**2
    wild = SteadyClient(noise=3.0, quick=0.00001, slow=0.00001)
    found = await wild.measure(arm("quick"), arm("slow"))
    assert found.costs["quick"].num_queries == QUERIES.most
    assert found.costs["quick"].num_batches == BATCHES.most


async def test_slow_models_are_measured_for_a_limited_time() -> None:
    client = SteadyClient(noise=3.0, quick=0.5, slow=0.5)
    found = await client.measure(arm("quick"), arm("slow"))
    assert QUERIES.least <= found.costs["quick"].num_queries < QUERIES.most
    assert found.costs["quick"].num_batches == BATCHES.least


async def test_the_tail_of_few_requests_is_not_reported() -> None:
    few = await SteadyClient(quick=0.001, slow=0.003).measure(arm("quick"), arm("slow"))
    assert few.costs["quick"].p95_s is None
    many = await SteadyClient(noise=0.9, quick=0.001, slow=0.001).measure(arm("quick"), arm("slow"))
    assert many.costs["quick"].num_queries >= MIN_FOR_P95
    assert many.costs["quick"].p95_s == pytest.approx(0.001 * np.exp(0.9 * 1.64), rel=0.5)


async def test_one_model_in_two_sizes_is_measured_once(client: SteadyClient) -> None:
    found = await client.measure(arm("quick"), arm("quick@4", "quick", 4), arm("slow"))
    assert {request[2] for request in client.asked} == {8}
    assert found.costs["quick"] == found.costs["quick@4"]
    same, other = found.contrasts
    assert (same.arm, same.is_same_model, same.query_time, same.texts_per_s) == ("quick@4", True, None, None)
    assert not other.is_same_model
    against = await SteadyClient(quick=0.001, slow=0.003).measure(arm("slow"), arm("quick"), arm("quick@4", "quick", 4))
    assert against.contrasts[0].query_time == against.contrasts[1].query_time


async def test_a_model_alone_is_measured_as_often_as_its_tail_needs(client: SteadyClient) -> None:
    found = await client.measure(arm("quick"), arm("quick@4", "quick", 4))
    assert found.costs["quick"].num_queries == MIN_FOR_P95
    assert found.costs["quick"].p95_s == pytest.approx(0.001)


async def test_each_side_is_asked_as_it_is_embedded(client: SteadyClient) -> None:
    await client.measure(arm("quick@4", "quick", 4), arm("slow"))
    for model, task, dimensions, expect_space, texts in client.asked:
        assert (dimensions, expect_space) == ((4, "space of quick@4") if model == "quick" else (8, "space of slow"))
        assert task == ("retrieval.query" if texts[0].startswith("query") else "retrieval.passage")
        assert len(texts) in ({1} if task == "retrieval.query" else {1, 32})


async def test_an_arm_is_measured_with_the_outputs_that_it_ranks_by(client: SteadyClient) -> None:
    """Two arms of one model with different outputs are two measurements; only dense vectors have a size."""
    weights = replace(arm("quick+sparse", "quick", 0), mix=Mix((Output.SPARSE,)))
    found = await client.measure(arm("quick"), weights)
    assert not found.contrasts[0].is_same_model
    assert client.outputs["quick"] == {(Output.DENSE,), (Output.SPARSE,)}
    assert {request[2] for request in client.asked} == {8, None}


async def test_no_text_is_twice_in_a_batch(client: SteadyClient) -> None:
    """Not even if the data has it under several ids: the second request would cost nothing."""
    await client.measure(arm("quick"), arm("slow"), documents=DOCUMENTS[:40] * 10)
    for batch in client.of("quick", "retrieval.passage"):
        assert set(Counter(batch).values()) == {1}


async def test_one_document_and_one_query_are_enough(client: SteadyClient) -> None:
    found = await client.measure(arm("quick"), arm("slow"), queries=["q"], documents=["d"])
    assert all(texts == ["q"] for texts in client.of("quick", "retrieval.query"))
    assert all(texts == ["d"] for texts in client.of("quick", "retrieval.passage"))
    assert found.costs["slow"].texts_per_s == pytest.approx(1 / 0.003)


async def test_the_seed_draws_the_texts(client: SteadyClient) -> None:
    asked = []
    for seed in (0, 0, 1):
        client.asked.clear()
        await client.measure(arm("quick"), arm("slow"), seed=seed)
        asked.append(client.of("quick", "retrieval.query"))
    assert asked[0] == asked[1] != asked[2]


async def test_progress_ends_when_the_measurement_does(client: SteadyClient) -> None:
    class Counting(Silent):
        total = done = 0

        def step(self, what: str, total: int) -> Counting:
            self.total = total
            return self

        def advance(self, number: int) -> None:
            self.done += number

    counting = Counting()
    await client.measure(arm("quick"), arm("slow"), reporter=counting)
    assert counting.done == counting.total == QUERIES.most + BATCHES.most


def test_one_model_against_itself_is_rarely_different() -> None:
    """Both ratios of a comparison together: 5 % of 150 are 8, and 14 would occur in 2 % of such tests."""

    async def is_different(seed: int) -> bool:
        client = SteadyClient(noise=0.5, seed=seed, one=0.001, other=0.001)
        (found,) = (await client.measure(arm("one"), arm("other"), seed=seed)).contrasts
        return any(ratio is not None and ratio.is_shown for ratio in (found.query_time, found.texts_per_s))

    async def count() -> int:
        return sum([await is_different(seed) for seed in range(150)])

    assert asyncio.run(count()) <= 13
