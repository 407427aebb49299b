"""The meaning of answers with a status other than 200, without a server."""

from __future__ import annotations

import json

import pytest

from gateway.backends.upstream.answers import error_of
from gateway.backends.upstream.failures import Failure, TooLarge, failure_of
from gateway.errors import BadInput, ContextLengthExceeded, Overloaded, UpstreamFailed, UpstreamUnavailable


def meaning(status: int, message: str = "", code: str = "") -> Failure | BadInput | TooLarge:
    content = json.dumps({"error": {"message": message, "code": code}}).encode()
    return failure_of("gpu:80", "m", status, content, 3.0)


@pytest.mark.parametrize(
    ("status", "outcome", "is_worth_repeating", "is_grave", "is_permanent", "error"),
    [
        (300, "refused", False, True, True, UpstreamUnavailable),
        (308, "refused", False, True, True, UpstreamUnavailable),
        (401, "refused", False, True, True, UpstreamUnavailable),
        (404, "refused", False, True, True, UpstreamUnavailable),
        (408, "failed", True, False, False, UpstreamFailed),
        (409, "failed", False, True, False, UpstreamFailed),
        (424, "failed", False, True, False, UpstreamFailed),
        (429, "overloaded", True, False, False, Overloaded),
        (500, "failed", False, True, False, UpstreamFailed),
        (502, "failed", True, False, False, UpstreamFailed),
        (503, "unready", True, False, False, UpstreamUnavailable),
        (504, "failed", True, False, False, UpstreamFailed),
        (599, "failed", False, True, False, UpstreamFailed),
    ],
)
def test_a_status_is_a_failure_of_its_kind(
    status: int, outcome: str, is_worth_repeating: bool, is_grave: bool, is_permanent: bool, error: type
) -> None:
    found = meaning(status)

    assert isinstance(found, Failure)
    assert found.outcome == outcome
    assert (found.is_worth_repeating, found.is_grave, found.is_permanent) == (
        is_worth_repeating,
        is_grave,
        is_permanent,
    )
    client_error = found.error("model 'm' runs elsewhere", [0])
    assert type(client_error) is error
    assert client_error.is_permanent is is_permanent
    assert "gpu:80" in client_error.message


@pytest.mark.parametrize("status", [429, 500])
def test_the_servers_words_are_passed_on_if_there_are_any(status: int) -> None:
    assert str(meaning(status, "too hot")).endswith(": too hot")
    assert str(meaning(status)).endswith(f"{status})" if status == 429 else f"{status}")


@pytest.mark.parametrize("body", [b"\x1b[31m hot\r\n", b'{"error": {"message": "\\u001b[31m hot\\r\\n"}}'])
def test_the_servers_words_cannot_control_a_terminal(body: bytes) -> None:
    assert error_of(body) == ("[31m hot", "")


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize(
    ("message", "code", "kind"),
    [
        ("This model's maximum context length is 512 tokens", "", ContextLengthExceeded),
        ("`inputs` must have less than 512 tokens. Given: 900", "", ContextLengthExceeded),
        ("at least 9 characters more than max_model_len", "", ContextLengthExceeded),
        ("any", "context_length_exceeded", ContextLengthExceeded),
        ("the request exceeds the available context size", "", ContextLengthExceeded),
        ("an unknown token in the middle", "", BadInput),
        ("`dimensions` must be less than 512", "", BadInput),
        ("batch size 40 > maximum allowed batch size 32", "", TooLarge),
        ("Requested 400000 tokens, maximum length is 300000 tokens per request", "", TooLarge),
    ],
)
def test_a_refusal_is_of_the_text_its_length_or_the_number(status: int, message: str, code: str, kind: type) -> None:
    found = meaning(status, message, code)

    assert type(found) is (TooLarge if status == 413 and kind is BadInput else kind)
    refusal = found.refusal if isinstance(found, TooLarge) else found
    assert isinstance(refusal, BadInput)
    assert refusal.param == "input"
    assert refusal.message == f"the server of model 'm' refuses the request: {message}"


@pytest.mark.parametrize(("message", "is_number"), [("too many inputs", True), ("Request Entity Too Large", False)])
def test_too_many_texts_and_too_many_bytes_are_distinguished(message: str, is_number: bool) -> None:
    found = meaning(413, message)

    assert isinstance(found, TooLarge)
    assert found.is_number is is_number
    assert type(found.refusal) is BadInput


def test_the_texts_are_named_by_their_place_in_the_clients_request() -> None:
    one = Failure("wrong", "gpu gives no vector", bad_texts=[2])
    many = Failure("wrong", "gpu gives no vector", bad_texts=range(7))
    places = range(100, 110)

    assert one.error("m", places).message == "m, and gpu gives no vector for text 102 (counted from 0)"
    assert many.error("m", places).message == (
        "m, and gpu gives no vector for texts 100, 101, 102, 103, 104 and 2 more (counted from 0)"
    )
