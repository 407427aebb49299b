"""A judge behind a socket: the client finds its abilities, repeats requests that may succeed later, and never hangs."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from gateway.compare.judge import endpoint
from gateway.compare.judge.answers import Answer, Outcome
from gateway.compare.judge.endpoint import chat_url, connect_judge, is_on_this_machine
from gateway.compare.judge.prompt import make_messages
from gateway.errors import CompareError
from tests.compare.judge.conftest import StartJudge
from tests.compare.judge.stand_in import Reply, completion, ended, graded, refusal

MESSAGES = make_messages("a query", "a document")


async def ask(url: str, *, times: int = 1, key: str | None = None, patience_s: float = 5.0) -> list[Answer]:
    """Ask for a grade, the first time to find the dialect."""
    async with connect_judge(url, "stand-in", key, patience_s=patience_s) as judge:
        return [await judge.find_dialect(MESSAGES), *[await judge.ask(MESSAGES) for _ in range(times - 1)]]


async def test_a_request_asks_for_a_grade_by_schema_at_temperature_0(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: graded(2))

    [answer] = await ask(judge.url, key=" secret\n")

    assert answer.grade == 2
    [body] = judge.bodies
    assert (body["model"], body["temperature"]) == ("stand-in", 0)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["grade"]["enum"] == [0, 1, 2, 3]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert judge.keys == ["Bearer secret"]


async def test_without_a_key_none_is_sent(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: graded(2))
    await ask(judge.url)
    assert judge.keys == [None]


def picky(body: dict[str, Any], _number: int) -> Reply:
    """Answer like a reasoning model, on a server that supports no schema, with a template without a system role."""
    if "max_tokens" in body:
        return refusal(400, "Unsupported parameter: use 'max_completion_tokens' instead of 'max_tokens'.")
    if "temperature" in body:
        return refusal(400, "Unsupported value: 'temperature' does not support 0. Only the default (1) is supported.")
    if body.get("response_format", {}).get("type") == "json_schema":
        return refusal(422, "response_format: unknown type")
    if body["messages"][0]["role"] == "system":
        return refusal(400, "System role not supported")
    return completion('<think>hm</think> {"reason": "", "grade": 1}')


async def test_fields_that_it_does_not_accept_are_left_out(start_judge: StartJudge) -> None:
    judge = start_judge(picky)

    answers = await ask(judge.url, times=3)

    assert [answer.grade for answer in answers] == [1, 1, 1]
    assert judge.bodies[-3] == judge.bodies[-2] == judge.bodies[-1]  # found out once
    last = judge.bodies[-1]
    assert (len(judge.bodies), last["response_format"], len(last["messages"])) == (7, {"type": "json_object"}, 1)
    assert "max_completion_tokens" in last


async def test_a_server_that_knows_no_format_at_all_is_asked_in_words(start_judge: StartJudge) -> None:
    judge = start_judge(lambda body, _number: refusal(400, "no such field") if "response_format" in body else graded(3))
    assert [answer.grade for answer in await ask(judge.url)] == [3]
    assert len(judge.bodies) == 3


async def test_a_schema_that_makes_its_answers_unreadable_is_left_out(start_judge: StartJudge) -> None:
    judge = start_judge(
        lambda body, _number: completion("{}") if body.get("response_format", {}).get("json_schema") else graded(3)
    )
    assert [answer.grade for answer in await ask(judge.url)] == [3]


async def test_a_server_that_accepts_nothing_is_reported(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: refusal(400, "no max_completion_tokens, no temperature, no system role"))
    with pytest.raises(CompareError, match="gives no grade to any form of the request; its last answer: no max_comp"):
        await ask(judge.url)
    assert len(judge.bodies) <= 24


async def test_requests_that_may_succeed_later_are_repeated(
    start_judge: StartJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.01)
    soon = format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True)
    failures = [
        refusal(429, "slow down", retry_after="0.01"),
        refusal(429, "slow down", retry_after=soon),
        refusal(503, "busy", retry_after="nan"),
        refusal(500, "oops"),
        Reply(502, b"<html>"),
    ]
    judge = start_judge(lambda _body, number: failures[number] if number < len(failures) else graded(2))

    [answer] = await ask(judge.url)

    assert answer.grade == 2
    assert len(judge.bodies) == 6


async def test_a_long_pause_is_not_waited_for(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: refusal(429, "quota used up", retry_after="86400"))
    with pytest.raises(
        CompareError, match=r"quota used up; it asks to wait 86,400 s, and the limit is 5 s\. Run again"
    ):
        await ask(judge.url)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "--judge-key-env names"), (403, "--judge-key-env names"), (404, "does it have the model"), (302, "302")],
)
async def test_a_permanent_failure_is_reported_immediately_without_the_key(
    start_judge: StartJudge, status: int, hint: str
) -> None:
    judge = start_judge(lambda _body, _number: refusal(status, "wrong key: secret-key"))
    with pytest.raises(CompareError) as caught:
        await ask(judge.url, key="secret-key")
    assert hint in str(caught.value)
    assert "wrong key: …" in str(caught.value)
    assert len(judge.bodies) == 1


@pytest.mark.parametrize(
    ("key", "said"), [(None, "no key was sent: set JUDGE_API_KEY"), ("sk-wrong", "the key came from JUDGE_")]
)
async def test_a_rejected_key_is_said_with_the_setting(start_judge: StartJudge, key: str | None, said: str) -> None:
    judge = start_judge(lambda _body, _number: refusal(401, "Incorrect API key provided"))
    with pytest.raises(CompareError, match=f"answers 401: Incorrect API key provided; {said}"):
        await ask(judge.url, key=key)
    assert len(judge.bodies) == 1


@pytest.mark.parametrize("pause", ["0", "-3", "0.001"])
async def test_a_pause_of_zero_does_not_make_it_ask_without_a_pause(
    start_judge: StartJudge, monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    """Some proxies answer 429 with ``Retry-After: 0`` as long as a minute lasts."""
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.2)
    judge = start_judge(lambda _body, _number: refusal(429, "slow down", retry_after=pause))

    with pytest.raises(CompareError, match="answers 429: slow down; gave up after 1 s"):
        await ask(judge.url, patience_s=1.0)

    assert len(judge.bodies) <= 3  # pauses of 0.2 s, 0.4 s, 0.8 s, each a quarter more or less


async def test_tokens_of_answers_without_a_grade_are_counted(start_judge: StartJudge) -> None:
    """The first forms of the request are paid for too."""
    judge = start_judge(
        lambda body, _number: completion("{}") if body.get("response_format", {}).get("json_schema") else graded(3)
    )
    [answer] = await ask(judge.url)
    assert (len(judge.bodies), answer.prompt_tokens, answer.completion_tokens) == (2, 1_000, 40)


def cut_off(thought: str = "<think>Well") -> Reply:
    """Return the answer of a model that has reached its limit of tokens while it thought."""
    return ended(completion(thought), "length")


async def test_a_judge_that_thinks_long_gets_more_tokens(start_judge: StartJudge) -> None:
    judge = start_judge(lambda body, _number: cut_off() if body["max_tokens"] < 8_000 else graded(2))

    answers = await ask(judge.url, times=2)

    assert [answer.grade for answer in answers] == [2, 2]
    assert [body["max_tokens"] for body in judge.bodies] == [2_048, 8_192, 8_192]
    assert judge.bodies[-1]["response_format"]["type"] == "json_schema"
    assert answers[0].prompt_tokens == 1_000  # both answers are paid for


async def test_a_thought_that_is_cut_off_later_gets_more_tokens_too(start_judge: StartJudge) -> None:
    judge = start_judge(lambda body, number: cut_off() if number and body["max_tokens"] < 8_000 else graded(2))

    answers = await ask(judge.url, times=3)

    assert [(answer.grade, answer.prompt_tokens) for answer in answers] == [(2, 500), (2, 1_000), (2, 500)]
    assert [body["max_tokens"] for body in judge.bodies] == [2_048, 2_048, 8_192, 8_192]


async def test_a_grade_in_an_answer_that_is_cut_off_does_not_count(start_judge: StartJudge) -> None:
    """The judge may have changed it later."""
    judge = start_judge(lambda body, _number: graded(2) if body["max_tokens"] > 8_000 else cut_off('{"grade": 0}? No:'))

    answers = await ask(judge.url, times=2)

    assert [answer.grade for answer in answers] == [2, 2]
    assert [body["max_tokens"] for body in judge.bodies] == [2_048, 8_192, 8_192]


async def test_a_model_without_room_for_more_tokens_keeps_its_dialect(start_judge: StartJudge) -> None:
    def respond(body: dict[str, Any], number: int) -> Reply:
        if body["max_tokens"] > 4_096:
            return refusal(400, "max_tokens is too large for a context of 4096 tokens")
        return cut_off() if number == 1 else graded(2)

    judge = start_judge(respond)

    answers = await ask(judge.url, times=3)

    assert [answer.outcome for answer in answers] == [Outcome.GRADED, Outcome.CUT, Outcome.GRADED]
    assert [body["max_tokens"] for body in judge.bodies] == [2_048, 2_048, 8_192, 2_048]


async def test_the_last_answer_of_one_that_gives_no_grade_is_quoted(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: completion("I would say it is good."))
    with pytest.raises(CompareError, match=r"its last answer: 'I would say it is good\.'"):
        await ask(judge.url)
    thinking = start_judge(lambda _body, _number: cut_off("<think>Hm"))
    with pytest.raises(CompareError, match="its last answer: '<think>Hm', cut off after 8,192 tokens"):
        await ask(thinking.url)


async def test_nothing_listens() -> None:
    with pytest.raises(CompareError, match=r"the judge \(http://127.0.0.1:1/v1/chat/completions\) cannot be reached"):
        await ask("http://127.0.0.1:1")


async def test_a_document_that_is_not_accepted_later_is_refused(start_judge: StartJudge) -> None:
    """For example, the provider's content filter."""
    judge = start_judge(lambda _body, number: refusal(400, "content_filter") if number else graded(0))
    assert [answer.outcome for answer in await ask(judge.url, times=2)] == [Outcome.GRADED, Outcome.REFUSED]


async def test_garbage_without_an_end_is_cut_off(start_judge: StartJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_MAX_ANSWER_BYTES", 100_000)
    sent = 0

    def garbage(_body: dict[str, Any], number: int) -> Reply:
        def chunks() -> Any:
            nonlocal sent
            for _ in itertools.repeat(None):
                sent += 4096
                yield b'data: {"grade": 3} ' * 200

        return Reply(headers={"content_type": "text/event-stream"}, chunks=chunks()) if number else graded(1)

    judge = start_judge(garbage)

    assert [answer.outcome for answer in await ask(judge.url, times=2)] == [Outcome.GRADED, Outcome.UNREADABLE]
    assert sent < 50_000_000


async def test_a_judge_that_dribbles_is_given_up(start_judge: StartJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte arrives in time, but the answer never ends."""
    monkeypatch.setattr(endpoint, "_ANSWER_TIMEOUT_S", 0.2)

    def dribble() -> Any:
        for _ in range(100):
            time.sleep(0.02)
            yield b" "

    judge = start_judge(lambda _body, _number: Reply(chunks=dribble()))
    with pytest.raises(CompareError, match=r"gave no answer in 0\.2 s; gave up after 0 s"):
        await ask(judge.url, patience_s=0.0)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1/chat/completions"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1/chat/completions"),
        ("https://api.example.com/v1/", "https://api.example.com/v1/chat/completions"),
        ("https://example.com/openai/v1/chat/completions", "https://example.com/openai/v1/chat/completions"),
        ("https://example.com/llm?api-version=7", "https://example.com/llm/chat/completions?api-version=7"),
    ],
)
def test_the_address(text: str, url: str) -> None:
    assert str(chat_url(text)) == url


@pytest.mark.parametrize(
    "text", ["localhost:8080", "ftp://host", "http://", "http://host:99999", "http://h\n", "http://h#x"]
)
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(CompareError, match=r"--judge .*"):
        chat_url(text)


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(CompareError) as caught:
        chat_url("http://me:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("[::1]", True), ("10.0.0.1", False),
     ("judge.example.com", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_where_the_texts_go(host: str, is_here: bool) -> None:
    assert is_on_this_machine(httpx.URL(f"http://{host}:8080/v1")) is is_here


async def test_a_pause_until_an_impossible_date_causes_no_traceback(start_judge: StartJudge) -> None:
    date = f"Thu, 01 Jan 2026 00:00:00 +{'9' * 20}"
    judge = start_judge(lambda _body, number: refusal(429, "slowly", Retry_After=date) if number == 0 else graded(1))
    assert [answer.grade for answer in await ask(judge.url)] == [1]


async def test_a_key_with_a_line_break_is_reported_immediately(start_judge: StartJudge) -> None:
    judge = start_judge(lambda _body, _number: graded(1))
    with pytest.raises(CompareError, match="does the key contain a line break") as raised:
        await ask(judge.url, key="sk-one\nsk-two", patience_s=600.0)
    assert "sk-" not in str(raised.value)
    assert judge.bodies == []


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/steal", "/v1/elsewhere"])
async def test_a_redirection_is_not_followed(start_judge: StartJudge, location: str) -> None:
    judge = start_judge(lambda _body, _number: refusal(307, "elsewhere", Location=location))
    with pytest.raises(CompareError, match="answers 307"):
        await ask(judge.url, key="secret")
    assert len(judge.bodies) == 1


def test_a_host_that_is_not_a_name_is_reported() -> None:
    with pytest.raises(CompareError, match="--judge http://xn--/: "):
        chat_url("http://xn--/")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTP_PROXY", "ftp://user:hidden@x"), ("HTTP_PROXY", "http://[::1"), ("SSL_CERT_FILE", "/nowhere.pem")],
)
async def test_a_proxy_or_certificate_that_is_wrong_is_reported(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CompareError, match="cannot create an HTTP client; check HTTPS_PROXY") as raised:
        await ask("http://judge.invalid/v1")
    assert "hidden" not in str(raised.value)
