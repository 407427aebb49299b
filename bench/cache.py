"""Measure the cache of vectors: a text that is known, a text that is not, and a model without a cache.

The subjects take turns, round by round, in one process and with one engine. Times are those of the service: from texts to
finished vectors, without HTTP. "Of the cache alone" has a backend that takes no time.

    python -m bench.cache [--rounds 9]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bench.machine import describe_machine
from bench.texts import Sentences
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.in_process import in_process_deployment
from gateway.config.cache import CacheConfig
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Model
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService

_MODEL = "all-minilm-l6-v2"
_SIZES = (1, 32)
_REGISTRY = Path(__file__).parents[1] / "models.yaml"


class Rounds:
    """Times one subject after the other, several times in a round."""

    def __init__(self, service: EmbeddingService, model: Model, sentences: Sentences) -> None:
        self._service = service
        self._model = model
        self._sentences = sentences
        self._known = {size: sentences.take(size) for size in _SIZES}
        self.times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)

    async def run(self, subject: str, cache: CacheConfig | None, *, is_known: bool, repeats: int) -> None:
        """Time some requests of each size."""
        entry = self._model.entry.model_copy(update={"cache": cache})
        if (replaced := self._model.take_entry(entry)) is not None:
            await replaced.close()
        for size in _SIZES:
            texts = (
                [self._known[size]] * (repeats + 1)
                if is_known
                else [self._sentences.take(size) for _ in range(repeats + 1)]
            )
            seconds = [await self._time(some) for some in texts]
            self.times[subject, size].append(statistics.median(seconds[1:]) * 1000)

    async def _time(self, texts: Sequence[str]) -> float:
        request = EmbedRequest(texts, _MODEL, 60.0, "bench", GATEWAY)
        started = time.perf_counter()
        await self._service.embed(request)
        return time.perf_counter() - started


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[EmbeddingService, Model]]:
    registry = load_registry(_REGISTRY, {})
    async with in_process_deployment(registry, Settings(), [_MODEL]) as deployment:
        model = deployment.fleet.get(_MODEL)
        assert model is not None  # noqa: S101  it has been loaded
        yield EmbeddingService(deployment, ExperimentStats(None)), model


async def measure(num_rounds: int) -> list[tuple[str, Rounds]]:
    """Time all subjects with the real engine, and with a backend that takes no time."""
    measured = []
    for title, make_backend in (("with the model", None), ("of the cache alone", _instant)):
        async with serving() as (service, model):
            if make_backend is not None:
                engine, model.backend = model.backend, make_backend(model)
            rounds = Rounds(service, model, Sentences(seed=len(title)))
            for _ in range(num_rounds):
                await rounds.run("no cache", None, is_known=False, repeats=12)
                await rounds.run("cache, unknown texts", CacheConfig(), is_known=False, repeats=12)
                await rounds.run("cache, known texts", CacheConfig(), is_known=True, repeats=100)
            if make_backend is not None:
                model.backend = engine
            measured.append((title, rounds))
    return measured


def _instant(model: Model) -> FakeBackend:
    assert model.info is not None  # noqa: S101  it has been loaded
    backend = FakeBackend(fake_info(_MODEL, model.info.width))
    backend._is_running = True
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    num_rounds = parser.parse_args().rounds
    measured = asyncio.run(measure(num_rounds))
    print(
        f"{describe_machine()}\n\n| ms per request, medians of {num_rounds} rounds | 1 text | 32 texts |\n|---|---|---|"
    )
    for title, rounds in measured:
        for subject in dict.fromkeys(subject for subject, _size in rounds.times):
            cells = [f"{statistics.median(rounds.times[subject, size]):.3f}" for size in _SIZES]
            print(f"| {subject}, {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
