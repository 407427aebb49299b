"""Every arm is measured on the same texts, in turns, and nothing that a gateway computes once is counted twice."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gateway.cli.client import EmbeddedTexts, GatewayClient
from gateway.compare import cost
from gateway.compare.arms import ArmName, PlannedArm, Side
from gateway.compare.cost import measure_costs
from gateway.compare.progress import Silent
from gateway.precision import Precision
from tests.cli.cards import make_card

DOCUMENTS = [f"document {i}" for i in range(200)]
QUERIES = [f"query {i}" for i in range(50)]
TOKENS_A_TEXT = 3
FIRST_REQUEST_S = 60.0


def arm(name: str, model: str = "", dimensions: int = 8) -> PlannedArm:
    card = make_card(model or name)
    queries = Side("retrieval.query", "retrieval.query", "native", f"space of {name}")
    passages = Side("retrieval.passage", "retrieval.passage", "native", f"space of {name}")
    return PlannedArm(ArmName(name, model or name, dimensions), card, 8, dimensions, queries, passages)


class SteadyClient(GatewayClient):
    """Takes so many seconds a text for each model, but a minute for the first two requests; and keeps what it is asked."""

    def __init__(self, **seconds_a_text: float) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, str | None, int | None, str | None, list[str]]] = []
        self._seconds_a_text = seconds_a_text

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        task: str | None = None,
        dimensions: int | None = None,
        expect_space: str | None = None,
        precision: Precision = Precision.FLOAT,
    ) -> EmbeddedTexts:
        self.asked.append((model, task, dimensions, expect_space, list(texts)))
        is_first = len(self.of(model)) <= 2
        elapsed_s = FIRST_REQUEST_S if is_first else len(texts) * self._seconds_a_text[model]
        self.now += elapsed_s
        vectors = np.zeros((len(texts), 8), np.float32)
        return EmbeddedTexts(vectors, "space", model, task, TOKENS_A_TEXT * len(texts), elapsed_s, is_experiment=False)

    def of(self, model: str) -> list[list[str]]:
        """Return the texts of each request for a model."""
        return [request[4] for request in self.asked if request[0] == model]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> SteadyClient:
    client = SteadyClient(quick=0.01, slow=0.03)
    monkeypatch.setattr(cost, "time", types.SimpleNamespace(monotonic=lambda: client.now))
    return client


async def test_figures_leave_the_first_requests_out(client: SteadyClient) -> None:
    costs = await measure_costs(client, [arm("quick"), arm("slow")], QUERIES, DOCUMENTS, 0, Silent())
    assert list(costs) == ["quick", "slow"]
    for name, seconds in (("quick", 0.01), ("slow", 0.03)):
        assert costs[name].texts_per_s == pytest.approx(1 / seconds)
        assert costs[name].tokens_per_s == pytest.approx(TOKENS_A_TEXT / seconds)
        assert costs[name].p50_s == pytest.approx(seconds)
        assert costs[name].p95_s == pytest.approx(seconds)


async def test_both_arms_are_asked_the_same_in_turns(client: SteadyClient) -> None:
    await measure_costs(client, [arm("quick"), arm("slow")], QUERIES, DOCUMENTS, 0, Silent())
    assert client.of("quick") == client.of("slow")
    firsts = [model for model, task, *_ in client.asked if task == "retrieval.passage"][2:]
    # A round is two batches of passages.
    assert firsts == ["quick"] * 2 + ["slow"] * 4 + ["quick"] * 4 + ["slow"] * 4 + ["quick"] * 4 + ["slow"] * 2


async def test_latencies_are_those_of_the_queries(client: SteadyClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 queries, each slower than the one before; 20 of them are drawn each round."""
    taken: list[float] = []
    embed = client.embed

    async def slower_and_slower(
        model: str, texts: Sequence[str], task: str | None, *args: Any, **more: Any
    ) -> EmbeddedTexts:
        answer = await embed(model, texts, task, *args, **more)
        if task == "retrieval.query":
            taken.append(0.01 * (len(taken) + 1))
            return replace(answer, elapsed_s=taken[-1])
        return answer

    monkeypatch.setattr(client, "embed", slower_and_slower)
    costs = await measure_costs(client, [arm("quick")], QUERIES, DOCUMENTS, 0, Silent())
    assert len(taken) == 1 + 5 * 20
    assert costs["quick"].p50_s == pytest.approx(np.median(taken[1:]))
    assert costs["quick"].p95_s == pytest.approx(np.quantile(taken[1:], 0.95))


async def test_each_side_is_asked_as_it_is_embedded(client: SteadyClient) -> None:
    await measure_costs(client, [arm("quick@4", "quick", 4), arm("slow")], QUERIES, DOCUMENTS, 0, Silent())
    for model, task, dimensions, expect_space, texts in client.asked:
        assert (dimensions, expect_space) == ((4, "space of quick@4") if model == "quick" else (8, "space of slow"))
        assert task == ("retrieval.query" if texts[0].startswith("query") else "retrieval.passage")
        assert len(texts) == (1 if task == "retrieval.query" else 32)


async def test_no_text_is_asked_twice_in_a_round(client: SteadyClient) -> None:
    """Not even where the data has it under several ids: the second one would cost nothing."""
    documents, queries = DOCUMENTS[:40] * 10, QUERIES[:10] * 10
    await measure_costs(client, [arm("quick"), arm("slow")], queries, documents, 0, Silent())
    texts = [text for batch in client.of("quick")[2:] for text in batch]
    assert Counter(texts) == dict.fromkeys([*documents[:40], *queries[:10]], 5)


async def test_one_document_and_one_query_are_enough(client: SteadyClient) -> None:
    costs = await measure_costs(client, [arm("quick"), arm("slow")], ["q"], ["d"], 0, Silent())
    assert client.of("quick") == [["d"], ["q"]] * 6
    assert costs["slow"].texts_per_s == pytest.approx(1 / 0.03)


async def test_the_seed_draws_the_texts(client: SteadyClient) -> None:
    asked = []
    for seed in (0, 0, 1):
        client.asked.clear()
        await measure_costs(client, [arm("quick"), arm("slow")], QUERIES, DOCUMENTS, seed, Silent())
        asked.append(client.of("quick"))
    assert asked[0] == asked[1] != asked[2]


async def test_progress_counts_every_round_of_every_arm(client: SteadyClient) -> None:
    class Counting(Silent):
        total = done = 0

        def step(self, what: str, total: int) -> Counting:
            self.total = total
            return self

        def advance(self, number: int) -> None:
            self.done += number

    counting = Counting()
    await measure_costs(client, [arm("quick"), arm("slow")], QUERIES, DOCUMENTS, 0, counting)
    assert counting.done == counting.total == 10
