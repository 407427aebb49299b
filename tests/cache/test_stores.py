"""Entries on a disk and in a real Redis: they are found again, and a disk or Redis that fails fails no request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis.asyncio as asyncio_redis
from structlog.testing import capture_logs

from gateway.cache import disk_store, stores
from gateway.cache.disk_store import DiskStore
from gateway.cache.entries import Part
from gateway.cache.model_cache import ModelCache
from gateway.cache.opening import folder_of
from gateway.cache.redis_store import RedisStore
from gateway.cache.stores import Guarded, Store
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Output
from tests.cache.test_model_cache import EVERYTHING, INFO, Model, job
from tests.redis_server import Redis, failing_over, running_redis

pytestmark = pytest.mark.usefixtures("patient")

ALL = frozenset(EVERYTHING)
TEXTS = ["a", "b c", "a b c d e f g h"]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give stores time to answer, however busy the machine is, and retry immediately."""
    monkeypatch.setattr(stores, "PATIENCE_S", 10.0)
    monkeypatch.setattr(stores, "_SILENCE_S", 0.0)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, redis_server: Redis) -> Callable[[], Store]:
    """Return a function that opens a store, always at the same place."""
    if request.param == "disk":
        return lambda: DiskStore(tmp_path / "cache", 2**30)
    database = f"{redis_server.uri[:-1]}{hash(tmp_path) % 15 + 1}"
    return lambda: RedisStore(database, 60, 10.0)


both = pytest.mark.parametrize("place", ["disk", "redis"], indirect=True)


class Caches:
    """Opens caches, as processes would one after the other, and closes them."""

    def __init__(self) -> None:
        self.open: list[tuple[ModelCache, Guarded]] = []

    def make(self, store: Store, max_bytes: int = 2**20, *, is_remote: bool = False) -> ModelCache:
        guarded = Guarded("stored", store)
        cache = ModelCache("stored", max_bytes, guarded, is_remote=is_remote, is_per_client=False)
        self.open.append((cache, guarded))
        return cache

    async def flush(self) -> None:
        """Wait until everything is stored."""
        for _cache, guarded in self.open:
            await guarded.flush()

    async def close(self) -> None:
        for cache, guarded in self.open:
            await guarded.flush()
            await cache.close()
            if isinstance(guarded._store, DiskStore):
                await asyncio.to_thread(guarded._store._thread.join)
        self.open.clear()


@pytest.fixture
async def caches() -> AsyncIterator[Caches]:
    made = Caches()
    yield made
    await made.close()


def num_errors() -> float:
    return sum(value for (model, _store), value in metrics.values(metrics.CACHE_ERRORS).items() if model == "stored")


def same(one: Embeddings, other: Embeddings) -> bool:
    def numbers(answer: Embeddings) -> list[np.ndarray]:
        sparse = [array for weights in answer.sparse or () for array in (weights.indices, weights.values)]
        return [answer.vectors, *sparse, *(answer.multivectors or ())]

    arrays = list(zip(numbers(one), numbers(other), strict=True))
    counts = (one.num_tokens, one.truncated) == (other.num_tokens, other.truncated)
    return counts and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


@both
async def test_a_new_process_finds_the_entries_of_the_last_one(place: Callable[[], Store], caches: Caches) -> None:
    await caches.make(place()).embed(job(*TEXTS, outputs=ALL), INFO, Model().embed)
    await caches.close()
    model = Model()
    cache = caches.make(place())
    found = await cache.embed(job(*TEXTS, "new", outputs=ALL), INFO, model.embed)
    assert (model.asked, found.num_cached) == (["new"], 3)
    assert same(found, await Model().embed(job(*TEXTS, "new", outputs=ALL)))
    await cache.embed(job(*TEXTS, outputs=ALL), INFO, model.embed)  # in memory by now
    assert metrics.values(metrics.CACHE_TEXTS)["stored", "memory"] >= 3


@both
async def test_entries_beyond_the_memory_limit_are_still_found(place: Callable[[], Store], caches: Caches) -> None:
    texts, model = [f"text {i}" for i in range(200)], Model()
    cache = caches.make(place(), max_bytes=6000)
    await cache.embed(job(*texts), INFO, model.embed)
    await caches.flush()
    found = await cache.embed(job(*texts), INFO, model.embed)
    assert (found.num_cached, len(model.asked)) == (200, 200)
    assert same(found, await Model().embed(job(*texts)))
    assert cache.stats().num_bytes <= 6000


@both
async def test_a_text_that_was_cut_at_the_other_end_is_not_found(place: Callable[[], Store], caches: Caches) -> None:
    await caches.make(place()).embed(job(*TEXTS), INFO, Model().embed)
    await caches.close()
    from_start = replace(job(*TEXTS), truncate=replace(job()).truncate.START)
    found = await caches.make(place()).embed(from_start, INFO, Model().embed)
    assert found.num_cached == 2
    assert same(found, await Model().embed(from_start))


@both
async def test_wrong_entries_are_forgotten_by_all(place: Callable[[], Store], caches: Caches) -> None:
    """Replicas that share a Redis find it, too, and so does the next process."""
    first = caches.make(place())
    await first.embed(job(*TEXTS), INFO, Model().embed)
    await caches.flush()
    first.forget()
    assert (await first.embed(job(TEXTS[0]), INFO, Model().embed)).num_cached == 0
    await caches.close()
    found = await caches.make(place()).embed(job(*TEXTS), INFO, Model().embed)
    assert found.num_cached == 1


async def test_a_replica_does_not_use_entries_that_another_has_forgotten(redis_server: Redis, caches: Caches) -> None:
    one, other = (caches.make(RedisStore(redis_server.uri, 60, 10.0)) for _ in range(2))
    await one.embed(job("shared"), INFO, Model().embed)
    await caches.flush()
    assert (await other.embed(job("shared"), INFO, Model().embed)).num_cached == 1
    one.forget()
    await one.embed(job("another"), INFO, Model().embed)
    await caches.flush()
    third = caches.make(RedisStore(redis_server.uri, 60, 10.0))
    assert (await third.embed(job("shared", "another"), INFO, Model().embed)).num_cached == 1


async def test_entries_leave_redis_after_their_time(redis_server: Redis, caches: Caches) -> None:
    await caches.make(RedisStore(redis_server.uri, 0.001, 10.0)).embed(job("short"), INFO, Model().embed)
    await caches.close()
    await asyncio.sleep(0.005)
    again = caches.make(RedisStore(redis_server.uri, 60, 10.0))
    assert (await again.embed(job("short"), INFO, Model().embed)).num_cached == 0


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 40, None])
async def test_a_value_that_is_damaged_is_not_used(redis_server: Redis, caches: Caches, damage: bytes | None) -> None:
    await caches.make(RedisStore(redis_server.uri, 60, 10.0)).embed(job("damaged"), INFO, Model().embed)
    await caches.close()
    kept = caches.make(RedisStore(redis_server.uri, 60, 10.0))
    assert (await kept.embed(job("damaged"), INFO, Model().embed)).num_cached == 1
    async with asyncio_redis.from_url(redis_server.uri) as client:
        for key in await client.keys("gateway:cache:*:*"):
            if b"generation" not in key:
                value = await client.get(key)
                flipped = value[:9] + bytes(byte ^ 1 for byte in value[9:10]) + value[10:]
                await client.set(key, flipped if damage is None else damage)
    found = await caches.make(RedisStore(redis_server.uri, 60, 10.0)).embed(job("damaged"), INFO, Model().embed)
    assert found.num_cached == 0


async def test_a_key_that_another_program_wrote_is_handled_as_an_error(redis_server: Redis, caches: Caches) -> None:
    part = await kept_part(caches, RedisStore(redis_server.uri, 60, 10.0), "kind")
    async with asyncio_redis.from_url(redis_server.uri) as client:
        await client.set(b"gateway:cache:generation:" + part.group.encode(), "no number")
        before = num_errors()
        found = await caches.make(RedisStore(redis_server.uri, 60, 10.0)).embed(job("kind"), INFO, Model().embed)
        assert found.num_cached == 0
        await caches.flush()
        assert num_errors() > before
        await client.flushdb()


async def kept_part(caches: Caches, store: Store, text: str) -> Part:
    cache = caches.make(store)
    await cache.embed(job(text), INFO, Model().embed)
    [part] = cache._parts.values()
    await caches.flush()
    return part


async def test_a_redis_that_goes_away_and_comes_back(
    tmp_path: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_SILENCE_S", 3600.0)
    with running_redis(tmp_path) as redis:
        cache, model = caches.make(RedisStore(redis.uri, 60, 10.0)), Model()
        await cache.embed(job("a"), INFO, model.embed)
        await caches.flush()
        redis.process.kill()
        redis.process.wait()
        before = num_errors()
        assert same(await cache.embed(job("b"), INFO, model.embed), await Model().embed(job("b")))
        assert num_errors() > before
        guarded = caches.open[0][1]
        assert guarded._silent_until > time.monotonic() + 3000
        assert (await cache.embed(job("a"), INFO, model.embed)).num_cached == 1  # the memory is still there


async def test_a_redis_that_comes_back_empty_is_used_again(tmp_path: Path, caches: Caches) -> None:
    with running_redis(tmp_path) as redis:
        cache = caches.make(RedisStore(redis.uri, 60, 10.0))
        await cache.embed(job("a"), INFO, Model().embed)
        await caches.flush()
        async with asyncio_redis.from_url(redis.uri) as client:
            await client.flushall()  # as after its restart
            await client.client_kill_filter(skipme=True)
        for text in ("b", "c"):  # the first finds its connection closed
            await cache.embed(job(text), INFO, Model().embed)
            await caches.flush()
        other = caches.make(RedisStore(redis.uri, 60, 10.0))
        answer = await other.embed(job("c"), INFO, Model().embed)
        assert answer.num_cached == 1
        assert same(answer, await Model().embed(job("c")))


async def test_after_a_failover_the_new_primary_is_written_to(tmp_path: Path, caches: Caches) -> None:
    """The old one keeps its connections, answers reads, and refuses writes."""
    with failing_over(tmp_path) as (uri, fail_over):
        cache = caches.make(RedisStore(uri, 60, 10.0))
        await cache.embed(job("a"), INFO, Model().embed)
        await caches.flush()
        await fail_over()
        for text in ("b", "c"):  # the first is refused
            await cache.embed(job(text), INFO, Model().embed)
            await caches.flush()
        found = await caches.make(RedisStore(uri, 60, 10.0)).embed(job("c"), INFO, Model().embed)
        assert found.num_cached == 1
        await caches.close()


async def test_wrong_entries_stay_forgotten_when_redis_evicts_their_generation(
    redis_server: Redis, caches: Caches
) -> None:
    part = await kept_part(caches, RedisStore(redis_server.uri, 60, 10.0), "wrong")
    cache = caches.open[0][0]
    cache.forget()
    await cache.embed(job("right"), INFO, Model().embed)
    await caches.flush()
    async with asyncio_redis.from_url(redis_server.uri) as client:
        await client.delete(b"gateway:cache:generation:" + part.group.encode())
    other = caches.make(RedisStore(redis_server.uri, 60, 10.0))
    assert (await other.embed(job("wrong"), INFO, Model().embed)).num_cached == 0


async def test_a_full_redis_is_read_and_forgets_and_says_what_to_set(
    tmp_path: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_SILENCE_S", 3600.0)
    with running_redis(tmp_path) as redis, capture_logs() as logs:
        first = caches.make(RedisStore(redis.uri, 60, 10.0))
        await first.embed(job("kept"), INFO, Model().embed)
        await caches.flush()
        async with asyncio_redis.from_url(redis.uri) as client:
            await client.config_set("maxmemory", "1")
        other = caches.make(RedisStore(redis.uri, 60, 10.0))
        await other.embed(job("new"), INFO, Model().embed)
        await caches.flush()
        assert (await other.embed(job("kept", "newer"), INFO, Model().embed)).num_cached == 1
        [line] = [line for line in logs if line["event"] == "cache_store_failed"]
        assert line["error"] == "Redis is full and evicts nothing: set its maxmemory-policy to allkeys-lru"

        other.forget()
        assert (await other.embed(job("kept"), INFO, Model().embed)).num_cached == 0
        await caches.close()


async def test_a_redis_that_only_reads_is_read_and_no_vector_is_logged(tmp_path: Path, caches: Caches) -> None:
    with running_redis(tmp_path) as redis, capture_logs() as logs:
        await kept_part(caches, RedisStore(redis.uri, 60, 10.0), "kept")
        async with asyncio_redis.from_url(redis.uri) as client:
            await client.config_set("min-replicas-to-write", 1)
        other = caches.make(RedisStore(redis.uri, 60, 10.0))
        assert (await other.embed(job("kept", "new"), INFO, Model().embed)).num_cached == 1
        await caches.flush()
        [line] = [line for line in logs if line["event"] == "cache_store_failed"]
        assert line["error"] == "NOREPLICAS Not enough good replicas to write."
        await caches.close()


@pytest.mark.parametrize(("user", "problem"), [(":wrong@", "invalid username-password"), ("", "authenticated")])
async def test_a_redis_with_another_password_says_so(
    tmp_path: Path, caches: Caches, user: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_SILENCE_S", 3600.0)
    with running_redis(tmp_path) as redis, capture_logs() as logs:
        async with asyncio_redis.from_url(redis.uri) as client:
            await client.config_set("requirepass", "secret")
        cache = caches.make(RedisStore(redis.uri.replace("//", f"//{user}"), 60, 10.0))
        for text in ("a", "b"):
            assert same(await cache.embed(job(text), INFO, Model().embed), await Model().embed(job(text)))
        await caches.flush()
        [line] = [line for line in logs if line["event"] == "cache_store_failed"]
        assert problem in line["error"]


async def test_a_redis_that_does_not_answer_costs_one_request_a_moment(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_S", 0.05)
    monkeypatch.setattr(stores, "_SILENCE_S", 3600.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cache = caches.make(RedisStore(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", 60, 0.05))
        started = time.monotonic()
        for i in range(20):
            await cache.embed(job(f"text {i}"), INFO, Model().embed)
        assert time.monotonic() - started < 5


async def test_forgetting_that_failed_is_repeated_before_redis_is_used_again(
    redis_server: Redis, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(redis_server.uri, 60, 10.0)
    cache = caches.make(store)
    await cache.embed(job("wrong"), INFO, Model().embed)
    await caches.flush()
    forget, failures = store.forget, iter([ConnectionError("away"), ConnectionError("away")])

    async def fail(part: Part) -> None:
        for failure in failures:
            raise failure
        await forget(part)

    monkeypatch.setattr(store, "forget", fail)
    cache.forget()
    for num_cached in (0, 1):  # by its own memory
        assert (await cache.embed(job("wrong"), INFO, Model().embed)).num_cached == num_cached
    await cache.embed(job("other"), INFO, Model().embed)
    await caches.close()
    assert (
        await caches.make(RedisStore(redis_server.uri, 60, 10.0)).embed(job("wrong"), INFO, Model().embed)
    ).num_cached == 0


# ---------------------------------------------------------------------------------------------------------------- disk


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_no_two_models_share_a_folder() -> None:
    names = ["a/b", "a--b", "a-/b", "a---b", "a-b", "a/b-", "a/b/c", "a--b/c", "a-/-b"]
    assert len({folder_of(name) for name in names}) == len(names)
    assert folder_of("BAAI/bge-m3") == "BAAI--bge-m3"


@pytest.mark.parametrize("suffix", [".rows", ".index"])
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        Path.unlink,
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["flipped", "empty", "noise", "short", "long", "gone", "folder"],
)
async def test_damaged_files_never_give_other_vectors(
    tmp_path: Path, caches: Caches, suffix: str, damage: Callable[[Path], object]
) -> None:
    await caches.make(DiskStore(tmp_path, 2**30)).embed(job(*TEXTS, outputs=ALL), INFO, Model().embed)
    await caches.close()
    for path in files(tmp_path, suffix):
        damage(path)
    cache, model = caches.make(DiskStore(tmp_path, 2**30)), Model()
    expected = await Model().embed(job(*TEXTS, "new", outputs=ALL))
    for _ in range(2):
        assert same(await cache.embed(job(*TEXTS, "new", outputs=ALL), INFO, model.embed), expected)
    await caches.close()
    again = caches.make(DiskStore(tmp_path, 2**30))
    assert same(await again.embed(job(*TEXTS, "new", outputs=ALL), INFO, Model().embed), expected)


async def test_files_that_are_damaged_while_they_are_open(tmp_path: Path, caches: Caches) -> None:
    """A mapped file that gets shorter would end the process."""
    cache, texts = caches.make(DiskStore(tmp_path, 2**30), max_bytes=3000), [f"text {i}" for i in range(100)]
    await cache.embed(job(*texts), INFO, Model().embed)
    await caches.flush()
    (path,) = files(tmp_path, ".rows")
    os.truncate(path, 100)
    model = Model()
    assert same(await cache.embed(job(*texts), INFO, model.embed), await Model().embed(job(*texts)))
    assert len(model.asked) > 80


async def test_the_disk_has_a_limit_and_keeps_used_entries(tmp_path: Path, caches: Caches) -> None:
    limit = 40_000
    cache, model = caches.make(DiskStore(tmp_path, limit), max_bytes=3000), Model()
    await cache.embed(job("often"), INFO, model.embed)
    for first in range(0, 2000, 50):
        await cache.embed(job(*(f"text {i}" for i in range(first, first + 50))), INFO, model.embed)
        await caches.flush()
        assert (await cache.embed(job("often"), INFO, model.embed)).num_cached == 1
        await caches.flush()
        assert size_of(tmp_path) < limit + 50 * 48 + 1000
    assert size_of(tmp_path) > limit // 2
    assert model.asked.count("often") == 1
    assert (await cache.embed(job("text 0"), INFO, model.embed)).num_cached == 0


async def test_a_folder_is_for_one_process(tmp_path: Path, caches: Caches) -> None:
    first, second = (caches.make(DiskStore(tmp_path, 2**30), max_bytes=10_000) for _ in range(2))
    await first.embed(job("a"), INFO, Model().embed)
    await caches.flush()
    before = num_errors()
    assert (await second.embed(job("a"), INFO, Model().embed)).num_cached == 0
    await caches.flush()
    assert num_errors() > before
    await first.close()
    await asyncio.to_thread(caches.open[0][1]._store._thread.join)
    assert (await second.embed(job("b"), INFO, Model().embed)).num_cached == 0
    await caches.flush()
    await caches.close()
    assert (await caches.make(DiskStore(tmp_path, 2**30)).embed(job("a", "b"), INFO, Model().embed)).num_cached == 2


async def test_a_full_disk(tmp_path: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries from before it was full are found, and new ones are kept once there is room again."""
    cache, is_full = caches.make(DiskStore(tmp_path, 2**30), max_bytes=3000), [False]
    write = disk_store.RowFile.add

    def add(self: disk_store.RowFile, entries: Sequence[tuple[bytes, int, bytes]]) -> None:
        if is_full[0]:
            self._rows.write(b"half")
            self._rows.flush()
            raise OSError(28, "No space left on device")
        write(self, entries)

    monkeypatch.setattr(disk_store.RowFile, "add", add)
    for text, is_full[0] in [("a", False), ("b", True), ("c", False)]:
        assert same(await cache.embed(job(text), INFO, Model().embed), await Model().embed(job(text)))
        await caches.flush()
    await caches.close()
    model = Model()
    found = await caches.make(DiskStore(tmp_path, 2**30)).embed(job("a", "b", "c"), INFO, model.embed)
    assert (found.num_cached, model.asked) == (2, ["b"])


async def test_a_disk_that_hangs_costs_one_request_a_moment(
    tmp_path: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_S", 0.05)
    monkeypatch.setattr(stores, "_SILENCE_S", 3600.0)
    store, hang = DiskStore(tmp_path, 2**30), threading.Event()
    cache = caches.make(store)
    monkeypatch.setattr(store, "_get", lambda *_args: hang.wait())
    started = time.monotonic()
    for i in range(20):
        await cache.embed(job(f"text {i}"), INFO, Model().embed)
    assert time.monotonic() - started < 5
    hang.set()


class SlowStore:
    """Stores entries in memory as soon as it is released."""

    name = "slow"

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.let_go = asyncio.Event()

    async def get(self, _part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.kept.get(key) for key in keys]

    async def put(self, _part: Part, entries: Mapping[bytes, bytes]) -> None:
        await self.let_go.wait()
        self.kept.update(entries)

    async def forget(self, _part: Part) -> None:
        self.kept.clear()

    async def close(self) -> None:
        pass


async def test_waiting_entries_are_stored_at_the_end_and_dropped_ones_are_counted(
    caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = await kept_part(caches, DiskStore(tmp_path, 2**30), "a")
    monkeypatch.setattr(stores, "_MAX_WAITING_BYTES", 100)
    store = SlowStore()
    guarded, before = Guarded("stored", store), num_errors()

    guarded.put(part, {b"a": b"1" * 100})
    guarded.put(part, {b"b": b"2"})
    assert num_errors() == before + 1
    asyncio.get_running_loop().call_later(0.05, store.let_go.set)
    await guarded.close()

    assert store.kept == {b"a": b"1" * 100}
    assert num_errors() == before + 1


async def test_more_than_can_be_written_is_dropped(
    tmp_path: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_MAX_WAITING_BYTES", 100)
    store, hang = DiskStore(tmp_path, 2**30), threading.Event()
    put = store._put
    monkeypatch.setattr(store, "_put", lambda part, entries: (hang.wait(), put(part, entries)))
    cache, before = caches.make(store, max_bytes=3000), num_errors()
    for i in range(20):
        with contextlib.suppress(TimeoutError):
            await cache.embed(job(f"text {i}"), INFO, Model().embed)
        if i == 0:
            monkeypatch.setattr(stores, "PATIENCE_S", 0.01)
    assert num_errors() - before >= 10
    hang.set()


async def test_the_memory_of_a_model_that_is_loaded_again_is_its_own(tmp_path: Path, caches: Caches) -> None:
    """Other weights under the same id: no entry of the old ones is ever used."""
    await caches.make(DiskStore(tmp_path, 2**30)).embed(job("a"), INFO, Model().embed)
    await caches.close()
    changed = replace(INFO, fingerprint="f" * 64)
    assert (await caches.make(DiskStore(tmp_path, 2**30)).embed(job("a"), changed, Model().embed)).num_cached == 0
    await caches.close()
    assert (await caches.make(DiskStore(tmp_path, 2**30)).embed(job("a"), INFO, Model().embed)).num_cached == 1


async def test_rows_of_a_model_without_dense_vectors(tmp_path: Path, caches: Caches) -> None:
    info = replace(INFO, width=0, dimensions=(), outputs=(Output.SPARSE,))
    wanted: EmbedJob = job(*TEXTS, outputs=frozenset({Output.SPARSE}))
    await caches.make(DiskStore(tmp_path, 2**30)).embed(wanted, info, Model(info).embed)
    await caches.close()
    found = await caches.make(DiskStore(tmp_path, 2**30)).embed(wanted, info, Model(info).embed)
    assert found.num_cached == 3
    assert same(found, await Model(info).embed(wanted))
