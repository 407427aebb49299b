"""The grade is found in any text around it, and nothing else counts as a grade."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.compare.judge.answers import Answer, Outcome, read_answer, read_grade
from tests.compare.judge.stand_in import completion, graded


@pytest.mark.parametrize("grade", [0, 1, 2, 3])
def test_the_grade_of_the_schema(grade: int) -> None:
    answer = read_answer(graded(grade).body)
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
    assert read_answer(content) == Answer(Outcome.UNREADABLE)


def test_refusals() -> None:
    """A grade in a refusal does not count."""
    assert read_answer(completion(None, refusal="I cannot grade this.").body).outcome is Outcome.REFUSED
    filtered = json.loads(graded(3).body)
    filtered["choices"][0]["finish_reason"] = "content_filter"
    assert read_answer(json.dumps(filtered).encode()) == Answer(Outcome.REFUSED, None, "stand-in-1", 500, 20)


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
    assert read_answer(json.dumps(body).encode()) == Answer(Outcome.GRADED, 1)


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
    answer = read_answer(json.dumps({"choices": [choice], "model": model, "usage": usage}).encode())
    assert (answer.grade, answer.prompt_tokens, answer.completion_tokens) == (2, 0, 0)
    assert answer.model == ("m" if model == "m" else "")


def test_a_long_name_of_a_model_is_cut() -> None:
    choice = {"message": {"content": '{"grade": 2}'}}
    assert len(read_answer(json.dumps({"choices": [choice], "model": "m" * 10_000}).encode()).model) == 200


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_grade_that_is_only_in_the_thoughts_does_not_count(field: str) -> None:
    thought = {field: 'Perhaps {"grade": 0}.'}
    assert read_answer(completion("", **thought).body).outcome is Outcome.UNREADABLE
    assert read_answer(completion('{"grade": 2}', **thought).body).grade == 2
