"""The many forms of servers' answers: valid ones are read, and others are refused with the reason."""

from __future__ import annotations

import base64
import json
import math
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest

from gateway.backends.upstream.answers import (
    MAX_COUNT,
    BadVectors,
    ErrorAnswer,
    WrongAnswer,
    error_of,
    read_count,
    read_json,
    read_retry_after_s,
    read_vectors,
)
from gateway.backends.upstream.dialects import Facts, OpenAi, Tei

OPENAI = OpenAi("m", "task", {})
TEI = Tei("prompt_name", {})
ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def answer(*indices: object, rows: list[Any] = ROWS, **more: Any) -> bytes:
    """Return an answer of OpenAI's with these indices; ``...`` leaves one out."""
    data = [
        {"embedding": row} | ({} if index is ... else {"index": index})
        for index, row in zip(indices, rows, strict=True)
    ]
    return json.dumps({"data": data, **more}).encode()


def read(content: bytes, num_texts: int = 3) -> list[list[float]]:
    return OPENAI.read(content, {}, num_texts).vectors.tolist()


# -------------------------------------------------------------------------------------------------------------- order


def test_the_index_says_which_text_a_vector_is_for() -> None:
    assert read(answer(2, 0, 1)) == [ROWS[1], ROWS[2], ROWS[0]]


@pytest.mark.parametrize("absent", [..., None])
def test_without_any_index_the_order_is_that_of_the_answer(absent: object) -> None:
    assert read(answer(absent, absent, absent)) == ROWS


def test_a_writer_that_leaves_out_zeros_leaves_out_the_first_index() -> None:
    assert read(answer(2, 1, ...)) == ROWS[::-1]


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ((0, 1, 1), "the index 1 twice"),
        ((0, 0, 0), "the index 0 twice"),
        ((1, ..., ...), "the index 0 twice, or two vectors without an index"),
        ((0, 1, 3), "the index 3 for 3 texts"),
        ((-1, 0, 1), "the index -1 for 3 texts"),
        (("0", "1", "2"), "the index '0', which is not a whole number"),
        ((0, 1.5, 2), "the index '1.5', which is not a whole number"),
        ((0, True, 2), "the index 'True', which is not a whole number"),
        ((0, [1], 2), r"the index '\[1\]', which is not a whole number"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(indices: tuple[object, ...], problem: str) -> None:
    with pytest.raises(WrongAnswer, match=problem):
        read(answer(*indices))


@pytest.mark.parametrize("num_texts", [2, 4])
@pytest.mark.parametrize("index", [..., 0])
def test_there_is_a_vector_for_each_text_and_no_other(num_texts: int, index: object) -> None:
    content = answer(*((index,) * 3 if index is ... else (0, 1, 2)))
    with pytest.raises(WrongAnswer, match=f"3 vectors for {num_texts} texts"):
        read(content, num_texts)
    with pytest.raises(WrongAnswer, match=f"3 vectors for {num_texts} texts"):
        TEI.read(json.dumps(ROWS).encode(), {}, num_texts)


# ------------------------------------------------------------------------------------------------------------ vectors


def packed(*numbers: float, dtype: str = "<f4") -> str:
    return base64.b64encode(np.array(numbers, dtype).tobytes()).decode()


@pytest.mark.parametrize("embedding", [[1, 0], [1.0, 0.0], [1, 0.0], packed(1, 0), [1.0000000001, 1e-60]])
def test_a_vector_is_numbers_or_base64(embedding: object) -> None:
    vectors = read_vectors([embedding])

    assert vectors.tolist() == [[1.0, 0.0]]
    assert vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("embedding", "problem"),
    [
        ("not base64!", "not base64 of float32"),
        (base64.b64encode(b"12345").decode(), "not base64 of float32"),
        ([[1.0, 2.0]], r"a list of shape \(1, 2\) instead of a vector: token vectors"),
        ([[1.0, 2.0], [3.0]], "not a list of numbers"),
        (["1.0", "2.0"], "not a list of numbers"),
        ([True, False], "not a list of numbers"),
        ([{"a": 1}, 2.0], "not a list of numbers"),
        ([None, "x"], "not a list of numbers"),
        ({"float": [1.0]}, "instead of a vector"),
        (0.5, "'0.5' instead of a vector"),
    ],
)
def test_a_value_that_is_not_a_vector_is_refused(embedding: object, problem: str) -> None:
    with pytest.raises(WrongAnswer, match=problem) as caught:
        read_vectors([embedding])
    assert not isinstance(caught.value, BadVectors)


@pytest.mark.parametrize(
    ("embedding", "problem"),
    [
        (None, "no vector"),
        ([], "no vector"),
        ("", "no vector"),
        ([None, None], "not finite"),
        ([1.0, None], "not finite"),
        (packed(math.nan, 1), "not finite"),
        (packed(1, -math.inf), "not finite"),
        ([1e39, 0.0], "not finite"),
        ([10**400, 0], "not a list of numbers"),
        ([0.0, 0.0], "length is zero or overflows"),
        ([0, 0], "length is zero or overflows"),
        (packed(0, 0), "length is zero or overflows"),
        ([1e30, 1e30], "length is zero or overflows"),
        ([1e-30, 1e-30], "length is zero or overflows"),
    ],
)
def test_a_text_whose_vector_cannot_be_used_is_named(embedding: object, problem: str) -> None:
    with pytest.raises(WrongAnswer, match=problem) as caught:
        read_vectors([[1.0, 2.0], embedding, [3.0, 4.0]])
    if isinstance(caught.value, BadVectors):
        assert caught.value.indices == (1,)


def test_all_texts_without_a_vector_are_named() -> None:
    with pytest.raises(BadVectors, match="no vector") as caught:
        read_vectors([[], []])
    assert caught.value.indices == (0, 1)


def test_vectors_of_one_answer_have_one_width() -> None:
    with pytest.raises(WrongAnswer, match="vectors of 2, 3 dimensions in one answer"):
        read_vectors([[1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0]])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_numbers_that_json_does_not_have_cost_their_own_text(number: str, blank: str) -> None:
    content = f'{{"data":[{{"index":0,"embedding":[1,2]}},{{"index":1,"embedding":[{blank}{number}{blank},1]}}]}}'

    with pytest.raises(BadVectors, match="not finite") as caught:
        read(content.encode(), 2)
    assert caught.value.indices == (1,)


def test_a_base64_string_may_say_nan() -> None:
    text = "NaN,Infinity"
    assert read_json(f'["{text}", NaN]'.encode())[1] is None  # type: ignore[index]
    with_nan = base64.b64encode(base64.b64decode("NaNaNaNa") * 2).decode()  # 12 bytes that spell it
    assert "NaN" in with_nan
    content = f'{{"data":[{{"index":0,"embedding":"{with_nan}"}},{{"index":1,"embedding":[NaN,1,1]}}]}}'
    with pytest.raises(BadVectors) as caught:
        read(content.encode(), 2)
    assert caught.value.indices == (1,)


def test_a_byte_order_mark_is_passed_over() -> None:
    assert read(b"\xef\xbb\xbf" + answer(0, 1, 2)) == ROWS


# ------------------------------------------------------------------------------------------------- invalid answers


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html>It works!</html>", "not JSON: it begins with '<html>It works!"),
        (b"", "not JSON: it is empty"),
        (b'{"data": [', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"null", "without a list `data`"),
        (b"[1, 2]", "without a list `data`"),
        (b'"text"', "without a list `data`"),
        (b"{}", "without a list `data`"),
        (b'{"data": {"0": []}}', "without a list `data`"),
        (b'{"data": null}', "without a list `data`"),
        (b'{"data": [[1.0]]}', "an entry of `data` without `embedding`"),
        (b'{"data": [null]}', "an entry of `data` without `embedding`"),
        (b'{"data": [{"index": 0, "vector": [1.0]}]}', "an entry of `data` without `embedding`"),
        (b'{"data": []}', "0 vectors for 1 texts"),
    ],
)
def test_an_answer_without_openais_form_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(WrongAnswer, match=problem):
        OPENAI.read(content, {}, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html>", "not JSON"),
        (b'{"embeddings": [[1.0]]}', "not a list of vectors"),
        (b"null", "not a list of vectors"),
        (b"[1.0]", "'1.0' instead of a vector"),
        (b"[[[1.0]]]", "token vectors"),
    ],
)
def test_an_answer_without_teis_form_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(WrongAnswer, match=problem):
        TEI.read(content, {}, 1)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        ({"message": "slow down", "code": 429}, "slow down", 429),
        ({"message": "slow down", "code": "429"}, "slow down", 429),
        ({"message": "no", "status": 503}, "no", 503),
        ({"message": "no", "status_code": 500}, "no", 500),
        ({"message": "no", "code": "quota"}, "no", 0),
        ({"message": "no", "code": 200}, "no", 0),
        ({"message": "no", "code": 99999}, "no", 0),
        ("no such model", "no such model", 0),
        ({"code": 1}, "no message", 0),
    ],
)
@pytest.mark.parametrize("dialect", [OPENAI, TEI])
def test_an_error_with_status_200_is_recognized(
    dialect: OpenAi | Tei, error: object, message: str, status: int
) -> None:
    with pytest.raises(ErrorAnswer, match=f"^an error with status 200: {message}$") as caught:
        dialect.read(json.dumps({"error": error, "data": None}).encode(), {}, 1)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "no", "code": "c"}}', ("no", "c")),
        (b'{"error": "no", "error_type": "Validation"}', ("no", "Validation")),
        (b'{"detail": "no"}', ("no", "")),
        (b'{"message": "no", "type": "t"}', ("no", "t")),
        (b'[{"error": {"message": "no", "code": 400}}]', ("no", "400")),
        (b"plain text", ("plain text", "")),
        (b"[]", ("", "")),
        (b"3", ("", "")),
        (b"{}", ("", "")),
        (b"\xff" * 300, ("\ufffd" * 200, "")),
        (json.dumps({"message": "x" * 9999}).encode(), ("x" * 500, "")),
    ],
)
def test_the_message_of_an_error_is_found(body: bytes, expected: tuple[str, str]) -> None:
    assert error_of(body) == expected


# ----------------------------------------------------------------------------------------------------- odd numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (7.9, 7),
        ("7", 7),
        (0, 0),
        (-1, 0),
        (True, 0),
        (None, 0),
        ("many", 0),
        ("", 0),
        ([7], 0),
        (math.nan, 0),
        ("nan", 0),
        (-math.inf, 0),
        (math.inf, MAX_COUNT),
        ("inf", MAX_COUNT),
        (10**400, MAX_COUNT),
        ("9" * 5000, MAX_COUNT),
    ],
)
def test_a_count_is_a_whole_number_that_json_can_hold(value: object, expected: int) -> None:
    assert read_count(value) == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"total_tokens": 9, "prompt_tokens": 8}, 9),
        ({"prompt_tokens": 8}, 8),
        ({"total_tokens": -9, "prompt_tokens": 8}, 8),
        ({"total_tokens": True, "prompt_tokens": "8"}, 8),
        ({"total_tokens": 1e300}, MAX_COUNT),
        ({}, 0),
        (None, 0),
        ([], 0),
        ("9", 0),
    ],
)
def test_usage_is_taken_where_it_makes_sense(usage: object, expected: int) -> None:
    assert OPENAI.read(answer(0, 1, 2, usage=usage), {}, 3).num_tokens == expected
    assert OPENAI.read(answer(0, 1, 2), {}, 3).num_tokens == 0


@pytest.mark.parametrize(("header", "expected"), [("12", 12), ("", 0), ("-3", 0), ("12, 13", 0), ("nan", 0)])
def test_teis_count_of_tokens_may_be_absent_or_odd(header: str, expected: int) -> None:
    content = json.dumps(ROWS).encode()

    assert TEI.read(content, {"x-compute-tokens": header}, 3).num_tokens == expected
    assert TEI.read(content, {}, 3).num_tokens == 0


def test_the_largest_count_is_exact_in_every_json_parser() -> None:
    assert MAX_COUNT == 9007199254740992


NOW = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        (" 3 ", 3.0),
        ("-3", 0.0),
        ("inf", float(MAX_COUNT)),
        ("1e400", float(MAX_COUNT)),
        ("-inf", 0.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        (None, None),
        (format_datetime(NOW.replace(minute=1), usegmt=True), 60.0),
        (format_datetime(NOW.replace(year=2020), usegmt=True), 0.0),
        ("Sun, 01 Nov 9999 12:00:00 -9900", None),
        ("Sun, 99 Nov 2026 12:00:00 GMT", None),
        ("9" * 400, float(MAX_COUNT)),
    ],
)
def test_when_to_come_back_is_a_finite_number_of_seconds(value: str | None, expected: float | None) -> None:
    assert read_retry_after_s(value, NOW.timestamp()) == expected


def test_a_date_without_a_time_zone_is_utc_wherever_this_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of C's ``asctime``, which clients of HTTP must read as well."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert read_retry_after_s(f"{NOW.replace(minute=1):%a %b %e %H:%M:%S %Y}", NOW.timestamp()) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": [{"id": "m", "max_model_len": 512}, {"id": "n"}]}, Facts(("m", "n"), max_tokens=512)),
        ({"data": [{"id": "m", "max_tokens": 256}]}, Facts(("m",), max_tokens=256)),
        ({"data": [{"id": "n", "max_tokens": 256}]}, Facts(("n",))),
        ({"data": [{"id": "m", "max_model_len": -1}]}, Facts(("m",))),
        ({"data": [{"id": "m", "max_model_len": True}]}, Facts(("m",))),
        ({"data": [{"id": "m", "max_model_len": "512"}]}, Facts(("m",), max_tokens=512)),
        ({"data": None}, Facts()),
        ({"data": [{"name": "m"}]}, Facts()),
        ({"data": [["id"]]}, Facts()),
        ({"data": [{"id": []}]}, Facts()),
        ([], Facts()),
        (3, Facts()),
    ],
)
def test_openais_list_of_models_is_read(content: object, expected: Facts) -> None:
    assert OPENAI.read_facts(json.dumps(content).encode()) == expected
    assert OPENAI.read_facts(b"<html>") == Facts()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"model_id": "a", "max_input_length": 512, "max_client_batch_size": 32, "model_dtype": "float16"},
            Facts(("a",), 512, 32, "float16"),
        ),
        ({"model_id": "b", "served_model_name": "a"}, Facts(("a", "b"))),
        ({"model_id": None, "max_input_length": 0, "max_client_batch_size": -3, "model_dtype": None}, Facts()),
        ({"max_input_length": "x", "max_client_batch_size": False}, Facts()),
        ([], Facts()),
        (None, Facts()),
    ],
)
def test_teis_info_is_read(content: object, expected: Facts) -> None:
    assert TEI.read_facts(json.dumps(content).encode()) == expected
    assert TEI.read_facts(b"<html>") == Facts()
