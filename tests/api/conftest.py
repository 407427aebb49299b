"""A gateway over models whose vectors are known, in this process or behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from gateway.server import server_config
from gateway.types import Embeddings, EmbedJob, ModelState
from tests.listener import make_listener

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]

TASKS = {
    "retrieval.query": "query: ",
    "retrieval.passage": "passage: ",
    "separation": "separate: ",
    "classification": "classify: ",
    "text-matching": "",
}
MODELS: dict[str, dict[str, object]] = {
    "mini": {"source": "owner/mini", "width": 8, "max_tokens": 8},
    "jina": {
        "source": "jinaai/jina-v3",
        "width": 32,
        "dimensions": (32, 16, 8),
        "max_tokens": 8,
        "tasks": TASKS,
        "default_task": "text-matching",
    },
    "team/small": {"source": "owner/team-small", "width": 10, "is_normalized": False},
}
ALIASES = {"default": "mini", "jina-query": ("jina", "retrieval.query")}


def raw_vectors(texts: Sequence[str], width: int) -> np.ndarray:
    """Return the model's vectors of texts, before the gateway finishes them: of a different length for each cut."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()) for text in texts]
    return np.array([np.random.default_rng(seed).standard_normal(width) for seed in seeds], np.float32)


class RandomBackend(FakeBackend):
    """A fake whose vectors have something in every dimension; see :func:`raw_vectors`."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        result = await super().embed(job)
        return dataclasses.replace(result, vectors=raw_vectors(job.texts, self._info.width))


@pytest.fixture
def vectors_of() -> Callable[[Sequence[str], int], np.ndarray]:
    """Return the function that computes the vectors to expect, before they are finished."""
    return raw_vectors


@pytest.fixture
def make_random_model(make_model: MakeModel) -> MakeModel:
    """Return a function that makes a model with a :class:`RandomBackend`."""

    def make(model_id: str = "mini", **info: object) -> Model:
        return make_model(model_id, backend=RandomBackend(fake_info(model_id, **info)), **info)

    return make


@pytest.fixture
def models(make_random_model: MakeModel) -> list[Model]:
    """Return the models that most tests use: ``mini`` is plain, ``jina`` has tasks and several sizes."""
    return [make_random_model(model_id, **info) for model_id, info in MODELS.items()]


@pytest.fixture
def tiktoken_cache_dir() -> Path:
    """Return a folder with the cl100k_base vocabulary, which llama-index-core contains."""
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_static" / "tiktoken_cache"


Connect = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
async def connect(models: list[Model], make_fleet: MakeFleet) -> AsyncIterator[Connect]:
    """Return a function that starts a gateway with some settings in this process, and returns a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(
            *fleet_models: Model,
            aliases: object = ALIASES,
            experiments: Sequence[Experiment] = (),
            has_started: bool = True,
            **settings: object,
        ) -> httpx.AsyncClient:
            registry, fleet = make_fleet(*(fleet_models or models), aliases=aliases, experiments=experiments)
            await _start(fleet, has_started)
            deployment = Deployment(registry, Settings(**settings), fleet)
            app = create_app(deployment)
            stack.push_async_callback(deployment.resources.aclose)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
            return await stack.enter_async_context(client)

        yield connect


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    """Return a client of a gateway with default settings."""
    return await connect()


async def _start(fleet: Fleet, has_started: bool = True) -> None:
    for model in fleet:
        if model.state is ModelState.READY:
            await model.backend.start()
    if has_started:
        fleet.started.set()


Serve = Callable[..., "contextlib.AbstractContextManager[tuple[str, int]]"]


@pytest.fixture
def serve(models: list[Model], make_fleet: MakeFleet) -> Serve:
    """Return a function that serves a gateway on a free port while its context lasts, and gives host and port."""

    @contextlib.contextmanager
    def serve(
        *fleet_models: Model,
        experiments: Sequence[Experiment] = (),
        address: str = "127.0.0.1",
        **settings: object,
    ) -> Iterator[tuple[str, int]]:
        registry, fleet = make_fleet(*(fleet_models or models), aliases={}, experiments=experiments)
        known = Settings(**settings)
        deployment = Deployment(registry, known, fleet)
        config = server_config(create_app(deployment), known)
        server = uvicorn.Server(config)
        with make_listener(host=address) as listener:

            async def run() -> None:
                await _start(fleet)
                async with deployment.resources:
                    await server.serve(sockets=[listener])

            thread = threading.Thread(target=asyncio.run, args=(run(),))
            thread.start()
            try:
                yield listener.getsockname()[:2]
            finally:
                server.should_exit = True
                thread.join()

    return serve


CheckError = Callable[..., str]


@pytest.fixture
def check_error() -> CheckError:
    """Return a function that checks everything about an error answer but the message, which it returns."""

    def check(
        response: httpx.Response,
        status: int,
        code: str,
        *,
        param: str | None = None,
        type_: str = "invalid_request_error",
    ) -> str:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"]
        body = response.json()
        message = body["message"]
        assert isinstance(message, str)
        assert body == {
            "error": {"message": message, "type": type_, "param": param, "code": code},
            "detail": message,
            "message": message,
        }
        return message

    return check
