"""The values that a server accepts, and the effect of a task on a text, without a server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gateway.backends.upstream.answers import Answer
from gateway.backends.upstream.failures import Failure
from gateway.backends.upstream.quirks import Quirks, learn
from gateway.backends.upstream.tasks import Tasks
from gateway.errors import BadInput

ENCODINGS = ("base64", "float", None)


class Asked:
    """Answers, or fails for some texts."""

    def __init__(self, failures: dict[str, Exception], encoding: str | None = "base64") -> None:
        self._failures = failures
        self._encoding = encoding
        self.asked: list[tuple[str, str | None]] = []
        self.numbers: np.ndarray | None = None

    async def __call__(self, texts: Sequence[str], quirks: Quirks) -> Answer:
        [text] = texts
        self.asked.append((text, quirks.encoding))
        if quirks.encoding == "float" and self.numbers is not None:
            return Answer(self.numbers[None], 1, has_numbers=True)
        if quirks.encoding != self._encoding:
            raise BadInput("not that")
        if text in self._failures:
            raise self._failures[text]
        return Answer(np.ones((1, 4), np.float32), 1, has_numbers=self._encoding != "base64")


@pytest.mark.parametrize("outcome", ["failed", "wrong", "broken"])
async def test_a_server_that_fails_at_blank_texts_takes_none(outcome: str) -> None:
    ask = Asked({text: Failure(outcome, "no") for text in ("", " ", ".")})

    assert await learn(ask, ENCODINGS) == Quirks("base64", None)


@pytest.mark.parametrize("outcome", ["overloaded", "unready", "unreachable", "timeout", "refused"])
@pytest.mark.parametrize("text", ["Hello, world", "", " "])
async def test_a_server_that_does_not_answer_has_shown_nothing(outcome: str, text: str) -> None:
    ask = Asked({"": BadInput("no"), text: Failure(outcome, "not now")})

    with pytest.raises(Failure, match="not now"):
        await learn(ask, ENCODINGS)


@pytest.mark.parametrize(("encoding", "num_requests"), [("base64", 1), ("float", 2), (None, 3)])
async def test_encodings_are_tried_in_order_and_once(encoding: str | None, num_requests: int) -> None:
    ask = Asked({}, encoding)

    assert await learn(ask, ENCODINGS) == Quirks(encoding, "", has_numbers=encoding != "base64")
    # Base64 is compared with numbers; the last request is for a blank text.
    check = ["float"] if encoding == "base64" else []
    assert [asked for _, asked in ask.asked] == [*ENCODINGS[:num_requests], *check, encoding]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (np.ones(4), Quirks("base64", "")),
        (np.full(4, 0.5), Quirks("base64", "")),  # of another length
        (np.ones(8), Quirks("float", "", has_numbers=True)),  # base64 of half floats
        (np.arange(4), Quirks("float", "", has_numbers=True)),  # base64 of the bytes in another order
    ],
)
async def test_base64_of_other_numbers_is_not_taken(numbers: np.ndarray, expected: Quirks) -> None:
    ask = Asked({})
    ask.numbers = numbers.astype(np.float32)

    assert await learn(ask, ENCODINGS) == expected


async def test_a_server_that_answers_base64_however_it_is_asked_is_taken_as_it_is() -> None:
    """Its second answer says nothing about the first, because both may hold another type."""

    async def ask(_texts: Sequence[str], quirks: Quirks) -> Answer:
        return Answer(np.eye(4, dtype=np.float32)[:1] if quirks.encoding == "float" else np.ones((1, 4), np.float32), 1)

    assert await learn(ask, ENCODINGS) == Quirks("base64", "")


@pytest.mark.parametrize("outcome", ["overloaded", "timeout"])
async def test_base64_that_could_not_be_checked_is_not_taken_yet(outcome: str) -> None:
    async def ask(texts: Sequence[str], quirks: Quirks) -> Answer:
        if quirks.encoding == "float":
            raise Failure(outcome, "not now")
        return Answer(np.ones((1, 4), np.float32), 1)

    with pytest.raises(Failure, match="not now"):
        await learn(ask, ENCODINGS)


@pytest.mark.parametrize(
    ("blank", "sent", "refused"),
    [
        ("", ["a", "", " ", "\n"], None),
        (" ", ["a", " ", " ", "\n"], None),
        (".", ["a", ".", ".", "."], None),
        (None, ["a", "", " ", "\n"], 1),
    ],
)
def test_blank_texts_are_sent_as_the_server_takes_them(blank: str | None, sent: list[str], refused: int | None) -> None:
    quirks = Quirks("base64", blank)

    assert list(quirks.applied(["a", "", " ", "\n"])) == sent
    assert quirks.first_refused(["a", "", " ", "\n"]) == refused
    assert quirks.first_refused(["a"]) is None


def test_a_task_is_an_instruction_or_a_name() -> None:
    here = Tasks({"query": "find: ", "passage": ""}, {}, "task")
    there = Tasks({"query": ""}, {"query": "search"}, "task")
    texts = ["a", ""]

    assert here.prepare(texts, "query") == (["find: a", "find: "], None)
    for tasks, task, name in [
        (here, "passage", None),
        (here, None, None),
        (here, "other", None),
        (there, "query", "search"),
        (there, None, None),
    ]:
        prepared, sent = tasks.prepare(texts, task)
        assert prepared is texts  # nothing is copied
        assert sent == name
