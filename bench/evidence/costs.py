"""Simulations of the cost in ``gateway compare``: one model measured against itself on a machine that does other work."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial

import httpx
import numpy as np

from bench.evidence.registry import Case, Simulation
from gateway.api.openai_schema import ModelCard
from gateway.cli.client import EmbeddedTexts, GatewayClient
from gateway.compare.arms import ArmName, PlannedArm, Side
from gateway.compare.cost import measure_costs
from gateway.compare.progress import Silent
from gateway.precision import Precision
from gateway.types import Output, Truncate

_VECTORS = np.zeros((1, 1), np.float32)


class BusyMachine(GatewayClient):
    """Answers at once, and says that it took as long as it would on a busy machine.

    Args:
        load: standard deviation of the logarithm of the slowly changing load, such as other processes. A model's requests
            alternate between two workers, each with a load that outlasts forty requests.
        noise: the same for the load that changes with each request.
        stalls: share of the requests that take ten times as long.
        warmth: how much faster a text is that another arm has just had.
        factor: how much slower the second arm is.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        load: float,
        noise: float,
        stalls: float = 0.02,
        warmth: float = 0.05,
        factor: float = 1.0,
    ) -> None:
        super().__init__(httpx.AsyncClient(), "simulated")
        self.now = 0.0
        self._rng = rng
        self._load, self._noise, self._stalls, self._warmth, self._factor = load, noise, stalls, warmth, factor
        self._states = rng.normal(size=2)
        self._numbers: Counter[str] = Counter()
        # The effect of one process on a model as long as the process lives, such as the place of its weights in memory.
        self._luck = {f"model{number}": float(np.exp(0.03 * rng.normal())) for number in range(10)}
        self._last: Sequence[str] = ()

    async def embed(  # noqa: PLR0913  as the client's
        self,
        model: str,
        texts: Sequence[str],
        task: str | None = None,
        dimensions: int | None = None,
        expect_space: str | None = None,
        precision: Precision = Precision.FLOAT,
        outputs: Sequence[Output] = (Output.DENSE,),
        truncate: Truncate = Truncate.END,
        *,
        is_late: bool = False,
    ) -> EmbeddedTexts:
        memory = 0.975
        self._states = memory * self._states + np.sqrt(1 - memory**2) * self._rng.normal(size=2)
        self._numbers[model] += 1
        state = self._states[self._numbers[model] % 2]
        elapsed_s = 0.008 * len(texts) ** 0.8 * np.exp(self._load * state + self._noise * self._rng.normal())
        elapsed_s *= self._luck[model]
        elapsed_s *= 10 if self._rng.random() < self._stalls else 1
        elapsed_s *= 1 - self._warmth if texts == self._last else 1
        elapsed_s *= self._factor if model == "model1" else 1
        self._last = texts
        self.now += elapsed_s
        return EmbeddedTexts(_VECTORS, "space", model, task, 8 * len(texts), float(elapsed_s), is_experiment=False)


def _arm(number: int) -> PlannedArm:
    name = f"model{number}"
    card = ModelCard.model_construct(id=name, device="cpu", dtype="float32", width=1, dimensions=[1], tasks=[])
    side = Side(None, None, "space", "space")
    return PlannedArm(ArmName(name, name, None), card, 1, 1, side, side)


def shows_a_difference(
    arms: int, load: float, noise: float, factor: float, which: str, rng: np.random.Generator
) -> bool:
    """Return whether a comparison shows that any arm is faster or slower.

    Args:
        which: ``any`` ratio, or that of a ``query``.
    """
    client = BusyMachine(rng, load, noise, factor=factor)
    texts = [f"text {number}" for number in range(200)]
    planned = [_arm(number) for number in range(arms)]
    seed = int(rng.integers(2**31))
    run = measure_costs(client, planned, texts, texts, seed, Silent(), lambda: client.now)
    found = asyncio.run(run).contrasts
    return any(
        (one.query_time is not None and one.query_time.is_shown)
        or (which == "any" and one.texts_per_s is not None and one.texts_per_s.is_shown)
        for one in found
    )


_MACHINES = (("quiet", 0.05, 0.05), ("shared", 0.3, 0.2), ("busy", 0.6, 0.5))

SIMULATIONS = (
    Simulation(
        "cost",
        "Cost of one model against itself",
        "any ratio shown as a difference",
        "<=",
        0.05,
        [
            Case(f"{arms} arms", name, partial(shows_a_difference, arms, load, noise, 1.0, "any"), 400, 20)
            for arms in (2, 3)
            for name, load, noise in _MACHINES
        ],
        "Requests alternate between two workers, whose loads outlast forty requests; 2 % stall, a text is faster the "
        "second time, and during the life of a process, one model is faster than another by 3 % (standard deviation).",
    ),
    Simulation(
        "slower",
        "Cost of a model that takes 1.5 times as long",
        "the time of a query shown as a difference",
        ">=",
        0.8,
        [
            Case("2 arms", name, partial(shows_a_difference, 2, load, noise, 1.5, "query"), 100, 10)
            for name, load, noise in _MACHINES
        ],
    ),
)
