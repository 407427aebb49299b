"""A failure on another server costs only its cause: the text, the request or the server."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from starlette.responses import JSONResponse, RedirectResponse, Response
from structlog.testing import capture_logs

from gateway.backends.upstream import breaker as breaker_module
from gateway.backends.upstream import watch as watch_module
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.config.settings import Settings
from gateway.errors import (
    BadInput,
    ContextLengthExceeded,
    DeadlineExceeded,
    NotReachable,
    Overloaded,
    RequestError,
    UpstreamFailed,
    UpstreamUnavailable,
)
from gateway.telemetry import metrics
from gateway.types import ModelState, Truncate
from tests.backends.remote import TEXTS, States, entry, expected, job, loaded, wait_until
from tests.backends.stand_in import MODEL, WIDTH, StandIn, vector_of

POISON = "bad"


async def fail(backend: UpstreamBackend, error: type[RequestError], texts: list[str], **changes: Any) -> RequestError:
    with pytest.raises(error) as caught:
        await backend.embed(job(texts, **changes))
    return caught.value


def num_trials(server: StandIn) -> int:
    """Return how often the probe was asked since the bodies were cleared."""
    return sum("Hello, world" in body.get("input", body.get("inputs")) for body in server.bodies)


# --------------------------------------------------------------------------------------------- one text and its server


@pytest.mark.parametrize("fault", ["nan", "500", "404", "403", "garbage", "half", "502", "503", "424", "one missing"])
@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_a_text_on_which_a_server_fails_does_not_take_it_from_others(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    monkeypatch.setattr(breaker_module, "_LEAST_PAUSE_S", 0.1)  # between two trials
    states = States()
    async with loaded(entry(server, kind=kind), states) as backend:
        server.fault, server.fault_on = fault, POISON
        server.bodies.clear()
        for _ in range(4):
            await fail(backend, RequestError, ["fine", POISON])
            np.testing.assert_allclose((await backend.embed(job())).vectors, expected(), rtol=1e-6)
        for _ in range(4):
            await fail(backend, RequestError, [POISON])
        await wait_until(lambda: num_trials(server) > 0)
        np.testing.assert_allclose((await backend.embed(job())).vectors, expected(), rtol=1e-6)

    assert states.reported == []


@pytest.mark.parametrize("fault", ["nan", "500", "404", "garbage", "half", "503"])
async def test_a_server_that_fails_at_the_probe_as_well_is_shut_out(server: StandIn, fault: str) -> None:
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = fault
        for _ in range(3):
            await fail(backend, RequestError, ["any"])
        reason = await states.wait_for(ModelState.RECOVERING)
        refusal = await fail(backend, UpstreamUnavailable, ["any"])
        server.fault = ""
        await states.wait_for(ModelState.READY)
        await backend.embed(job())

    assert f"127.0.0.1:{server.port}" in reason
    assert "no server answers" in refusal.message


@pytest.mark.parametrize("fault", ["nan", "500", "404", "narrow"])
async def test_one_grave_failure_is_investigated_immediately(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(watch_module, "_LOOK_S", 1000.0)  # only when it is called for
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = fault
        server.width = 8 if fault == "narrow" else WIDTH
        await fail(backend, RequestError, ["any"])
        await states.wait_for(ModelState.RECOVERING)


async def test_the_probe_is_not_asked_more_than_once_a_second(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.fault, server.fault_on = "nan", POISON
        server.bodies.clear()
        started = asyncio.get_running_loop().time()
        while num_trials(server) < 1:
            await fail(backend, UpstreamFailed, [POISON])
        for _ in range(50):
            await fail(backend, UpstreamFailed, [POISON])
        seconds = asyncio.get_running_loop().time() - started
        found = num_trials(server)

    assert found <= 1 + seconds


async def test_several_attempts_of_one_request_are_one_failure(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"max_retries": 5})) as backend:
        server.fault, server.fault_on = "502", POISON
        server.bodies.clear()
        await fail(backend, UpstreamFailed, [POISON])
        await fail(backend, UpstreamFailed, [POISON])
        assert len(server.bodies) == 12
        assert not backend.servers[0].breaker.is_suspect
        await fail(backend, UpstreamFailed, [POISON])
        await wait_until(lambda: num_trials(server) > 0)


async def test_a_suspect_server_is_passed_over_while_there_is_another(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        first, second = backend.servers
        servers[0].delay_s = 60  # the trial does not end in this test
        first.breaker.note_failure(is_grave=True)
        second.num_texts += 1000  # would be skipped otherwise
        for _ in range(5):
            await backend.embed(job())


async def test_a_request_that_was_refused_says_nothing_of_the_server(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.fault, server.fault_on = "too long", POISON
        for _ in range(10):
            await fail(backend, BadInput, [POISON])
        assert not backend.servers[0].breaker.is_suspect
        server.fault, server.fault_on = "400", POISON
        for _ in range(10):
            await fail(backend, BadInput, [POISON])
            await backend.embed(job(["any"]))
        assert not backend.servers[0].breaker.is_suspect
        server.fault, server.fault_on = "429", ""
        for _ in range(10):
            await fail(backend, Overloaded, ["any"])
        assert not backend.servers[0].breaker.is_suspect


async def test_texts_that_are_refused_again_and_again_shut_no_server_out(server: StandIn) -> None:
    """The probe is sent, and is not refused."""
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault, server.fault_on = "400", POISON
        server.bodies.clear()
        for _ in range(10):
            await fail(backend, BadInput, [POISON])
        await wait_until(lambda: any(POISON not in body["input"] for body in server.bodies))
        await wait_until(lambda: not backend.servers[0].breaker.is_suspect)

        await backend.embed(job(["any"]))
    assert states.reported == []


async def test_a_server_that_refuses_everything_is_shut_out_and_no_client_is_blamed(server: StandIn) -> None:
    """Some answer 400 for a model that they no longer have, or for an expired key."""
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = "400"
        for _ in range(3):
            await fail(backend, BadInput, ["any"])
        assert "as was commanded" in await states.wait_for(ModelState.RECOVERING)

        await fail(backend, UpstreamUnavailable, ["any"])


async def test_one_text_that_is_too_long_does_not_make_all_requests_small(server: StandIn) -> None:
    """llama.cpp's message mentions its batch of tokens, with either status."""
    message = "input (600 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    async with loaded(entry(server)) as backend:
        for status in (400, 500):
            error = JSONResponse({"error": {"message": message}}, status)
            server.respond = lambda body, error=error: error if POISON in body["input"] else None  # type: ignore[misc]
            found = await fail(backend, ContextLengthExceeded, ["a", "b", POISON])
            assert "too large to process" in found.message
        server.bodies.clear()
        await backend.embed(job())

        assert [len(body["input"]) for body in server.bodies] == [len(TEXTS)]
        assert not backend.servers[0].breaker.is_suspect


async def test_a_client_in_a_hurry_does_not_shut_a_server_out(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server), states) as backend:
        server.delay_s = 0.3
        server.bodies.clear()
        for _ in range(4):
            await fail(backend, DeadlineExceeded, ["any"], seconds=0.02)
        await wait_until(lambda: num_trials(server) > 0 and not backend.servers[0].breaker.is_suspect)
        await backend.embed(job())

    assert states.reported == []


async def test_a_server_that_hangs_is_found_even_if_no_client_waits_for_its_time_limit(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server, upstream={"timeout_s": 1.0}), states) as backend:
        server.delay_s = 60
        for _ in range(3):
            await fail(backend, DeadlineExceeded, ["any"], seconds=0.1)
        assert "has not answered within 1 s" in await states.wait_for(ModelState.RECOVERING)


async def test_a_busy_server_is_not_taken_for_a_broken_one(server: StandIn) -> None:
    """The probe is refused because of the load, which shows that the server works."""
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = "429"
        backend.servers[0].breaker.note_failure(is_grave=True)
        server.bodies.clear()
        await wait_until(lambda: num_trials(server) >= 2)  # and it is asked again
        server.fault = ""
        await wait_until(lambda: not backend.servers[0].breaker.is_suspect)

    assert states.reported == []


async def test_a_server_that_answers_others_in_the_meantime_does_not_count_as_hung(server: StandIn) -> None:
    """It is too slow for the probe, but does not hang: a client's request is answered in the same time."""
    states = States()
    async with loaded(entry(server, upstream={"timeout_s": 1.0}), states) as backend:
        server.bodies.clear()
        server.delay_s = 60
        backend.servers[0].breaker.note_failure(is_grave=True)
        await wait_until(lambda: num_trials(server) > 0)
        server.delay_s = 0.0
        await backend.embed(job())
        await wait_until(lambda: num_trials(server) > 1)  # and is tried again

    assert states.reported == []


async def test_the_probe_does_not_wait_for_clients(server: StandIn) -> None:
    async with loaded(entry(server, upstream={"max_connections": 1, "timeout_s": 600.0})) as backend:
        server.delay_s = 600
        server.bodies.clear()
        task = asyncio.create_task(backend.embed(job(seconds=600)))
        await wait_until(lambda: len(server.bodies) > 0)
        server.delay_s = 0.0
        backend.servers[0].breaker.note_failure(is_grave=True)
        await wait_until(lambda: not backend.servers[0].breaker.is_suspect)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert num_trials(server) == 1


async def test_a_hung_server_does_not_keep_others_from_their_trial(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        first, second = backend.servers
        servers[0].delay_s = 60
        servers[0].bodies.clear()
        first.breaker.note_failure(is_grave=True)
        await wait_until(lambda: num_trials(servers[0]) > 0)
        second.breaker.note_failure(is_grave=True)
        await wait_until(lambda: not second.breaker.is_suspect)

        assert first.breaker.is_suspect


async def test_a_server_that_is_shut_out_and_busy_stays_out(server: StandIn) -> None:
    """Nothing shows that its vectors are right."""
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = "500"
        await fail(backend, UpstreamFailed, ["any"])
        await states.wait_for(ModelState.RECOVERING)
        server.fault = "429"
        await wait_until(lambda: "is overloaded (429)" in backend.servers[0].breaker.reason)
        server.fault = ""
        await states.wait_for(ModelState.READY)

    assert [state for state, _ in states.reported] == [ModelState.RECOVERING, ModelState.READY]


async def test_a_change_of_the_state_is_logged_with_the_model(server: StandIn) -> None:
    states = States()
    with capture_logs() as lines:
        async with loaded(entry(server, id="logged"), states) as backend:
            server.fault = "500"
            await fail(backend, UpstreamFailed, ["any"])
            await states.wait_for(ModelState.RECOVERING)
            server.fault = ""
            await states.wait_for(ModelState.READY)

    events = [line for line in lines if line["event"] == "upstream_state"]
    assert [(line["model"], line["is_ready"]) for line in events] == [("logged", False), ("logged", True)]
    assert "answers 500" in events[0]["reasons"]


async def test_after_a_suspicion_the_next_trial_waits(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_LOOK_S", 1000.0)
    monkeypatch.setattr(watch_module, "_SETTLE_S", 0.0)
    looks = 0

    def look(_now: float) -> bool:
        nonlocal looks
        looks += 1
        return False

    async with loaded(entry(server)) as backend:
        monkeypatch.setattr(backend.servers[0].breaker, "is_trial_due", look)
        server.fault = "500"
        await fail(backend, UpstreamFailed, ["any"])
        await wait_until(lambda: looks > 0)
        for _ in range(100):
            await asyncio.sleep(0)

    assert looks <= 2


# ------------------------------------------------------------------------------------------------- which text it was


@pytest.mark.parametrize("kind", ["openai", "tei"])
@pytest.mark.parametrize("bad", [[float("nan")] * WIDTH, [None] * WIDTH, None, [], [0.0] * WIDTH, [1e39] * WIDTH])
async def test_a_vector_that_cannot_be_used_names_its_text(server: StandIn, kind: str, bad: object) -> None:
    texts = [f"t{i}" for i in range(10)]

    def spoil(answer: Any) -> Any:
        rows = answer if kind == "tei" else answer["data"]
        if len(rows) == 4:
            for row_or_item in [rows[1], rows[3]] if kind == "tei" else [rows[2], rows[0]]:  # written in reverse
                place = rows.index(row_or_item)
                if kind == "tei":
                    rows[place] = bad
                else:
                    row_or_item["embedding"] = bad
        return answer

    async with loaded(entry(server, kind=kind, upstream={"max_batch_texts": 4})) as backend:
        server.bodies.clear()
        server.rewrite = spoil
        error = await fail(backend, UpstreamFailed, texts[:8])

    assert error.is_permanent  # x-should-retry: false
    assert any(f"for texts {first}, {first + 2} (counted from 0)" in error.message for first in (1, 5)), error.message
    asked = [body.get("input", body.get("inputs")) for body in server.bodies]
    assert sum(part == texts[:4] for part in asked) <= 1  # nothing was sent again
    assert sum(part == texts[4:8] for part in asked) <= 1


async def test_of_many_texts_the_first_are_named(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.fault = "nan"
        error = await fail(backend, UpstreamFailed, TEXTS)
        server.fault_on = TEXTS[3]
        alone = await fail(backend, UpstreamFailed, TEXTS)

    assert "for texts 0, 1, 2, 3, 4 and 5 more (counted from 0)" in error.message
    assert "gives a vector that is not finite (NaN or infinity) for text 3 (counted from 0)" in alone.message


async def test_another_server_is_asked_for_a_text_that_one_cannot_embed(servers: tuple[StandIn, StandIn]) -> None:
    async with loaded(entry(*servers)) as backend:
        servers[0].fault, servers[0].fault_on = "nan", POISON
        for _ in range(6):
            embeddings = await backend.embed(job([POISON]))
            np.testing.assert_array_equal(embeddings.vectors, expected([POISON]))


async def test_a_server_does_not_get_a_request_again_that_would_fail_again(servers: tuple[StandIn, StandIn]) -> None:
    """One server returns no vector for a text, and the other drops the connection: only the latter is worth a retry."""
    async with loaded(entry(*servers, upstream={"max_retries": 6})) as backend:
        servers[0].fault, servers[1].fault = "nan", "half"
        servers[0].fault_on = servers[1].fault_on = POISON
        for server in servers:
            server.bodies.clear()
        await fail(backend, UpstreamFailed, [POISON])

    assert [sum(POISON in body["input"] for body in server.bodies) for server in servers] == [1, 6]


# ---------------------------------------------------------------------------------------------- too many in a request


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (422, "batch size 10 > maximum allowed batch size 3"),
        (413, "input batch size 10 > maximum allowed batch size 3"),
        (400, "Too many inputs. The max number of inputs is 3."),
        (400, "at most 3 requests can be in one batch"),
        (400, "Invalid 'input': array too long. Expected an array with maximum length 3"),
        (400, "Requested 10 tokens, max 3 tokens per request"),
        (413, "<html>Request Entity Too Large</html>"),
    ],
)
async def test_too_many_texts_for_a_server_are_sent_in_parts(server: StandIn, status: int, message: str) -> None:
    def refuse(body: dict[str, Any]) -> Response | None:
        return JSONResponse({"error": {"message": message}}, status) if len(body["input"]) > 3 else None

    async with loaded(entry(server)) as backend:
        server.respond = refuse
        embeddings = await backend.embed(job())
        server.bodies.clear()
        await backend.embed(job())
        refused = sum(len(body["input"]) > 3 for body in server.bodies)

    np.testing.assert_array_equal(embeddings.vectors, expected())
    assert sum(embeddings.num_tokens) == 3 * len(TEXTS)
    # The time of one client's long texts does not predict the next client's.
    assert refused == (3 if "html" in message or "tokens" in message else 0)


async def test_one_text_that_is_too_large_for_a_server_is_refused(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.fault = "413"
        error = await fail(backend, BadInput, ["any"])

    assert "refuses the request: as was commanded" in error.message


async def test_a_text_that_is_too_long_is_not_sent_in_parts(server: StandIn) -> None:
    async with loaded(entry(server, kind="tei")) as backend:
        server.fault = "too long"
        server.bodies.clear()
        await fail(backend, ContextLengthExceeded, TEXTS, truncate=Truncate.REFUSE)

    assert len(server.bodies) == 1


# ------------------------------------------------------------------------------------------------ what servers refuse


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 410])
async def test_an_error_that_only_the_operator_can_fix_is_permanent(server: StandIn, status: int) -> None:
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = str(status)
        server.bodies.clear()
        error = await fail(backend, UpstreamUnavailable, ["any"])
        assert len([body for body in server.bodies if body["input"] == ["any"]]) == 1
        await states.wait_for(ModelState.RECOVERING)
        later = await fail(backend, UpstreamUnavailable, ["any"])

    for one in (error, later):
        assert one.is_permanent
        assert one.retry_after_s is None
        assert f"({status})" in one.message


async def test_servers_that_may_come_back_are_worth_waiting_for(servers: tuple[StandIn, StandIn]) -> None:
    states = States()
    async with loaded(entry(*servers), states) as backend:
        servers[0].fault, servers[1].fault = "401", "503"
        for _ in range(4):
            await fail(backend, UpstreamUnavailable, ["any"])
        await states.wait_for(ModelState.RECOVERING)
        error = await fail(backend, UpstreamUnavailable, ["any"])

    assert not error.is_permanent
    assert error.retry_after_s == 5


async def test_a_redirect_is_not_followed(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:
        server.respond = lambda _body: RedirectResponse("http://127.0.0.1:1/?secret", 307)
        error = await fail(backend, UpstreamUnavailable, ["any"])

    assert "redirects (307), which is not followed" in error.message
    assert "secret" not in error.message
    assert error.is_permanent


async def test_the_key_is_not_repeated(server: StandIn) -> None:
    key = "sk-very-secret"
    server.key = key
    messages = []
    async with loaded(entry(server, upstream={"api_key": key})) as backend:
        assert server.headers[-1]["authorization"] == f"Bearer {key}"
        for response in (
            JSONResponse({"error": {"message": f"no such key: {key}"}}, 401),
            JSONResponse({"error": {"message": f"no such key: {key}"}}, 400),
            JSONResponse({"error": {"message": f"{'x' * 490}{key}"}}, 500),  # where the message is cut
            JSONResponse({"error": {"message": f"no such key: {key}"}}, 200),
            JSONResponse({"error": {"message": f"no such key: {key}", "code": 401}}, 200),
            Response(f"{'x' * 25}{key} is not a key"),
        ):
            server.respond = lambda body, response=response: response if body["input"] == ["any"] else None
            with pytest.raises(RequestError) as caught:
                await backend.embed(job(["any"]))
            messages.append(caught.value.message)
        server.respond = lambda _body: JSONResponse({"error": {"message": f"no such key: {key}"}}, 401)
        while backend.servers[0].breaker.is_closed:
            await fail(backend, UpstreamUnavailable, ["any"])
            await asyncio.sleep(0.01)
        messages.append(backend.servers[0].breaker.reason)
        with pytest.raises(NotReachable) as not_loaded:
            await UpstreamBackend(entry(server, upstream={"api_key": key}), Settings()).plan()
        messages.append(str(not_loaded.value))

    assert all(key[:6] not in text for text in messages)
    assert sum("no such key: …" in text for text in messages) == 5


async def test_an_error_with_status_200_counts_as_an_error(server: StandIn) -> None:
    async with loaded(entry(server)) as backend:

        def answer(error: object) -> None:
            response = JSONResponse({"error": error}, 200, headers={"retry-after": "7"})
            server.respond = lambda body: response if body["input"] == ["any"] else None

        answer({"message": "slow down", "code": 429})
        error = await fail(backend, Overloaded, ["any"])
        answer("the model is gone")
        other = await fail(backend, UpstreamFailed, ["any"])
        answer({"message": "too many words", "code": 400})
        refused = await fail(backend, BadInput, ["any"])

    assert error.retry_after_s == 7
    assert "slow down" in error.message
    assert "an error with status 200: the model is gone" in other.message
    assert "too many words" in refused.message


@pytest.mark.parametrize("status", ["429", "503"])
@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("30", 30),
        ("inf", 120),
        ("1e300", 120),
        ("nan", 5),
        ("soon", 5),
        ("Sun, 01 Nov 2099 12:00:00 GMT", 120),
        ("Sun, 01 Nov 2020 12:00:00 GMT", 1),
        ("-inf", 1),
    ],
)
async def test_when_to_come_back_is_passed_on(server: StandIn, status: str, header: str, seconds: int) -> None:
    async with loaded(entry(server, upstream={"max_retries": 0})) as backend:
        server.fault, server.retry_after = status, header
        error = await fail(backend, RequestError, ["any"])

    assert error.retry_after_s == seconds


# ------------------------------------------------------------------------------------------------------- metrics and log


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


async def test_requests_are_counted_by_server_and_result(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_LOOK_S", 1000.0)
    monkeypatch.setattr(watch_module, "_SETTLE_S", 1000.0)  # trials would count as well
    async with loaded(entry(server, id="counted", upstream={"timeout_s": 3.0, "max_retries": 0})) as backend:
        labels = {"model": "counted", "server": f"127.0.0.1:{server.port}"}

        def count(outcome: str) -> float:
            return sample("gateway_upstream_requests_total", **labels, outcome=outcome)

        def seconds() -> float:
            return sample("gateway_upstream_seconds_count", **labels)

        for fault, outcome, is_timed in [
            ("", "ok", True),
            ("400", "refused", True),
            ("413", "refused", True),
            ("429", "overloaded", False),
            ("503", "unready", False),
            ("500", "failed", False),
            ("garbage", "wrong", False),
            ("half", "broken", False),
            ("404", "refused", True),
        ]:
            server.fault, server.fault_on = fault, POISON
            before, timed = count(outcome), seconds()
            await asyncio.gather(backend.embed(job([POISON])), return_exceptions=True)
            assert count(outcome) - before == 1, fault
            assert seconds() - timed == is_timed, fault
        server.fault = ""
        server.delay_s, before = 60, count("timeout")
        await fail(backend, UpstreamFailed, ["any"])
        assert count("timeout") - before == 1
        before = count("abandoned")
        await fail(backend, DeadlineExceeded, ["any"], seconds=0.05)
        assert count("abandoned") - before == 1


async def test_waiting_texts_are_shown_while_they_wait(server: StandIn) -> None:
    texts = ["x" * 40] * 10
    async with loaded(entry(server, id="waiting", upstream={"max_batch_texts": 4, "max_connections": 1})) as backend:
        server.delay_s = 60
        server.bodies.clear()
        task = asyncio.create_task(backend.embed(job(texts)))
        await wait_until(lambda: len(server.bodies) > 0)
        assert sample("gateway_queue_texts", model="waiting") == 10
        assert sample("gateway_queue_tokens", model="waiting") == 100
        assert sample("gateway_upstream_texts", model="waiting", server=f"127.0.0.1:{server.port}") == 10
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert sample("gateway_queue_texts", model="waiting") == 0
    assert sample("gateway_queue_tokens", model="waiting") == 0
    assert sample("gateway_upstream_texts", model="waiting", server=f"127.0.0.1:{server.port}") == 0


@pytest.mark.parametrize("fault", ["", "500", "400"])
async def test_the_limit_counts_running_texts_and_not_finished_ones(server: StandIn, fault: str) -> None:
    async with loaded(entry(server, upstream={"max_retries": 0}), max_queue_texts=15) as backend:
        server.fault, server.fault_on = fault, POISON
        for _ in range(5):
            await asyncio.gather(backend.embed(job([POISON, *TEXTS])), return_exceptions=True)
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())


async def test_an_idle_model_takes_a_request_of_any_size(server: StandIn) -> None:
    async with loaded(entry(server), max_queue_texts=3) as backend:
        embeddings = await backend.embed(job())

    assert len(embeddings.vectors) == len(TEXTS)


async def test_a_server_that_is_shut_out_is_shown(server: StandIn) -> None:
    states = States()
    labels = {"model": "shown", "server": f"127.0.0.1:{server.port}"}
    async with loaded(entry(server, id="shown"), states) as backend:
        assert sample("gateway_upstream_up", **labels) == 1
        server.fault = "500"
        await fail(backend, UpstreamFailed, ["any"])
        await states.wait_for(ModelState.RECOVERING)
        assert sample("gateway_upstream_up", **labels) == 0
        server.fault = ""
        await states.wait_for(ModelState.READY)
        assert sample("gateway_upstream_up", **labels) == 1


async def test_impossible_token_counts_do_no_harm(server: StandIn) -> None:
    def boast(answer: Any) -> Any:
        answer["usage"] = {"total_tokens": 10**30, "prompt_tokens": "x"}
        return answer

    async with loaded(entry(server, upstream={"max_batch_texts": 1})) as backend:
        server.rewrite = boast
        embeddings = await backend.embed(job())

    assert sum(embeddings.num_tokens) == 2**53


async def test_two_servers_at_one_address_have_different_names(server: StandIn) -> None:
    urls = (f"{server.url}/v1", f"{server.url}/v1/../v1")
    async with loaded(entry(server, upstream={"urls": urls})) as backend:
        names = [one.name for one in backend.servers]
        await backend.embed(job())

    assert names == [f"127.0.0.1:{server.port}/v1", f"127.0.0.1:{server.port}/v1/../v1"]


def test_the_vectors_of_texts_differ() -> None:
    """The other tests rely on it."""
    vectors = [vector_of(text) for text in (*TEXTS, MODEL)]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in itertools.combinations(vectors, 2)]

    assert max(cosines) < 0.95
