"""With a cache, every answer and every error is the same as without one."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.fake import fake_info
from gateway.cache.entries import Part, pack, part_of
from gateway.cache.model_cache import ModelCache
from gateway.cache.stores import Guarded
from gateway.errors import BadInput, ContextLengthExceeded, InferenceFailed, Overloaded, RequestError
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelKind, Output, SparseVector, Timings, Truncate

WIDTH, TOKEN_WIDTH, LIMIT = 4, 3, 6
EVERYTHING = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
INFO = fake_info(
    "model",
    WIDTH,
    outputs=EVERYTHING,
    token_width=TOKEN_WIDTH,
    max_tokens=LIMIT,
    tasks={"retrieval.query": "q: ", "retrieval.passage": ""},
)
TINY, ROOMY = 6000, 2**20


class Model:
    """Computes vectors from the words of a text, and counts the texts."""

    def __init__(self, info: ModelInfo = INFO) -> None:
        self.info = info
        self.asked: list[str] = []
        self.before: Callable[[EmbedJob], None] = lambda _job: None
        self.held: asyncio.Event | None = None

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.asked += job.texts
        self.before(job)
        if self.held is not None:
            await self.held.wait()
        rows = [self._read(i, text, job) for i, text in enumerate(job.texts)]
        num_tokens = [len(words) for words in rows]
        job.check_total(sum(num_tokens))
        return Embeddings(
            vectors=np.array([self._numbers(words, job, self.info.width) for words in rows], np.float32).reshape(
                len(rows), self.info.width
            ),
            num_tokens=num_tokens,
            truncated=[i for i, text in enumerate(job.texts) if len(text.split()) > LIMIT],
            timings=Timings(1.0, 2.0, 3.0),
            sparse=[self._sparse(words, job) for words in rows] if Output.SPARSE in job.outputs else None,
            multivectors=[
                np.array([self._numbers([word], job, TOKEN_WIDTH) for word in words], np.float32).reshape(
                    -1, TOKEN_WIDTH
                )
                for words in rows
            ]
            if Output.MULTIVECTOR in job.outputs
            else None,
        )

    def _read(self, i: int, text: str, job: EmbedJob) -> list[str]:
        words = text.split()
        if not words:
            raise BadInput(f"input[{i}] has no tokens")
        if len(words) > LIMIT and job.truncate is Truncate.REFUSE:
            raise ContextLengthExceeded(f"input[{i}] has {len(words)} tokens; the limit is {LIMIT}")
        return words[-LIMIT:] if job.truncate is Truncate.START else words[:LIMIT]

    def _numbers(self, words: Sequence[str], job: EmbedJob, width: int) -> np.ndarray:
        seed = zlib.crc32(f"{job.task}{words}".encode())
        return np.random.default_rng(seed).standard_normal(width)

    def _sparse(self, words: Sequence[str], job: EmbedJob) -> SparseVector:
        indices = np.unique([zlib.crc32(word.encode()) % 250_000 for word in words]).astype(np.int64)
        return SparseVector(indices, self._numbers(words, job, len(indices)).astype(np.float32))


def job(*texts: str, **changes: object) -> EmbedJob:
    made = EmbedJob(list(texts), "retrieval.query", Truncate.END, time.monotonic() + 60, "someone")
    return replace(made, **{"outputs": frozenset({Output.DENSE}), **changes})


def make_cache(max_bytes: int = ROOMY, **changes: bool) -> ModelCache:
    return ModelCache("model", max_bytes, None, **{"is_remote": False, "is_per_client": False, **changes})


async def outcome(embed: Callable[[EmbedJob], Awaitable[Embeddings]], job: EmbedJob) -> object:
    """Return everything about an answer except its times and its cached texts, or the error."""
    try:
        answer = await embed(job)
    except RequestError as error:
        return type(error), error.message, error.is_permanent

    def plain(value: object) -> object:
        match value:
            case np.ndarray():
                return value.dtype, value.shape, value.tobytes()
            case SparseVector():
                return plain(value.indices), plain(value.values)
            case list() | tuple():
                return [plain(item) for item in value]
            case _:
                return value

    return {
        name.name: plain(getattr(answer, name.name))
        for name in fields(answer)
        if name.name not in ("timings", "num_cached")
    }


words = st.sampled_from(["a", "b", "ä b", "a b c d e f g", "b b c d e f g h", "a b c d e f", " a", "", "日本"])
jobs = st.builds(
    lambda texts, task, truncate, outputs, limit: job(
        *texts, task=task, truncate=truncate, outputs=outputs, max_total_tokens=limit
    ),
    st.lists(words, max_size=5),
    st.sampled_from(["retrieval.query", "retrieval.passage", None]),
    st.sampled_from(Truncate),
    st.sets(st.sampled_from(EVERYTHING), min_size=1).map(frozenset),
    st.sampled_from([None, 12]),
)


@given(st.lists(jobs, max_size=12), st.sampled_from([TINY, ROOMY]))
@settings(max_examples=80, deadline=None)
def test_answers_and_errors_are_those_without_a_cache(jobs: Sequence[EmbedJob], max_bytes: int) -> None:
    async def check() -> None:
        model, cache = Model(), make_cache(max_bytes)
        for some in jobs:
            found = await outcome(lambda job: cache.embed(job, INFO, model.embed), some)
            expected = await outcome(Model().embed, some)
            if isinstance(expected, tuple) and expected[0] is BadInput and "together" in expected[1]:
                assert found[:1] == expected[:1]  # "at least", as far as it was counted
            else:
                assert found == expected
            assert cache.stats().num_bytes <= max_bytes

    asyncio.run(check())


async def test_only_the_texts_that_are_not_known_are_computed() -> None:
    model, cache = Model(), make_cache()
    first = await cache.embed(job("a", "b"), INFO, model.embed)
    second = await cache.embed(job("c", "b", "a", "c"), INFO, model.embed)
    third = await cache.embed(job("c", "b"), INFO, model.embed)

    assert model.asked == ["a", "b", "c", "c"]
    assert [first.num_cached, second.num_cached, third.num_cached] == [0, 2, 2]
    assert second.vectors.tolist() == (await Model().embed(job("c", "b", "a", "c"))).vectors.tolist()
    assert third.timings == Timings(0, 0, 0)
    assert cache.hit_rate == 4 / 8


async def test_an_entry_with_more_outputs_answers_for_fewer() -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a", outputs=frozenset(EVERYTHING)), INFO, model.embed)
    for outputs in ({Output.DENSE}, {Output.SPARSE}, {Output.SPARSE, Output.MULTIVECTOR}):
        assert (await cache.embed(job("a", outputs=frozenset(outputs)), INFO, model.embed)).num_cached == 1
    assert model.asked == ["a"]


async def test_a_text_that_fits_is_known_for_each_way_of_truncation() -> None:
    model, cache = Model(), make_cache()
    long = "a b c d e f g"
    await cache.embed(job("a", long), INFO, model.embed)
    for truncate, num_cached in [(Truncate.START, 1), (Truncate.START, 2), (Truncate.END, 1), (Truncate.END, 2)]:
        assert (await cache.embed(job("a", long, truncate=truncate), INFO, model.embed)).num_cached == num_cached
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 7 tokens"):
        await cache.embed(job("a", long, truncate=Truncate.REFUSE), INFO, model.embed)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_late_chunked": True},
        {"query": "q"},
        {"firsts": [None]},
        {"scorer": lambda *_outputs: 1.0},
        {"max_text_tokens": 2},
        {"outputs": frozenset({Output.STATES})},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_inputs_other_than_plain_texts_are_computed_each_time(changes: dict[str, object]) -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a"), INFO, model.embed)
    for _ in range(2):
        assert (await cache.embed(job("a", **changes), INFO, model.embed)).num_cached is None
    assert model.asked == ["a"] * 3
    assert cache.hit_rate == 0


async def test_labels_are_computed_each_time() -> None:
    info = replace(INFO, kind=ModelKind.CLASSIFY)
    model, cache = Model(info), make_cache()
    for _ in range(2):
        await cache.embed(job("a"), info, model.embed)
    assert model.asked == ["a", "a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "0" * 64},
        {"tasks": {"retrieval.query": "Q: ", "retrieval.passage": ""}},
        {"dtype": "float16"},
        {"device": "cuda:0"},
        {"engine": "other"},
        {"max_tokens": 5},
        {"is_normalized": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_vectors_that_depend_on_different_settings_are_kept_apart(changes: dict[str, object]) -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a"), INFO, model.embed)
    assert (await cache.embed(job("a"), replace(INFO, **changes), model.embed)).num_cached == 0
    assert (await cache.embed(job("a"), INFO, model.embed)).num_cached == 1


async def test_tasks_of_one_space_are_kept_apart() -> None:
    model, cache = Model(), make_cache()
    assert INFO.space("retrieval.query") == INFO.space("retrieval.passage")
    for task in (*INFO.tasks, None):
        assert (await cache.embed(job("a", task=task), INFO, model.embed)).num_cached == 0
    assert len(model.asked) == 3


async def test_a_client_may_get_only_its_own() -> None:
    model, cache = Model(), make_cache(is_per_client=True)
    for caller, num_cached in [("one", 0), ("other", 0), ("one", 1), ("other", 1)]:
        assert (await cache.embed(job("a", caller=caller), INFO, model.embed)).num_cached == num_cached


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0])
async def test_a_vector_that_cannot_be_finished_is_not_kept(number: float) -> None:
    model, cache = Model(), make_cache()

    async def broken(job: EmbedJob) -> Embeddings:
        answer = await model.embed(job)
        answer.vectors[0] = number
        return answer

    await cache.embed(job("a", "b"), INFO, broken)
    assert (await cache.embed(job("a", "b"), INFO, model.embed)).num_cached == 1


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("output", [Output.SPARSE, Output.MULTIVECTOR])
async def test_an_output_that_is_not_finite_is_not_kept(output: Output, number: float) -> None:
    model, cache = Model(), make_cache()
    asked = job("a", "b", outputs=frozenset({Output.DENSE, output}))

    async def broken(job: EmbedJob) -> Embeddings:
        answer = await model.embed(job)
        numbers = answer.multivectors[0] if answer.sparse is None else answer.sparse[0].values
        numbers[0] = number
        return answer

    await cache.embed(asked, INFO, broken)
    assert (await cache.embed(asked, INFO, model.embed)).num_cached == 1


async def test_vectors_of_a_wrong_width_are_passed_on_and_not_kept() -> None:
    model, cache = Model(), make_cache()

    async def narrow(job: EmbedJob) -> Embeddings:
        answer = await model.embed(job)
        return replace(answer, vectors=answer.vectors[:, :2])

    assert (await cache.embed(job("a"), INFO, narrow)).vectors.shape == (1, 2)
    await cache.embed(job("b"), INFO, model.embed)
    assert (await cache.embed(job("a", "b"), INFO, narrow)).vectors.shape == (2, 2)
    assert (await cache.embed(job("a", "b"), INFO, model.embed)).num_cached == 1


@pytest.mark.parametrize(("output", "field"), [(Output.SPARSE, "sparse"), (Output.MULTIVECTOR, "multivectors")])
async def test_an_answer_without_an_output_is_passed_on_and_not_kept(output: Output, field: str) -> None:
    model, cache = Model(), make_cache()
    asked = job("a", outputs=frozenset({Output.DENSE, output}))

    async def without(job: EmbedJob) -> Embeddings:
        return replace(await model.embed(job), **{field: None})

    assert getattr(await cache.embed(asked, INFO, without), field) is None
    complete = await cache.embed(asked, INFO, model.embed)
    assert (len(getattr(complete, field)), complete.num_cached) == (1, 0)


async def test_a_passing_error_is_not_asked_for_twice() -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a"), INFO, model.embed)

    def refuse(_job: EmbedJob) -> None:
        raise Overloaded("full")

    model.before = refuse
    with pytest.raises(Overloaded):
        await cache.embed(job("a", "b"), INFO, model.embed)
    assert model.asked == ["a", "b"]
    assert (await cache.embed(job("a"), INFO, model.embed)).num_cached == 1


async def test_an_error_of_a_text_names_its_place_in_the_request() -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a"), INFO, model.embed)

    def fail(job: EmbedJob) -> None:
        if "poison" in job.texts:
            raise InferenceFailed(f"input[{job.texts.index('poison')}]: it fails", is_permanent=True)

    model.before = fail
    with pytest.raises(InferenceFailed, match=r"input\[2\]: it fails"):
        await cache.embed(job("a", "a", "poison"), INFO, model.embed)


async def test_nothing_that_was_computed_before_something_went_wrong_is_used_after() -> None:
    model, cache = Model(), make_cache()
    await cache.embed(job("a"), INFO, model.embed)
    model.held = asyncio.Event()
    running = asyncio.create_task(cache.embed(job("b"), INFO, model.embed))
    await asyncio.sleep(0)
    cache.forget()
    model.held.set()
    await running
    assert (await cache.embed(job("a", "b"), INFO, model.embed)).num_cached == 0
    assert (await cache.embed(job("a", "b"), INFO, model.embed)).num_cached == 2


async def test_memory_is_reserved_for_all_texts() -> None:
    """Also for those that are not computed: the answer has the vectors of all."""
    model, cache, counts = Model(), make_cache(), list[int]()
    await cache.embed(job("a b", "c"), INFO, model.embed)
    await cache.embed(job("a b", "c", on_tokens=counts.append), INFO, model.embed)
    await cache.embed(job("a b", "d e f", on_tokens=counts.append), INFO, model.embed)
    assert counts == [3, 5]


async def test_a_cache_that_no_vector_fits_into_says_so_once() -> None:
    model = Model()
    for max_bytes, is_told in ((100, True), (ROOMY, False)):
        cache = make_cache(max_bytes)
        with structlog.testing.capture_logs() as logs:
            for text in ("a", "b"):
                await cache.embed(job(text), INFO, model.embed)
        assert [line["event"] for line in logs] == (["cache_too_small"] if is_told else [])


async def test_servers_say_how_many_tokens_a_request_has() -> None:
    """A repeated request gets the same number; otherwise, each text counts by its length."""
    model, cache = Model(), make_cache(is_remote=True)

    async def remote(job: EmbedJob) -> Embeddings:
        answer = await model.embed(job)
        return replace(answer, num_tokens=[sum(answer.num_tokens), *[0] * (len(job.texts) - 1)], truncated=[])

    texts = ["a b c", "d", "e f g h", ""[:0] or "i"]
    first = await cache.embed(job(*texts), INFO, remote)
    again = await cache.embed(job(*texts), INFO, remote)
    assert (again.num_cached, sum(again.num_tokens), sum(first.num_tokens)) == (4, 9, 9)
    some = await cache.embed(job(texts[0], "new text"), INFO, remote)
    assert (some.num_cached, sum(some.num_tokens)) == (1, 3 + 2)


@pytest.mark.parametrize("num_tokens", [2**30 - 1, 2**30, 2**32, 2**53])
async def test_a_server_may_report_any_number_of_tokens(num_tokens: int) -> None:
    model, cache = Model(), make_cache(is_remote=True)

    def refuse(num_tokens: int) -> None:
        raise AssertionError(f"{num_tokens} tokens are checked")

    async def remote(job: EmbedJob) -> Embeddings:
        answer = await model.embed(replace(job, on_tokens=lambda _num_tokens: None))
        return replace(answer, num_tokens=[num_tokens, *[0] * (len(job.texts) - 1)])

    for _ in range(2):
        answer = await cache.embed(job("a b", "c", on_tokens=refuse), INFO, remote)
        assert sum(answer.num_tokens) == num_tokens
        assert answer.truncated == []


async def test_servers_do_not_report_the_texts_that_they_cut() -> None:
    model, cache = Model(), make_cache(is_remote=True)
    for _ in range(2):
        for truncate in (Truncate.END, Truncate.START):
            await cache.embed(job("a b c d e f g", truncate=truncate), INFO, model.embed)
        with pytest.raises(ContextLengthExceeded):
            await cache.embed(job("a b c d e f g", truncate=Truncate.REFUSE), INFO, model.embed)
    assert len(model.asked) == 4


async def test_the_metrics_of_a_cache() -> None:
    def value(metric: object, *labels: str) -> float:
        return metrics.values(metric).get(("metered", *labels), 0.0)

    model = Model()
    cache = ModelCache("metered", TINY, None, is_remote=False, is_per_client=False)
    texts = [f"text {i}" for i in range(60)]
    await cache.embed(job(*texts), INFO, model.embed)
    await cache.embed(job(texts[-1], "new"), INFO, model.embed)
    assert value(metrics.CACHE_TEXTS, "memory") == 1
    assert value(metrics.CACHE_TEXTS, "miss") == 61
    assert value(metrics.CACHE_BYTES) == cache.stats().num_bytes > TINY / 2
    assert value(metrics.CACHE_EVICTIONS) == 61 - cache.stats().num_entries
    await cache.close()
    assert value(metrics.CACHE_BYTES) == 0


def entry(*numbers: float) -> bytes:
    return pack(2, None, np.array(numbers, "<f4").tobytes())


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"\0" * 3,
        entry(),
        entry(1, 2, 3),
        entry(1, 2, 3, 4, 5),
        entry(*range(8)),
        entry(1, 2, 3, np.nan),
        entry(1, 2, 3, np.inf),
        entry(0, 0, 0, 0),
        entry(1, 2, 3, 4) + b"\0",
    ],
    ids=range(10),
)
@pytest.mark.parametrize("output", EVERYTHING)
async def test_entries_that_cannot_be_an_answer_are_computed_again(forged: bytes, output: Output) -> None:
    class Forged:
        name = "redis"

        async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
            return [forged if part.output is output else None for _ in keys]

        async def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
            pass

        async def forget(self, part: Part) -> None:
            pass

        async def close(self) -> None:
            pass

    model = Model()
    cache = ModelCache("model", ROOMY, Guarded("model", Forged()), is_remote=False, is_per_client=False)
    wanted = job("a b", outputs=frozenset({output}))

    found = await cache.embed(wanted, INFO, model.embed)

    assert await outcome(Model().embed, wanted) == await outcome(model.embed, wanted)
    assert found.num_cached == 0
    assert model.asked[0] == "a b"


async def test_keys_of_clients_and_of_texts_are_apart() -> None:
    shared, apart = (
        part_of(INFO, job("a"), Output.DENSE, is_remote=False, is_per_client=is_per_client)
        for is_per_client in (False, True)
    )
    assert shared.name != apart.name
