"""Read the grade in the response of a chat endpoint."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ValidationError

from gateway.comparisons.scale import MAX_GRADE

READING = 2
"""The version of the rules for reading a grade. Version 2 reads no grade from an unfinished answer.

Increase it when the rules change, so that the next run requests those grades again.
"""

# Match the innermost braces, because models without a schema often write text around the object.
_OBJECT = re.compile(r"\{[^{}]*\}")
_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_MAX_MODEL_CHARACTERS = 200
_MAX_SHOWN_CHARACTERS = 200
_MAX_TOKENS = 100_000_000
# Each provider has its own words for the reason why an answer ends: OpenAI writes `length` for the limit of tokens, and
# others name the tokens, the context window, or the answer that is incomplete.
_CUT = re.compile(r"length|max|limit|window|incomplete|truncat", re.IGNORECASE)
_FILTERED = re.compile(
    r"filter|safety|recitation|prohibited|blocklist|spii|toxic|refus|guardrail|moderation", re.IGNORECASE
)
_BROKEN_OFF = re.compile(r"abort|error|cancel|interrupt|insufficient|malformed", re.IGNORECASE)


class Outcome(StrEnum):
    """The result of asking for a grade."""

    GRADED = "graded"
    REFUSED = "refused"
    CUT = "cut"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of the judge.

    Attributes:
        grade: the grade; ``None`` unless the outcome is ``GRADED``.
        model: id of the model that answered, by its own account; may be empty.
        prompt_tokens, completion_tokens: 0 if the endpoint does not count them.
        said: the beginning of an answer that was cut at its limit of tokens, or is unreadable.
    """

    outcome: Outcome
    grade: int | None = None
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    said: str = ""


class _Part(BaseModel):
    type: str | None = None
    text: str | None = None

    @property
    def is_answer(self) -> bool:
        """Whether the part is text of the answer, rather than a thought or a picture."""
        return self.type in {None, "text", "output_text"}


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content if part.is_answer)
        return self.content or ""


class _Choice(BaseModel):
    message: _Message
    finish_reason: object = None


class _ChatCompletion(BaseModel):
    """The part of OpenAI's chat completion that the judge uses.

    The model, the usage and the reason for the end may have any type, so that an odd value does not lose a grade that was
    paid for.
    """

    choices: list[_Choice]
    model: object = None
    usage: object = None


def read_answer(content: bytes, max_tokens: int) -> Answer:
    """Read a response; any response that cannot be read is ``UNREADABLE``.

    A grade in an answer that was not finished does not count: the judge may have changed it later.

    Args:
        max_tokens: the limit of the request, for endpoints that do not tell why an answer ends.
    """
    try:
        completion = _ChatCompletion.model_validate_json(content)
    except ValidationError:
        return Answer(Outcome.UNREADABLE)
    if not completion.choices:
        return Answer(Outcome.UNREADABLE)
    choice = completion.choices[0]
    grade = read_grade(choice.message.text)
    num_written = _count_of(completion.usage, "completion_tokens")
    end = choice.finish_reason if isinstance(choice.finish_reason, str) else ""
    if choice.message.refusal or _FILTERED.search(end):
        outcome = Outcome.REFUSED
    elif _CUT.search(end) or (not end and num_written >= max_tokens):
        outcome = Outcome.CUT
    else:
        outcome = Outcome.UNREADABLE if grade is None or _BROKEN_OFF.search(end) else Outcome.GRADED
    model = completion.model[:_MAX_MODEL_CHARACTERS] if isinstance(completion.model, str) else ""
    return Answer(
        outcome,
        grade if outcome is Outcome.GRADED else None,
        model,
        _count_of(completion.usage, "prompt_tokens"),
        num_written,
        choice.message.text.strip()[:_MAX_SHOWN_CHARACTERS] if outcome in {Outcome.CUT, Outcome.UNREADABLE} else "",
    )


def _count_of(usage: object, key: str) -> int:
    """Return a number of tokens; 0 if the value is impossible."""
    number = usage.get(key) if isinstance(usage, dict) else None
    return number if isinstance(number, int) and 0 <= number <= _MAX_TOKENS else 0


def read_grade(text: str) -> int | None:
    """Return the grade in an answer, which is a JSON object or contains some; the last object with a grade counts.

    Some models think aloud before they answer. A grade that they only consider does not count, nor does an answer that ends
    before the thought does. In an answer that is JSON as a whole, such a tag is a quotation of the document.
    """
    answer = text.rpartition(_END_OF_THOUGHT)[2]
    candidates = [] if answer.lstrip().startswith(_THOUGHT) else _candidates(answer)
    for candidate in itertools.chain([text], candidates):
        try:
            parsed = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict) and (grade := _grade(parsed.get("grade"))) is not None:
            return grade
    return None


def _candidates(text: str) -> Iterator[str]:
    yield text
    yield text[text.find("{") : text.rfind("}") + 1]
    yield from reversed(_OBJECT.findall(text))


def _grade(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(MAX_GRADE + 1):
        return None
    return int(value)
