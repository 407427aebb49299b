"""A replica's host and a front's line, connected in one process: their messages, and their behavior after a failure."""

from __future__ import annotations

import asyncio
import pickle
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import numpy as np
import pytest

from gateway import errors, similarity
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster import discovery
from gateway.cluster.host import Host
from gateway.cluster.line import Line, LineLost, Place
from gateway.cluster.pool import Pool
from gateway.cluster.values import WireEmbeddings, WireJob
from gateway.cluster.wire import Connection, from_frame, to_frame
from gateway.errors import (
    BadInput,
    DeadlineExceeded,
    InternalError,
    ModelRecovering,
    Overloaded,
    RequestError,
    TooMuchMemory,
)
from gateway.similarity import QueryVectors
from gateway.types import Embeddings, EmbedJob, ModelInfo, Output, Priority, SparseVector, Timings, Truncate

NOW = time.monotonic


def make_job(*texts: str, left_s: float = 30.0, caller: str = "a", **changes: Any) -> EmbedJob:
    return EmbedJob(texts or ("two words",), None, Truncate.END, NOW() + left_s, caller, **changes)


def through_a_frame(value: object) -> Any:
    [(_kind, there)] = from_frame(bytearray(b"".join(to_frame([("x", value)])))[4:])
    return there


class Slow(FakeBackend):
    """A backend whose jobs wait for an event, and that notes which were canceled."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info)
        self.may_go = asyncio.Event()
        self.begun: list[EmbedJob] = []
        self.canceled: list[EmbedJob] = []

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.begun.append(job)
        try:
            await self.may_go.wait()
        except asyncio.CancelledError:
            self.canceled.append(job)
            raise
        return await super().embed(job)


def place_of(host: Host, secret: bytes, info: ModelInfo, name: str = "r1", node: str = "n1") -> Place:
    return Place(name, "127.0.0.1", host.port, secret.hex(), info.fingerprint, node, info.device)


@asynccontextmanager
async def hosted(
    backend: FakeBackend, info: ModelInfo, name: str = "r1", node: str = "n1"
) -> AsyncIterator[tuple[Host, Place]]:
    await backend.start()
    secret = secrets.token_bytes(32)
    host = Host(backend, info, secret, "127.0.0.1")
    await host.start()
    try:
        yield host, place_of(host, secret, info, name, node)
    finally:
        await host.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def pool_of(*places: Place) -> AsyncIterator[Pool]:
    pool = Pool("fake", lambda: None)
    pool.update({place.id: place for place in places})
    await until(lambda: len(pool.usable) == len(places))
    try:
        yield pool
    finally:
        await pool.close()


def is_default(job: EmbedJob, field: Field[Any]) -> bool:
    return bool(field.default is not MISSING and getattr(job, field.name) == field.default)


def kinds(of: type[BaseException]) -> list[type[BaseException]]:
    """Return an error and those below it that a replica may raise; those of other packages do not travel."""
    below = [kind for child in of.__subclasses__() for kind in kinds(child)]
    return [kind for kind in (of, *below) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", kinds(errors.GatewayError), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("through", [lambda e: pickle.loads(pickle.dumps(e)), through_a_frame], ids=["pickle", "wire"])  # noqa: S301
def test_errors_keep_their_attributes(kind: type[Any], through: Callable[[object], Any]) -> None:
    extra: dict[str, Any] = {}
    if kind is errors.MethodNotAllowed:
        extra = {"allow": "GET"}
    elif issubclass(kind, errors.RequestError):
        extra = {"param": "input", "retry_after_s": 7, "is_permanent": True}
    elif kind is errors.TooLittleMemory:
        extra = {"device": "cuda:0", "missing_bytes": 5}
    elif kind is errors.CardLostAtLoad:
        extra = {"device": "cuda:0"}
    message: Any = [errors.Problem("f", 1, 2, "k", "m")] if kind is errors.ConfigError else "what is wrong"
    error = kind(message, **extra)

    there = through(error)

    assert type(there) is kind
    assert str(there) == str(error)
    assert vars(there) == vars(error)


def test_each_field_of_a_job_travels() -> None:
    query = QueryVectors(
        {Output.DENSE: 1.0}, Embeddings(np.ones((1, 4), np.float32), [3], [], Timings(0, 0, 0)), True, True
    )
    job = EmbedJob(
        texts=("a", "b\ud800"),
        task="separation",
        truncate=Truncate.START,
        deadline=NOW() + 5,
        caller="someone",
        outputs=frozenset({Output.SPARSE, Output.DENSE}),
        is_late_chunked=True,
        query="q",
        firsts=("x", None),
        scorer=query.score,
        text_name="documents",
        max_text_tokens=7,
        max_total_tokens=9,
        may_wait=False,
        priority=Priority.LOW,
    )
    heard: list[int] = []
    untested = [field.name for field in fields(EmbedJob) if field.name != "on_tokens" and is_default(job, field)]
    assert not untested, "the job above must differ in each field from a usual one"

    there = through_a_frame(WireJob.of(job)).job(heard.append)

    for field in fields(EmbedJob):
        if field.name not in ("deadline", "scorer", "on_tokens"):
            assert getattr(there, field.name) == getattr(job, field.name), field.name
    assert there.deadline == pytest.approx(job.deadline, abs=1)
    text = np.array([[0.5, 0.5, 0.5, 0.5]], np.float32)
    assert there.scorer is not None
    assert there.scorer(text, None, None) == query.score(text, None, None)
    there.on_tokens(12)
    assert heard == [12]


def test_a_scorer_that_cannot_travel_is_refused_here() -> None:
    with pytest.raises(TypeError, match="QueryVectors"):
        WireJob.of(make_job(scorer=lambda *_outputs: 0.0))


@pytest.mark.parametrize("num_texts", [0, 1, 2, 300])
def test_each_output_travels_as_it_is(num_texts: int) -> None:
    rng = np.random.default_rng(1)
    sizes = [int(n) for n in rng.integers(1, 9, num_texts)]
    result = Embeddings(
        vectors=rng.random((num_texts, 384), np.float32)[:, ::1],
        num_tokens=sizes,
        truncated=[0] if num_texts else [],
        timings=Timings(0.1, 0.2, 0.3),
        sparse=[SparseVector(np.arange(n), rng.random(n, np.float32)) for n in sizes],
        multivectors=[rng.random((n, 16), np.float32) for n in sizes],
        states=[rng.random((n, 16), np.float32) for n in sizes],
    )

    there = through_a_frame(WireEmbeddings.of(result)).embeddings()

    np.testing.assert_array_equal(there.vectors, result.vectors)
    assert (there.num_tokens, there.truncated, there.timings) == (result.num_tokens, result.truncated, result.timings)
    for mine, theirs in zip(there.sparse, result.sparse, strict=True):
        np.testing.assert_array_equal(mine.indices, theirs.indices)
        np.testing.assert_array_equal(mine.values, theirs.values)
    for kind in ("multivectors", "states"):
        for mine, theirs in zip(getattr(there, kind), getattr(result, kind), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_vectors_are_not_copied_into_the_pickle() -> None:
    vectors = np.ones((64, 384), np.float32)

    head, *buffers = to_frame([("answer", 1, vectors)])

    assert [len(buffer) for buffer in buffers] == [vectors.nbytes]
    assert len(head) < 500


@pytest.mark.parametrize(
    "dangerous",
    [print, asyncio.sleep, pickle.loads, secrets.token_hex, pickle.Pickler, similarity.max_similarity],
    ids=lambda value: value.__name__,
)
def test_only_the_classes_of_messages_are_unpickled(dangerous: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not belong"):
        through_a_frame(dangerous)


@pytest.mark.parametrize("junk", [b"", b"\x01", b"\x05\x00abc", b"\x00\x00\xff\xff\xff\xffx"], ids=repr)
def test_bytes_other_than_frames_are_refused(junk: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        from_frame(bytearray(junk))


def test_the_largest_frame_is_sent_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [("x", b"1" * 1000)]
    num_bytes = sum(map(len, to_frame(messages))) - 4  # without the length in front
    monkeypatch.setattr("gateway.cluster.wire._MAX_FRAME", num_bytes)

    assert to_frame(messages)
    with pytest.raises(ValueError, match=f"a message of {num_bytes + 1} bytes is too large"):
        to_frame([("x", b"1" * 1001)])


class Transport:
    """Keeps what is written, instead of a socket."""

    def __init__(self) -> None:
        self.written = b""
        self.ended = ""

    def write(self, content: bytes) -> None:
        assert not self.ended
        self.written += content

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def connected(*, is_front: bool) -> tuple[Connection, Transport, list[Any]]:
    """Return one end of a connection, its transport, and the messages that come."""
    heard: list[Any] = []
    connection = Connection(
        b"s" * 32,
        is_front=is_front,
        on_open=lambda _connection: None,
        on_message=lambda _connection, message: heard.append(message),
        on_closed=lambda _connection, reason: None,
    )
    transport = Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    return connection, transport, heard


def pass_on(sender: Transport, receiver: Connection) -> None:
    content, sender.written = sender.written, b""
    while content:
        buffer = receiver.get_buffer(-1)
        num_bytes = min(len(buffer), len(content))
        buffer[:num_bytes], content = content[:num_bytes], content[num_bytes:]
        receiver.buffer_updated(num_bytes)


async def test_nothing_is_sent_before_both_ends_know_each_other_and_all_of_it_before_the_end() -> None:
    (front, here, _answers), (replica, there, heard) = connected(is_front=True), connected(is_front=False)
    front.send("too early")
    await asyncio.sleep(0)
    assert here.written == b""
    pass_on(there, front)
    pass_on(here, replica)
    pass_on(there, front)
    assert (front.is_open, replica.is_open) == (True, True)

    front.send("first")
    front.send("last")
    front.close("done")
    assert here.ended == "closed"
    pass_on(here, replica)

    assert heard == [("first",), ("last",)]


@pytest.mark.parametrize("greeting", [b"", b"gateway replica 1", b"gateway replica 1" + b"n" * 15, b"HTTP/1.1 400 Bad"])
async def test_a_front_answers_no_other_greeting_than_a_replica_s(greeting: bytes) -> None:
    front, transport, _heard = connected(is_front=True)
    other = Transport()
    other.written = len(greeting).to_bytes(4, "little") + greeting

    pass_on(other, front)

    assert (transport.written, transport.ended, front.is_open) == (b"", "aborted", False)


async def test_a_job_comes_back_as_from_the_backend_itself() -> None:
    info = fake_info()
    async with hosted(FakeBackend(info), info) as (_host, place), pool_of(place) as pool:
        here = FakeBackend(info)
        await here.start()
        job = make_job("one two three", "four", outputs=frozenset({Output.DENSE, Output.SPARSE, Output.STATES}))

        there, expected = await pool.embed(job), await here.embed(job)

        np.testing.assert_array_equal(there.vectors, expected.vectors)
        assert there.num_tokens == expected.num_tokens
        assert pool.info == info


async def test_jobs_of_one_moment_go_in_one_frame_and_come_back_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    info = fake_info()
    frames: list[int] = []

    def count(messages: Any) -> Any:
        frames.append(len(messages))
        return to_frame(messages)

    monkeypatch.setattr("gateway.cluster.wire.to_frame", count)
    async with hosted(FakeBackend(info), info) as (_host, place), pool_of(place) as pool:
        frames.clear()
        results = await asyncio.gather(*(pool.embed(make_job("w " * n, caller=f"c{n}")) for n in range(1, 21)))

    assert [result.vectors[0, 0] for result in results] == list(range(1, 21))
    assert frames[0] == 20


async def test_a_small_job_does_not_wait_for_a_large_one_that_was_sent_with_it() -> None:
    info = fake_info()
    backend = Slow(info)
    async with hosted(backend, info) as (_host, place), pool_of(place) as pool:
        large = asyncio.create_task(pool.embed(make_job(*["x"] * 100)))
        await until(lambda: len(backend.begun) == 1)
        backend.may_go.set()
        small = await pool.embed(make_job("y"))
        assert len(small.vectors) == 1
        await large


async def test_callers_reach_the_replica_each_under_their_own_name() -> None:
    info = fake_info()
    backend = Slow(info)
    async with hosted(backend, info) as (_host, place), pool_of(place) as pool:
        backend.may_go.set()
        await asyncio.gather(*(pool.embed(make_job(caller=f"c{n}")) for n in range(5)))
    assert [job.caller for job in backend.begun] == [f"c{n}" for n in range(5)]


async def test_a_canceled_job_leaves_the_replica_and_its_neighbors_stay() -> None:
    info = fake_info()
    backend = Slow(info)
    async with hosted(backend, info) as (host, place), pool_of(place) as pool:
        jobs = [asyncio.create_task(pool.embed(make_job(f"text {n}"))) for n in range(3)]
        await until(lambda: len(backend.begun) == 3)
        jobs[1].cancel()
        await until(lambda: bool(backend.canceled))
        assert [job.texts for job in backend.canceled] == [("text 1",)]
        backend.may_go.set()
        await asyncio.gather(jobs[0], jobs[2])
        await until(lambda: host.num_requests == 0)


async def test_a_deadline_travels_as_seconds_left_and_passes_on_both_sides() -> None:
    info = fake_info()
    backend = Slow(info)
    async with hosted(backend, info) as (host, place), pool_of(place) as pool:
        with pytest.raises(DeadlineExceeded):
            await pool.embed(make_job(left_s=0.2))
        assert backend.begun[0].deadline - NOW() < 0.2
        await until(lambda: host.num_requests == 0)
        assert backend.canceled


async def test_an_error_of_the_replica_arrives_as_it_is() -> None:
    info = fake_info()

    def refuse(_job: EmbedJob) -> None:
        raise BadInput("no", param="input", is_permanent=True)

    async with hosted(FakeBackend(info, on_embed=refuse), info) as (_host, place), pool_of(place) as pool:
        with pytest.raises(BadInput, match="no") as caught:
            await pool.embed(make_job())
        assert (caught.value.param, caught.value.is_permanent) == ("input", True)


@pytest.mark.parametrize("method", ["embed", "split", "join"])
async def test_a_fault_of_the_replica_is_answered_at_once_and_costs_no_other_request(method: str) -> None:
    info = fake_info()

    class Faulty(FakeBackend):
        async def embed(self, job: EmbedJob) -> Embeddings:
            if job.texts == ("bad",):
                raise ZeroDivisionError
            return await super().embed(job)

        async def vocabulary(self) -> Any:
            raise ZeroDivisionError

    async with hosted(Faulty(info), info) as (_host, place), pool_of(place) as pool:
        vocabulary = pool.usable[0].vocabulary
        asking = pool.embed(make_job("bad")) if method == "embed" else vocabulary(method, ["x"], flag=True, limit_s=60)
        with pytest.raises(InternalError, match="failed in its replica"):
            await asking
        assert (await pool.embed(make_job("good"))).vectors.shape == (1, info.width)


async def test_tokens_are_counted_by_the_front_before_the_answer_and_may_be_refused_there() -> None:
    info = fake_info(max_tokens=100_000)
    backend = Slow(info)

    class Counting(Slow):
        async def embed(self, job: EmbedJob) -> Embeddings:
            job.on_tokens(5000)
            return await super().embed(job)

    backend = Counting(info)

    def on_tokens(num_tokens: int) -> None:
        raise TooMuchMemory(f"{num_tokens} tokens are too many")

    async with hosted(backend, info) as (_host, place), pool_of(place) as pool:
        with pytest.raises(TooMuchMemory, match="5000"):
            await pool.embed(make_job(on_tokens=on_tokens))
        await until(lambda: bool(backend.canceled))  # although it never answered


async def test_a_lost_replica_costs_no_job_while_there_is_another() -> None:
    info = fake_info()
    first, second = Slow(info), Slow(info)
    async with (
        hosted(first, info, "r1", "n1") as (host, one),
        hosted(second, info, "r2", "n2") as (_host, two),
        pool_of(one, two) as pool,
    ):
        jobs = [asyncio.create_task(pool.embed(make_job(f"text {n}"))) for n in range(20)]
        await until(lambda: len(first.begun) + len(second.begun) == 20)
        assert first.begun
        assert second.begun
        for connection in list(host.fronts):
            connection.abort("killed")
        second.may_go.set()
        first.may_go.set()
        results = await asyncio.gather(*jobs)
    assert [len(result.vectors) for result in results] == [1] * 20


async def test_a_job_that_ends_every_replica_is_not_given_to_all_of_them() -> None:
    info = fake_info()
    async with asyncio.timeout(20):
        backends = [Slow(info) for _ in range(5)]
        hosts = [Host(backend, info, b"s" * 32, "127.0.0.1") for backend in backends]
        for host, backend in zip(hosts, backends, strict=True):
            await backend.start()
            await host.start()
        places = [place_of(host, b"s" * 32, info, f"r{n}", f"n{n}") for n, host in enumerate(hosts)]
        async with pool_of(*places) as pool:
            poison = asyncio.create_task(pool.embed(make_job("poison")))
            for num in range(1, 4):
                await until(lambda num=num: sum(len(backend.begun) for backend in backends) == num)
                for host in hosts:
                    for connection, front in list(host.fronts.items()):
                        if front.tasks:
                            connection.abort("died of it")
            with pytest.raises(ModelRecovering, match="3 of its replicas"):
                await poison
        assert sum(len(backend.begun) for backend in backends) == 3
        for host in hosts:
            await host.stop()


async def test_a_replica_that_drains_finishes_its_jobs_and_gets_no_more() -> None:
    info = fake_info()
    first, second = Slow(info), Slow(info)
    async with hosted(first, info) as (host, one), pool_of(one) as pool:
        running = asyncio.create_task(pool.embed(make_job("old")))
        await until(lambda: len(first.begun) == 1)
        async with hosted(second, info, "r2") as (_host, two):
            pool.update({one.id: one, two.id: two})
            await until(lambda: len(pool.usable) == 2)
            draining = asyncio.create_task(host.drain(10))
            await until(lambda: len(pool.usable) == 1)
            second.may_go.set()
            await asyncio.gather(*(pool.embed(make_job("new")) for _ in range(5)))
            assert not draining.done()
            first.may_go.set()
            await draining
            assert len((await running).vectors) == 1
            assert len(first.begun) == 1
            pool.update({two.id: two})
            await until(lambda: list(pool.lines) == ["r2"])


async def test_a_replica_with_other_weights_never_answers() -> None:
    info, other = fake_info(), fake_info(fingerprint="f" * 64)
    liar = Slow(other)
    async with (
        hosted(FakeBackend(info), info) as (_host, right),
        hosted(Slow(other), other, "r2") as (_other, wrong),
        hosted(liar, other, "r3") as (_third, lying),
        pool_of(right) as pool,
    ):
        # One shows another fingerprint in Serve, the other only in its first message.
        pool.update({one.id: one for one in (right, wrong, replace(lying, fingerprint=info.fingerprint))})
        await until(lambda: pool.lines["r3"]._is_closed)
        await asyncio.gather(*(pool.embed(make_job()) for _ in range(20)))
        assert [line.place.id for line in pool.usable] == ["r1"]
        assert not liar.begun


async def test_without_the_secret_nothing_is_read() -> None:
    info = fake_info()
    backend = Slow(info)
    async with hosted(backend, info) as (_host, place):
        line = Line(replace(place, secret="00" * 32), None, lambda: None)
        await until(lambda: bool(line.trouble))
        assert not line.is_usable
        await line.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        await reader.readexactly(4)
        frame = b"".join(to_frame([("embed", 1, WireJob.of(make_job()))]))
        writer.write(frame)
        assert len(await reader.read()) < 100  # the greeting, then the end of the connection
        writer.close()
    assert not backend.begun


async def test_the_work_goes_to_the_replica_that_will_be_done_first() -> None:
    info = fake_info()
    first, second = Slow(info), Slow(info)
    async with (
        hosted(first, info, "r1") as (_one, one),
        hosted(second, info, "r2") as (_two, two),
        pool_of(one, two) as pool,
        pool_of(one) as other_front,
    ):
        large = asyncio.create_task(other_front.embed(make_job("x" * 10_000)))
        await until(lambda: pool.lines["r1"].load.others > 9000)
        small = [asyncio.create_task(pool.embed(make_job("y" * 50))) for _ in range(10)]
        await until(lambda: len(second.begun) == 10)
        first.may_go.set()
        second.may_go.set()
        await asyncio.gather(large, *small)


async def test_full_replicas_answer_with_the_time_that_all_of_them_need() -> None:
    info = fake_info()

    def refuse(_job: EmbedJob) -> None:
        raise Overloaded("full", retry_after_s=100)

    async with (
        hosted(FakeBackend(info, on_embed=refuse), info, "r1") as (one_host, one),
        hosted(FakeBackend(info, on_embed=refuse), info, "r2") as (two_host, two),
        pool_of(one, two) as pool,
    ):
        one_host._work, one_host._pace.rate = 3000, 100.0
        two_host._work, two_host._pace.rate = 1000, 300.0
        await until(lambda: sum(line.load.work for line in pool.usable) == 4000)
        with pytest.raises(Overloaded, match="full") as caught:
            await pool.embed(make_job())
    assert caught.value.retry_after_s == 10


async def test_without_a_replica_a_job_waits_for_a_moment_and_no_longer() -> None:
    info = fake_info()
    pool = Pool("fake", lambda: None)
    async with hosted(FakeBackend(info), info) as (_host, place):
        waiting = asyncio.create_task(pool.embed(make_job()))
        await asyncio.sleep(0.05)
        pool.update({place.id: place})
        assert len((await waiting).vectors) == 1
        pool.update({})
        with pytest.raises(ModelRecovering, match="no replica"):
            await pool.embed(make_job())
    await pool.close()


async def test_a_line_that_was_lost_is_opened_again() -> None:
    info = fake_info()
    async with hosted(FakeBackend(info), info) as (host, place), pool_of(place) as pool:
        for connection in list(host.fronts):
            connection.abort("a broken cable")
        await until(lambda: not pool.usable)
        [line] = pool.lines.values()
        assert (trouble := line.trouble)
        with pytest.raises(LineLost) as caught:
            await line.metrics()
        assert str(caught.value) == trouble
        await until(lambda: bool(pool.usable))
        assert line.trouble == ""
        assert len((await pool.embed(make_job())).vectors) == 1


async def test_a_line_that_is_being_closed_is_not_used() -> None:
    info = fake_info()
    async with hosted(FakeBackend(info), info) as (_host, place), pool_of(place) as pool:
        [line] = pool.usable
        closing = asyncio.create_task(line.close())
        await asyncio.sleep(0)

        assert not line.is_usable
        await closing


async def test_a_lost_line_is_not_an_error_of_the_request() -> None:
    assert not issubclass(LineLost, RequestError)


async def test_a_large_job_arrives_whole() -> None:
    info = fake_info(width=1024)
    texts = [f"{n} " * 2000 for n in range(500)]
    async with hosted(FakeBackend(info), info) as (_host, place), pool_of(place) as pool:
        small = [asyncio.create_task(pool.embed(make_job(f"w{n}"))) for n in range(50)]
        large = await pool.embed(make_job(*texts))
        await asyncio.gather(*small)
    assert large.vectors.shape == (500, 1024)
    assert large.vectors.flags.writeable


async def test_a_pool_is_closed_also_while_a_leaving_replica_has_a_job() -> None:
    info = fake_info()
    slow, pool = Slow(info), Pool("fake", lambda: None)
    async with hosted(slow, info) as (_host, one), hosted(FakeBackend(info), info, "r2") as (_other, two):
        pool.update({one.id: one})
        job = asyncio.create_task(pool.embed(make_job()))
        await until(lambda: len(slow.begun) == 1)
        pool.update({two.id: two})
        await until(lambda: len(pool.usable) == 1)

        await pool.close()

        assert pool.lines == {}
        with pytest.raises(ModelRecovering, match="replicas were lost"):
            await job


async def test_an_announcement_on_its_way_does_not_reach_a_watcher_that_has_ended() -> None:
    directory, heard = discovery.Directory(), list[Any]()
    end = directory.watch("model", heard.append)
    directory.publish("model", {})
    await asyncio.sleep(0)
    assert heard == [{}, {}]

    directory.publish("model", {})
    end()
    await asyncio.sleep(0)

    assert heard == [{}, {}]


async def test_a_replica_that_never_greets_is_dialed_again_and_no_connection_to_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.cluster.line._SILENCE_S", 0.5)
    begun, ended = [], []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.append(writer)
        await reader.read()
        ended.append(writer)
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        line = Line(Place("r1", "127.0.0.1", port, "00" * 32, "f", "n1", "cpu"), None, lambda: None)
        await until(lambda: len(begun) == 2)
        assert line.trouble.startswith("it has sent nothing for ")

        await line.close()

        await until(lambda: ended == begun)


async def test_a_front_whose_kernel_takes_nothing_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after its machine has lost its power: the kernel there does not even refuse."""
    monkeypatch.setattr("gateway.cluster.host._UNTAKEN_S", 0.5)
    info = fake_info()
    async with hosted(FakeBackend(info), info) as (host, place), pool_of(place) as pool:
        [line] = pool.usable
        assert line._connection is not None
        line._connection._transport.pause_reading()  # type: ignore[union-attr]
        [connection] = host.fronts
        for _ in range(40):
            connection.send("more than a kernel keeps", bytes(2**20))

        await until(lambda: connection not in host.fronts)


def test_a_replica_of_a_newer_version_may_announce_more() -> None:
    place = Place("r1", "10.0.0.1", 1, "00", "f", "n1", "cpu")
    announced = {field.name: getattr(place, field.name) for field in fields(Place) if field.name != "id"}

    assert discovery.place_of("r1", {**announced, "zone": "a"}) == place
