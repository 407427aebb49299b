"""The grade is found in any text around it, and nothing else counts as a grade."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.compare.judge.answers import Answer, Outcome, read_answer, read_grade
from tests.compare.judge.stand_in import completion, ended, graded


def read(content: bytes, max_tokens: int = 2_048) -> Answer:
    return read_answer(content, max_tokens)


@pytest.mark.parametrize("grade", [0, 1, 2, 3])
def test_the_grade_of_the_schema(grade: int) -> None:
    answer = read(graded(grade).body)
    assert answer == Answer(Outcome.GRADED, grade, "stand-in-1", 500, 20)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ('```json\n{"reason": "fits", "grade": 2}\n```', 2),
        ('Sure! {"reason": "fits", "grade": 1} Anything else?', 1),
        ('<think>{"grade": 0} is too low</think>\n{"reason": "fits", "grade": 3}', 3),
        ('<think>{"grade": 0} is too low</think>\nI cannot decide.', None),
        ('hm, {"grade": 0} is too low</think>{"grade": 3}', 3),  # the template of some models begins the thought
        ('\n<think>It could be {"grade": 0}, but', None),  # cut off
        ('{"reason": "it shows the tag <think>", "grade": 2}', 2),
        ('{"reason": "it shows the tags <think> and </think>", "grade": 2}', 2),
        ('Here: {"reason": "it has {braces} in it", "grade": 2} .', 2),
        ('{"grade": "2"}', 2),
        ('{"grade": 2.0}', 2),
        ('{"grade": 4}', None),
        ('{"grade": -1}', None),
        ('{"grade": 2.5}', None),
        ('{"grade": true}', None),
        ('{"grade": null}', None),
        ('{"grade": NaN}', None),
        ('{"grade": "three"}', None),
        ('{"score": 3}', None),
        ("3", None),
        ("[3]", None),
        ("", None),
        ("{" * 100_000, None),
        ('{"grade": ' + "[" * 100_000, None),
    ],
)
def test_the_grade_in_a_text(text: str, grade: int | None) -> None:
    assert read_grade(text) == grade


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'data: {"choices": []}\n\ndata: [DONE]\n\n',
        b"<html>Bad gateway</html>",
        b"\xff\xfe\x00",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": {"0": {}}}',
        b"null",
    ],
)
def test_an_answer_that_is_not_a_completion_is_unreadable(content: bytes) -> None:
    assert read(content) == Answer(Outcome.UNREADABLE)


def test_refusals() -> None:
    """A grade in a refusal does not count."""
    assert read(completion(None, refusal="I cannot grade this.").body).outcome is Outcome.REFUSED
    for reason in ("content_filter", "SAFETY", "PROHIBITED_CONTENT", "guardrail_intervened", "refusal"):
        assert read(ended(graded(3), reason).body) == Answer(Outcome.REFUSED, None, "stand-in-1", 500, 20)


@pytest.mark.parametrize(
    "reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "model_context_window_exceeded", "incomplete"]
)
def test_a_grade_in_an_answer_that_is_cut_does_not_count(reason: str) -> None:
    text = 'A first thought: {"grade": 3}. But then again, the document'
    assert read(ended(completion(text), reason).body) == Answer(Outcome.CUT, None, "stand-in-1", 500, 20, text)


def test_an_answer_is_cut_if_it_uses_all_tokens_and_the_endpoint_does_not_tell_why_it_ends() -> None:
    assert read(ended(graded(2), None).body, max_tokens=20).outcome is Outcome.CUT
    assert read(ended(graded(2), None).body, max_tokens=21).grade == 2
    assert read(graded(2).body, max_tokens=20).grade == 2  # its thoughts do not count for every limit


@pytest.mark.parametrize("reason", ["error", "abort", "cancelled", "insufficient_system_resource"])
def test_a_grade_in_an_answer_that_broke_off_does_not_count(reason: str) -> None:
    assert read(ended(graded(2), reason).body).outcome is Outcome.UNREADABLE


@pytest.mark.parametrize("reason", ["stop", "eos_token", "end_turn", "COMPLETE", "", None, 1])
def test_a_grade_in_a_finished_answer_counts(reason: object) -> None:
    assert read(ended(graded(2), reason).body).grade == 2


def test_content_in_parts() -> None:
    parts: list[Any] = [
        {"type": "thinking", "thinking": [{"type": "text", "text": '{"grade": 3}'}]},
        {"type": "reasoning", "text": '{"grade": 3} '},
        {"type": "text", "text": '{"reason": "", '},
        {"type": "text", "text": '"grade": 1}'},
    ]
    body = json.loads(completion("").body)
    body["choices"][0]["message"]["content"] = parts
    del body["usage"], body["model"]
    assert read(json.dumps(body).encode()) == Answer(Outcome.GRADED, 1)


@pytest.mark.parametrize(
    ("model", "usage"),
    [
        (7, []),
        (None, "many"),
        ("m", {"prompt_tokens": -5, "completion_tokens": 1e300}),
        ("m", {"prompt_tokens": 10**30}),
    ],
)
def test_a_grade_is_not_lost_because_of_other_fields(model: object, usage: object) -> None:
    choice = {"message": {"content": '{"grade": 2}'}}
    answer = read(json.dumps({"choices": [choice], "model": model, "usage": usage}).encode())
    assert (answer.grade, answer.prompt_tokens, answer.completion_tokens) == (2, 0, 0)
    assert answer.model == ("m" if model == "m" else "")


def test_a_long_name_of_a_model_is_cut() -> None:
    choice = {"message": {"content": '{"grade": 2}'}}
    assert len(read(json.dumps({"choices": [choice], "model": "m" * 10_000}).encode()).model) == 200


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_grade_that_is_only_in_the_thoughts_does_not_count(field: str) -> None:
    thought = {field: 'Perhaps {"grade": 0}.'}
    assert read(completion("", **thought).body).outcome is Outcome.UNREADABLE
    assert read(completion('{"grade": 2}', **thought).body).grade == 2
