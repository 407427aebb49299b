"""Models that run on other servers: the requests to them, their answers, and their failures."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import numpy as np
import pytest

from gateway.backends.upstream import backend as backend_module
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.config.settings import Settings
from gateway.errors import (
    BadInput,
    ContextLengthExceeded,
    DeadlineExceeded,
    LoadError,
    ModelNotReady,
    NotReachable,
    Overloaded,
    RequestError,
    UpstreamFailed,
    UpstreamUnavailable,
)
from gateway.telemetry import metrics
from gateway.types import ModelState, Priority, Truncate
from tests.backends.remote import PATIENCE_S, TEXTS, States, entry, expected, job, loaded, wait_until
from tests.backends.stand_in import MODEL, WIDTH, StandIn, vector_of

# ---------------------------------------------------------------------------------------------- requests and answers


async def test_the_description_of_a_model(server: StandIn) -> None:
    async with loaded(entry(server, dimensions=(8,))) as backend:
        info = await backend.plan()

    assert (info.id, info.source, info.width, info.dimensions, info.max_tokens) == ("far", MODEL, WIDTH, (16, 8), 512)
    assert info.engine == f"openai at 127.0.0.1:{server.port}"
    assert not info.has_raw


@pytest.mark.parametrize("speaks_base64", [True, False])
async def test_vectors_come_back_in_the_order_of_the_texts(server: StandIn, speaks_base64: bool) -> None:
    server.speaks_base64 = speaks_base64
    async with loaded(entry(server)) as backend:
        embeddings = await backend.embed(job())

    np.testing.assert_array_equal(embeddings.vectors, expected())
    assert sum(embeddings.num_tokens) == 3 * len(TEXTS)
    assert server.bodies[-1] == {"model": MODEL, "input": TEXTS, "encoding_format": "base64"}


async def test_a_large_request_is_split_and_put_together_again(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"max_batch_texts": 4})) as backend:
        server.bodies.clear()
        embeddings = await backend.embed(job())

    np.testing.assert_array_equal(embeddings.vectors, expected())
    assert sorted(len(body["input"]) for body in server.bodies) == [2, 4, 4]


async def test_long_texts_are_split_by_their_length(server: StandIn) -> None:
    texts = ["long " * 50_000] * 3
    async with loaded(entry(server)) as backend:
        server.bodies.clear()
        await backend.embed(job(texts))

    assert sorted(len(body["input"]) for body in server.bodies) == [1, 2]  # sent at the same time


async def test_teis_own_limit_is_kept_and_its_words_are_used(server: StandIn) -> None:
    server.max_texts = 6
    async with loaded(entry(server, kind="tei")) as backend:
        server.bodies.clear()
        embeddings = await backend.embed(job(truncate=Truncate.START))
        info = await backend.plan()

    np.testing.assert_allclose(embeddings.vectors, expected(), rtol=1e-6)
    assert sum(embeddings.num_tokens) == 3 * len(TEXTS)
    assert sorted(len(body["inputs"]) for body in server.bodies[:2]) == [4, 6]
    assert {name: server.bodies[0][name] for name in ("normalize", "truncate", "truncation_direction")} == {
        "normalize": False,
        "truncate": True,
        "truncation_direction": "Left",
    }
    assert (info.max_tokens, info.dtype, info.has_raw) == (512, "float16", True)


@pytest.mark.parametrize(
    ("truncate", "expected_fields"),
    [(Truncate.END, (True, "Right")), (Truncate.START, (True, "Left")), (Truncate.REFUSE, (False, "Right"))],
)
async def test_tei_receives_the_side_to_cut(server: StandIn, truncate: Truncate, expected_fields: object) -> None:
    async with loaded(entry(server, kind="tei")) as backend:
        await backend.embed(job(truncate=truncate))

    assert (server.bodies[-1]["truncate"], server.bodies[-1]["truncation_direction"]) == expected_fields
    assert "prompt_name" not in server.bodies[-1]


@pytest.mark.parametrize(("truncate", "sent"), [(Truncate.END, {}), (Truncate.START, {"truncate": "START"})])
async def test_a_gateway_receives_the_side_to_cut(server: StandIn, truncate: Truncate, sent: dict[str, str]) -> None:
    async with loaded(entry(server)) as backend:
        await backend.embed(job(truncate=truncate))
        body = {"model": MODEL, "input": TEXTS, "encoding_format": "base64"}
        assert server.bodies[-1] == body | sent
        await backend.embed(job(truncate=Truncate.REFUSE))
        assert server.bodies[-1] == body | {"truncate": False}


@pytest.mark.parametrize(("kind", "name"), [("openai", "task"), ("tei", "prompt_name")])
async def test_a_task_is_sent_in_the_servers_words(server: StandIn, kind: str, name: str) -> None:
    model = entry(server, kind=kind, default_task="query", upstream={"tasks": {"query": "search"}})
    async with loaded(model) as backend:
        info = await backend.plan()
        embeddings = await backend.embed(job(task="retrieval.query"))

    assert (dict(info.tasks), info.default_task) == (
        {"retrieval.query": "", "retrieval.passage": ""},
        "retrieval.query",
    )
    assert server.bodies[-1][name] == "search"
    np.testing.assert_allclose(embeddings.vectors[0], vector_of(f"[search] {TEXTS[0]}"), rtol=1e-6)


async def test_instructions_are_put_before_the_text_for_servers_without_tasks(server: StandIn) -> None:
    async with loaded(entry(server, prompts={"query": "find: "})) as backend:
        await backend.embed(job(["cats"], task="retrieval.query"))

    assert server.bodies[-1]["input"] == ["find: cats"]
    assert "task" not in server.bodies[-1]


async def test_the_key_and_further_fields_are_sent(server: StandIn) -> None:
    server.key = "secret"
    model = entry(server, upstream={"api_key": "secret", "extra_body": {"truncate_prompt_tokens": -1}})
    async with loaded(model) as backend:
        await backend.embed(job())

    assert server.bodies[-1]["truncate_prompt_tokens"] == -1
    assert "secret" not in repr(model)


# ------------------------------------------------------------------------------------------------------------ loading


async def test_a_server_that_cannot_be_reached_is_reported() -> None:
    async with StandIn().serving() as server:
        pass

    with pytest.raises(NotReachable, match=rf"127.0.0.1:{server.port} cannot be reached"):
        await UpstreamBackend(entry(server), Settings()).plan()


async def test_without_a_key_none_is_sent(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        await backend.embed(job())

    assert all("authorization" not in headers for headers in server.headers)


async def test_nothing_is_known_of_a_model_before_it_is_planned(server: StandIn) -> None:
    backend = UpstreamBackend(entry(server), Settings())

    assert backend.probe == ()
    with pytest.raises(ModelNotReady, match="model 'far' is not loaded"):
        await backend.embed(job())
    await backend.stop()


async def test_an_openai_server_may_have_any_names_for_its_models(server: StandIn) -> None:
    async with loaded(entry(server, source="acme/other")) as backend:
        await backend.embed(job())

    assert server.bodies[-1]["model"] == "acme/other"


async def test_a_wrong_key_is_reported(server: StandIn) -> None:
    server.key = "secret"

    with pytest.raises(NotReachable, match="refuses the API key"):
        await UpstreamBackend(entry(server), Settings()).plan()


async def test_servers_with_different_models_are_refused(servers: tuple[StandIn, StandIn]) -> None:
    servers[1].weights = "other"

    with pytest.raises(LoadError, match=rf"127.0.0.1:{servers[1].port} gives different vectors than 127.0.0.1"):
        await UpstreamBackend(entry(*servers), Settings()).plan()


async def test_a_tei_that_serves_something_else_is_refused(server: StandIn) -> None:
    with pytest.raises(LoadError, match=r"serves acme/embed, and not acme/other"):
        await UpstreamBackend(entry(server, kind="tei", source="acme/other"), Settings()).plan()


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "error", "num_requests"),
    [
        ("500", UpstreamFailed, 1),  # it may have failed on these very texts
        ("502", UpstreamFailed, 3),
        ("503", UpstreamUnavailable, 3),
        ("429", Overloaded, 3),
        ("400", BadInput, 1),
        ("422", BadInput, 1),
        ("424", UpstreamFailed, 1),
        ("404", UpstreamUnavailable, 1),
        ("too long", ContextLengthExceeded, 1),
        ("half", UpstreamFailed, 3),
        ("garbage", UpstreamFailed, 3),
        ("one missing", UpstreamFailed, 3),
        ("nan", UpstreamFailed, 1),  # it would return the same again
    ],
)
@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_the_cost_of_a_fault_and_the_clients_error(
    server: StandIn, kind: str, fault: str, error: type[RequestError], num_requests: int
) -> None:
    async with loaded(entry(server, kind=kind)) as backend:
        server.bodies.clear()
        server.fault = fault
        with pytest.raises(error) as caught:
            await backend.embed(job())

    assert type(caught.value) is error
    assert len(server.bodies) == num_requests


@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "404", "half", "garbage", "one missing", "nan"])
async def test_another_server_answers_when_one_fails(servers: tuple[StandIn, StandIn], fault: str) -> None:
    async with loaded(entry(*servers)) as backend:
        servers[0].fault = fault
        for _ in range(6):
            embeddings = await backend.embed(job())
            np.testing.assert_array_equal(embeddings.vectors, expected())


async def test_a_server_says_when_it_wants_to_be_asked_again(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.fault, server.retry_after = "429", "30"
        server.bodies.clear()
        with pytest.raises(Overloaded) as caught:
            await backend.embed(job())

    assert caught.value.retry_after_s == 30
    assert len(server.bodies) == 1


async def test_a_server_that_is_slow_is_given_up(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"timeout_s": 0.3})) as backend:
        server.delay_s = 5
        with pytest.raises(UpstreamFailed, match=r"has not answered within 0\.3 s"):
            await backend.embed(job())


async def test_no_request_waits_beyond_the_clients_own_time(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.delay_s = 5
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await backend.embed(job(seconds=0.3))

    assert time.monotonic() - started < 4


async def test_a_server_that_fails_is_left_alone_and_let_in_again(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        servers[0].fault = "503"
        for _ in range(8):
            await backend.embed(job())
        asked_meanwhile = [body for body in servers[0].bodies if body["input"] == TEXTS]
        servers[0].fault = ""
        await wait_until(lambda: all(one.breaker.is_closed for one in backend.servers))
        servers[1].fault = "503"
        embeddings = await backend.embed(job())

    assert len(asked_meanwhile) <= 3  # then it was shut out, and no request was spent on it
    np.testing.assert_array_equal(embeddings.vectors, expected())


async def test_a_model_without_servers_recovers_when_one_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states, one = States(), StandIn()
    async with AsyncExitStack() as stack:
        async with one.serving():
            backend = await stack.enter_async_context(loaded(entry(one), states))
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable):
                await backend.embed(job())
        reason = await states.wait_for(ModelState.RECOVERING)
        with pytest.raises(UpstreamUnavailable, match="no server answers"):
            await backend.embed(job())
        async with one.serving():
            await states.wait_for(ModelState.READY)
            embeddings = await backend.embed(job())

    assert "cannot be reached" in reason
    np.testing.assert_array_equal(embeddings.vectors, expected())


async def test_another_width_is_noticed_at_once(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server), states) as backend:
        server.width = 8
        with pytest.raises(UpstreamFailed, match="8 dimensions, and gave 16 before: it runs another model"):
            await backend.embed(job())
        await states.wait_for(ModelState.RECOVERING)
        server.width = WIDTH
        await states.wait_for(ModelState.READY)


async def test_another_model_behind_the_same_name_is_shut_out(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server), states, golden_interval_s=0.2) as backend:
        server.weights = "other"
        reason = await states.wait_for(ModelState.RECOVERING)
        with pytest.raises(UpstreamUnavailable):
            await backend.embed(job())
        server.weights = "first"
        await states.wait_for(ModelState.READY)

    assert "gives different vectors than before, so it may run another model" in reason


async def test_other_vectors_of_one_of_two_servers_are_reported_once(servers: tuple[StandIn, StandIn]) -> None:
    """A cache of the model is emptied then, and the model continues with the other server."""
    states = States()
    async with loaded(entry(*servers), states, golden_interval_s=0.2) as backend:
        servers[0].weights = "other"
        await states.wait_for(ModelState.READY)
        num_trials = len(servers[0].bodies)
        await wait_until(lambda: len(servers[0].bodies) > num_trials + 2)  # it is probed again and again
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())
    assert [state for state, _reason in states.reported] == [ModelState.RECOVERING, ModelState.READY]
    assert "gives different vectors than before" in states.reported[0][1]


async def test_vectors_that_a_server_gave_before_it_failed_are_in_doubt_as_well(
    servers: tuple[StandIn, StandIn],
) -> None:
    """It served another model, and failed for another reason before a check; a cache may hold what it gave."""
    states = States()
    async with loaded(entry(*servers), states) as backend:
        servers[0].weights = "other"
        servers[0].bodies.clear()
        while not servers[0].bodies:
            await backend.embed(job())
        servers[0].fault = "503"
        while backend.servers[0].breaker.is_closed:
            await backend.embed(job())
        assert states.reported == []
        servers[0].fault = ""
        await wait_until(lambda: "another model" in backend.servers[0].breaker.reason)
        num_bodies = len(servers[0].bodies)
        await wait_until(lambda: len(servers[0].bodies) > num_bodies + 2)

    assert [state for state, _reason in states.reported] == [ModelState.RECOVERING, ModelState.READY]


async def test_a_server_that_comes_back_with_another_model_is_not_let_in(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        servers[0].fault = "503"
        while backend.servers[0].breaker.is_closed:
            await backend.embed(job())
        servers[0].fault, servers[0].weights = "", "other"
        await wait_until(lambda: "another model" in backend.servers[0].breaker.reason)
        for _ in range(8):
            np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())


# --------------------------------------------------------------------------------------------------------- many at once


async def test_requests_go_to_the_server_with_the_fewest_texts_in_flight(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        servers[0].delay_s = PATIENCE_S
        before = len(servers[0].bodies)
        first = [asyncio.create_task(backend.embed(job(["one"]))) for _ in servers]  # one on each
        await wait_until(lambda: len(servers[0].bodies) > before)
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        for i in range(10):
            await backend.embed(job([f"one by one {i}"]))
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)

    assert sum(body["input"][0].startswith("one by one") for body in servers[1].bodies) == 10


async def test_no_more_connections_than_allowed(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"max_connections": 3})) as backend:
        server.most_at_once, server.delay_s = 0, 0.05
        await asyncio.gather(*(backend.embed(job([f"{i}"])) for i in range(20)))

    assert server.most_at_once == 3


async def test_too_many_concurrent_texts_are_refused(server: StandIn) -> None:
    async with loaded(entry(server), max_queue_texts=15) as backend:
        server.delay_s = 0.2
        results = await asyncio.gather(*(backend.embed(job()) for _ in range(3)), return_exceptions=True)

    assert [type(result) for result in results[1:]] == [Overloaded, Overloaded]


async def test_the_first_failure_of_a_split_request_ends_it(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"max_batch_texts": 1})) as backend:
        server.fault = "400"
        with pytest.raises(BadInput):
            await backend.embed(job())


async def test_the_pause_between_attempts_is_bounded(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_FIRST_PAUSE_S", 100.0)
    async with loaded(entry(server, upstream={"max_retries": 50})) as backend:
        server.fault = "502"
        started = time.monotonic()
        with pytest.raises(UpstreamFailed):
            await backend.embed(job(seconds=1.0))

    assert time.monotonic() - started < 5


# ------------------------------------------------------------------------------------------------------ low priority


def waiting_texts(queue: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(f"gateway_{queue}_texts", {"model": "patient"})


async def test_a_server_has_one_low_priority_request_at_a_time(server: StandIn) -> None:
    texts = [f"patient {i}" for i in range(6)]
    async with loaded(entry(server, id="patient", upstream={"max_batch_texts": 2})) as backend:
        server.delay_s = 60
        server.bodies.clear()
        waiting = asyncio.create_task(backend.embed(job(texts, priority=Priority.LOW)))
        await wait_until(lambda: len(server.bodies) > 0)
        server.delay_s = 0.0

        # Others do not wait for it, and can use all of the memory.
        result = await backend.embed(job(["urgent"]))
        assert len(server.bodies) == 2
        assert waiting_texts("low_priority_queue") == 6
        assert waiting_texts("queue") == 0
        with pytest.raises(DeadlineExceeded, match="other low-priority requests were ahead"):
            await backend.embed(job(["another"], seconds=0.05, priority=Priority.LOW))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

        again = await backend.embed(job(texts, priority=Priority.LOW))

    np.testing.assert_array_equal(result.vectors, expected(["urgent"]))
    np.testing.assert_array_equal(again.vectors, expected(texts))
    assert waiting_texts("low_priority_queue") == 0


async def test_low_priority_may_have_a_quarter_of_the_texts_on_their_way(server: StandIn) -> None:
    async with loaded(entry(server), max_queue_texts=40) as backend:
        server.delay_s = 60
        server.bodies.clear()
        waiting = asyncio.create_task(backend.embed(job(["a"] * 8, priority=Priority.LOW)))
        await wait_until(lambda: len(server.bodies) > 0)
        with pytest.raises(
            Overloaded, match="8 low-priority texts are in progress, and this request has 3; the limit is 10"
        ):
            await backend.embed(job(["b"] * 3, priority=Priority.LOW))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_halves_of_a_low_priority_request_do_not_wait_for_each_other(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.max_texts = 2
        result = await backend.embed(job(priority=Priority.LOW))

    np.testing.assert_array_equal(result.vectors, expected())
