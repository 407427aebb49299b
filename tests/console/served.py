"""A gateway behind a real socket whose models only count words, for the pages and for a browser."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import uvicorn

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Alias, Arm, Experiment, ModelEntry, Registry, Shadow, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import Overloaded
from gateway.fleet import Fleet, Model
from gateway.server import server_config
from gateway.types import Embeddings, EmbedJob, ModelState, Output
from tests.listener import make_listener

TASKS = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "text-matching": ""}
OPERATOR = "operator-secret"
HOSTILE = "<img src=x onerror=alert(1)>\"'&"


class WordsBackend(FakeBackend):
    """A text is the sum of a random vector for each of its words, so that texts with the same words are near.

    A text with the word ``overload`` makes it refuse, as a full queue does.
    """

    async def embed(self, job: EmbedJob) -> Embeddings:
        if self._info.id == "bge" and any("overload" in text for text in job.texts):
            raise Overloaded(f"the queue of bge is full {HOSTILE}", retry_after_s=2)
        embedded = await super().embed(job)
        vectors = [self._vector(text) for text in job.texts]
        return dataclasses.replace(embedded, vectors=np.array(vectors, np.float32))

    def _vector(self, text: str) -> np.ndarray:
        words = [self._info.id, *text.lower().split()[: self._info.max_tokens]]
        seeds = [zlib.crc32(f"{self._info.id}{word}".encode()) for word in words]
        return np.sum([np.random.default_rng(seed).standard_normal(self._info.width) for seed in seeds], axis=0)


def make(model_id: str, state: ModelState = ModelState.READY, reason: str = "", **info: object) -> Model:
    """Return a model whose backend runs."""
    known = fake_info(model_id, **info)
    entry = ModelEntry(id=model_id, source=f"owner/{zlib.crc32(model_id.encode())}", revision="0" * 40, enabled=True)
    backend = WordsBackend(known, delay_s=0.002)
    is_ready = state is ModelState.READY
    return Model(entry, backend, state, known if is_ready else None, reason, int(is_ready))


def usual_models() -> list[Model]:
    return [
        make("jina", width=64, dimensions=(64, 32, 16), max_tokens=12, tasks=TASKS, default_task="text-matching"),
        make("bge", width=48, max_tokens=20, outputs=(Output.DENSE, Output.SPARSE)),
        make("broken", ModelState.FAILED, f"failed to load: no weights in {HOSTILE}"),
        make("off", ModelState.DISABLED, "switched off in models.yaml (`enabled: false`)"),
    ]


SEARCH = Experiment(
    id="search-exp",
    kind="cross_space",
    unit=("header:x-unit", "body:user"),
    force="header:x-arm",
    arms=(Arm(model="jina", weight=50), Arm(model="bge", weight=50)),
)


def registry_of(models: Sequence[Model], experiments: Sequence[Experiment] = (SEARCH,)) -> Registry:
    return Registry(
        path=Path("models.yaml"),
        version=1,
        models=tuple(model.entry for model in models),
        aliases={
            "default": Alias(name="default", model="jina"),
            "jina-query": Alias(name="jina-query", model="jina", task="retrieval.query"),
        },
        experiments=tuple(experiments),
        shadows=(Shadow(of="default", to="bge", sample=0.5),),
    )


@dataclasses.dataclass(frozen=True)
class Gateway:
    url: str
    deployment: Deployment


@contextlib.contextmanager
def serving(
    models: Sequence[Model] | None = None,
    experiments: Sequence[Experiment] = (SEARCH,),
    file: Path | None = None,
    **settings: object,
) -> Iterator[Gateway]:
    """Serve models on a free port, in a thread, while the context lasts.

    Args:
        file: a registry of the same models, whose changes a reload serves.
    """
    models = usual_models() if models is None else models
    known = Settings(**settings)
    registry = registry_of(models, experiments) if file is None else load_registry(file, {})
    deployment = Deployment(
        registry,
        known,
        Fleet(models),
        read_registry=None if file is None else lambda: load_registry(file, {}),
        make_backend=lambda entry: WordsBackend(fake_info(entry.id)),
    )
    server = uvicorn.Server(server_config(create_app(deployment), known))
    with make_listener() as listener:

        async def run() -> None:
            for model in models:
                if model.state is ModelState.READY:
                    await model.backend.start()
            deployment.fleet.started.set()
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            yield Gateway("http://127.0.0.1:{1}".format(*listener.getsockname()), deployment)
        finally:
            server.should_exit = True
            thread.join()
