"""The cost of the arms, measured in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gateway.cli.client import EmbeddedTexts, GatewayClient
from gateway.compare.arms import PlannedArm, Side
from gateway.compare.progress import Reporter
from gateway.compare.results import Cost

_NUM_ROUNDS = 5
_BATCH = 32
_BATCHES_A_ROUND = 2
_QUERIES_A_ROUND = 20


@dataclass(slots=True)
class _Measured:
    texts_per_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def cost(self) -> Cost:
        return Cost(
            texts_per_s=statistics.median(self.texts_per_s),
            tokens_per_s=statistics.median(self.tokens_per_s),
            p50_s=float(np.quantile(self.latencies_s, 0.5)),
            p95_s=float(np.quantile(self.latencies_s, 0.95)),
        )


async def measure_costs(
    client: GatewayClient,
    arms: Sequence[PlannedArm],
    queries: Sequence[str],
    documents: Sequence[str],
    seed: int,
    reporter: Reporter,
) -> Mapping[str, Cost]:
    """Measure every arm on the same sample: A B, B A, A B, …; medians over the rounds.

    A round sends two batches of 32 documents at once, which keeps a model busy, and then single queries, one after the
    other. The first requests of each arm are not counted.
    """
    chosen = random.Random(seed)  # noqa: S311  a sample, not a secret
    # Without duplicates, since a gateway computes equal texts only once.
    queries, documents = list(dict.fromkeys(queries)), list(dict.fromkeys(documents))
    measured = {arm.name.text: _Measured() for arm in arms}
    step = reporter.step("cost, in turns", _NUM_ROUNDS * len(arms))
    for number in range(-1, _NUM_ROUNDS):
        drawn = chosen.sample(documents, min(len(documents), _BATCH * _BATCHES_A_ROUND))
        passages = [drawn[start : start + _BATCH] for start in range(0, len(drawn), _BATCH)]
        asked = chosen.sample(queries, min(len(queries), _QUERIES_A_ROUND))
        for arm in arms if number % 2 == 0 else [*reversed(arms)]:
            if number < 0:
                await _embed(client, arm, arm.passages, passages[0])
                await _embed(client, arm, arm.queries, asked[:1])
                continue
            await _measure_round(client, arm, passages, asked, measured[arm.name.text])
            step.advance(1)
    return {name: one.cost() for name, one in measured.items()}


async def _measure_round(
    client: GatewayClient,
    arm: PlannedArm,
    passages: Sequence[Sequence[str]],
    queries: Sequence[str],
    measured: _Measured,
) -> None:
    started = time.monotonic()
    answers = await asyncio.gather(*(_embed(client, arm, arm.passages, batch) for batch in passages))
    elapsed_s = time.monotonic() - started
    measured.texts_per_s.append(sum(map(len, passages)) / elapsed_s)
    measured.tokens_per_s.append(sum(answer.num_tokens for answer in answers) / elapsed_s)
    for query in queries:
        measured.latencies_s.append((await _embed(client, arm, arm.queries, [query])).elapsed_s)


async def _embed(client: GatewayClient, arm: PlannedArm, side: Side, texts: Sequence[str]) -> EmbeddedTexts:
    return await client.embed(
        arm.name.model,
        texts,
        side.asked_task,
        arm.dimensions,
        expect_space=side.space,
        precision=arm.asked_precision,
    )
