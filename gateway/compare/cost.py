"""The cost of the arms: single requests in turns, and the ratio of their times with an interval.

The speed of a machine that does other work changes from one second to the next. Measured in consecutive blocks, a model
seemed up to 1.6 times as fast as itself. So every text is sent to all arms in succession, and only the ratios of such
requests are compared. Measuring a model against itself on a busy machine showed two more effects:

- Consecutive ratios are similar. Requests alternate between the workers of a model, whose cores are not equally busy. Some
  uncounted requests break the rhythm, and the interval is widened for the remaining effect.
- One process ran one of two equal models 7 % faster throughout its life, perhaps because of the weights' place in memory.
  So only a difference beyond 10 % is shown.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from gateway.cli.client import EmbeddedTexts, GatewayClient
from gateway.compare.arms import PlannedArm, Side
from gateway.compare.likelihood import Floats
from gateway.compare.progress import Reporter, Step
from gateway.compare.results import Cost, CostContrast, Load, Ratio
from gateway.compare.statistics import ALPHA

BATCH = 32
MIN_FOR_P95 = 100
"""With fewer requests, the 95th percentile depends on a handful of them."""

_BALANCED = 2  # an order, and its reverse
_CHECK_EVERY = 10
_NARROW = math.log(1.1)
_SAME = math.log(1.1)
_UNCOUNTED = 0.25  # requests in between, per request that counts
_MOST_LAGS = 10


@dataclass(frozen=True, slots=True)
class Effort:
    """The amount of measuring for one kind of request.

    Attributes:
        discarded: number of rounds before the counted ones; a round is one request to each arm.
        least: minimum number of rounds.
        most: maximum number of rounds, even if the interval is still wide.
        seconds: the time after which measuring ends, once ``least`` rounds are done.
    """

    discarded: int
    least: int
    most: int
    seconds: float


QUERIES = Effort(discarded=10, least=60, most=400, seconds=40.0)
BATCHES = Effort(discarded=2, least=20, most=100, seconds=20.0)


@dataclass(frozen=True, slots=True)
class CostRun:
    """The costs of all arms.

    Attributes:
        costs: the cost by arm, without the arms in ``cached``.
        contrasts: the contrast of each arm except the baseline.
        load: load of the client's machine, which also runs the models if they are in this process.
        cached: the arms whose texts the gateway read from its cache, so that the times are not those of their models.
    """

    costs: Mapping[str, Cost]
    contrasts: Sequence[CostContrast]
    load: Load | None
    cached: Sequence[str] = ()


@dataclass(slots=True)
class _Series:
    """The requests of one arm, in the same rounds as those of all arms.

    Attributes:
        seconds: the time of each request.
        num_tokens: the number of tokens of each request.
        is_cached: whether the gateway read any of the texts from its cache.
    """

    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    is_cached: bool = False


async def measure_costs(
    client: GatewayClient,
    arms: Sequence[PlannedArm],
    queries: Sequence[str],
    documents: Sequence[str],
    seed: int,
    reporter: Reporter,
    clock: Callable[[], float] = time.monotonic,
) -> CostRun:
    """Measure single queries and batches of documents on all arms in turns, until the ratios are known within 10 %.

    Arms with the same model, device, tasks and outputs are measured once, because they differ only in the size of the
        vectors.
    """
    rng = random.Random(seed)  # noqa: S311  a sample, not a secret
    # Remove duplicates, because a gateway computes equal texts only once.
    queries, documents = list(dict.fromkeys(queries)), list(dict.fromkeys(documents))
    same_as: dict[str, str] = {}
    measured: dict[tuple[object, ...], PlannedArm] = {}
    for arm in arms:
        key = (arm.card.id, arm.card.device, arm.queries.task, arm.passages.task, frozenset(arm.mix.outputs))
        same_as[arm.name.text] = measured.setdefault(key, arm).name.text
    turns = _Turns(client, list(measured.values()), rng, clock)
    step = reporter.step("cost, in turns", QUERIES.most + BATCHES.most)
    before = _load()
    single = await turns.measure(lambda: rng.sample(queries, 1), lambda arm: arm.queries, QUERIES, step)
    batched = await turns.measure(
        lambda: rng.sample(documents, min(BATCH, len(documents))), lambda arm: arm.passages, BATCHES, step
    )
    after = _load()
    num_texts = min(BATCH, len(documents))
    costs = {
        name: _cost(single[name], batched[name], num_texts)
        for name in single
        if not (single[name].is_cached or batched[name].is_cached)
    }
    baseline = arms[0].name.text
    return CostRun(
        costs={name: costs[same] for name, same in same_as.items() if same in costs},
        contrasts=[
            _contrast(name, baseline, same_as[name], single, batched, turns.alpha)
            if {baseline, same_as[name]} <= costs.keys()
            else CostContrast(name, baseline, same_as[name] == baseline, None, None)
            for name in list(same_as)[1:]
        ],
        load=Load(before, after, os.cpu_count() or 1) if before is not None and after is not None else None,
        cached=[name for name, same in same_as.items() if same not in costs],
    )


class _Turns:
    """Sends the same texts to all arms, one request at a time.

    Attributes:
        alpha: one minus the level of each ratio's interval, so that all intervals hold at once in 95 % of comparisons
            (Bonferroni).
    """

    def __init__(
        self, client: GatewayClient, arms: Sequence[PlannedArm], rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._arms = arms
        self._rng = rng
        self._clock = clock
        self.alpha = ALPHA / max(1, 2 * (len(arms) - 1))  # of single queries, and of batches

    async def measure(
        self, draw: Callable[[], Sequence[str]], side: Callable[[PlannedArm], Side], effort: Effort, step: Step
    ) -> dict[str, _Series]:
        """Measure rounds of one request per arm until all ratios to the first arm are known well enough."""
        series = {arm.name.text: _Series() for arm in self._arms}
        number = 0
        deadline = math.inf
        for number, order in enumerate(self._orders(), start=1 - effort.discarded):
            if number == 1:
                deadline = self._clock() + effort.seconds
            texts = draw()
            for arm in order:
                if self._rng.random() < _UNCOUNTED and len(order) > 1:
                    await self._embed(arm, side(arm), draw()[:1])
                answer = await self._embed(arm, side(arm), texts)
                if number > 0:
                    series[arm.name.text].seconds.append(answer.elapsed_s)
                    series[arm.name.text].num_tokens.append(answer.num_tokens)
                    series[arm.name.text].is_cached |= answer.num_cached > 0
            if number > 0:
                step.advance(1)
            if number >= effort.least and (
                number >= effort.most
                or self._clock() > deadline
                or (number % _CHECK_EVERY == 0 and self._are_narrow(list(series.values()), effort))
            ):
                break
        step.advance(effort.most - number)
        return series

    def _orders(self) -> Iterator[Sequence[PlannedArm]]:
        """Yield orders of the arms: each is drawn at random, then reversed, so that all arms are first equally often."""
        while True:
            order = self._rng.sample(self._arms, len(self._arms))
            yield order
            yield order[::-1]

    def _are_narrow(self, series: Sequence[_Series], effort: Effort) -> bool:
        baseline, *others = series
        if not others:
            return len(baseline.seconds) >= min(MIN_FOR_P95, effort.most)
        ratios = [ratio_of(other.seconds, baseline.seconds, self.alpha) for other in others]
        return all(
            ratio.low is not None and ratio.high is not None and math.log(ratio.high / ratio.low) / 2 < _NARROW
            for ratio in ratios
        )

    async def _embed(self, arm: PlannedArm, side: Side, texts: Sequence[str]) -> EmbeddedTexts:
        return await self._client.embed(
            arm.name.model,
            texts,
            side.asked_task,
            arm.asked_dimensions,
            expect_space=side.space,
            precision=arm.asked_precision,
            outputs=arm.mix.outputs,
        )


def ratio_of(values: Sequence[float], references: Sequence[float], alpha: float) -> Ratio:
    """Return the median ratio of paired times, with the interval between two of the sorted ratios.

    That interval holds for the median of any distribution (David & Nagaraja 2003, Order Statistics, 7.1). Similar
    consecutive ratios count as fewer independent ratios.

    Args:
        alpha: one minus the level of the interval.
    """
    logs = np.log(np.asarray(values) / np.asarray(references))
    ordered = np.sort(logs)
    ratio = math.exp(float(np.median(logs)))
    rank = _rank(logs, alpha)
    if rank < 1:
        return Ratio(ratio, None, None, logs.size, is_shown=False)
    low, high = float(ordered[rank - 1]), float(ordered[-rank])
    return Ratio(ratio, math.exp(low), math.exp(high), logs.size, is_shown=low > _SAME or high < -_SAME)


def _rank(logs: Floats, alpha: float) -> int:
    """Return the rank, from 1, of the sorted value that is the lower end of the median's interval."""
    rank = int(stats.binom.ppf(alpha / 2, logs.size, 0.5))
    lags = min(_MOST_LAGS, logs.size // 4)
    inflation = _inflation(np.sign(logs - np.median(logs)), lags)
    if inflation <= 1:
        return rank
    quantile = float(stats.t.ppf(1 - alpha / 2, logs.size / lags))
    return min(rank, math.floor((logs.size - quantile * math.sqrt(logs.size * inflation)) / 2))


def _inflation(signs: Floats, lags: int) -> float:
    """Return the ratio of the variance of a mean to that of independent values (Newey & West 1987)."""
    total = float(signs @ signs)
    if not total:
        return 1.0
    return 1 + 2 * sum((1 - lag / (lags + 1)) * float(signs[lag:] @ signs[:-lag]) / total for lag in range(1, lags + 1))


def _cost(single: _Series, batched: _Series, num_texts: int) -> Cost:
    latencies = single.seconds
    return Cost(
        texts_per_s=statistics.median(num_texts / seconds for seconds in batched.seconds),
        tokens_per_s=statistics.median(
            tokens / seconds for tokens, seconds in zip(batched.num_tokens, batched.seconds, strict=True)
        ),
        p50_s=float(np.quantile(latencies, 0.5)),
        p95_s=float(np.quantile(latencies, 0.95)) if len(latencies) >= MIN_FOR_P95 else None,
        num_queries=len(latencies),
        num_batches=len(batched.seconds),
    )


def _contrast(
    name: str,
    baseline: str,
    measured_as: str,
    single: Mapping[str, _Series],
    batched: Mapping[str, _Series],
    alpha: float,
) -> CostContrast:
    if measured_as == baseline:
        return CostContrast(name, baseline, is_same_model=True, query_time=None, texts_per_s=None)
    return CostContrast(
        name,
        baseline,
        is_same_model=False,
        query_time=ratio_of(single[measured_as].seconds, single[baseline].seconds, alpha),
        # More texts in the same time are less time for the same texts.
        texts_per_s=ratio_of(batched[baseline].seconds, batched[measured_as].seconds, alpha),
    )


def _load() -> float | None:
    """Return the average number of running or waiting processes over the last minute; ``None`` if unknown."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
