"""What a server takes, and what a task does to a text, without a server."""

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

    async def __call__(self, texts: Sequence[str], quirks: Quirks) -> Answer:
        [text] = texts
        self.asked.append((text, quirks.encoding))
        if quirks.encoding != self._encoding:
            raise BadInput("not that")
        if text in self._failures:
            raise self._failures[text]
        return Answer(np.ones((1, 4), np.float32), 1)


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


@pytest.mark.parametrize(("encoding", "num_requests"), [("base64", 2), ("float", 3), (None, 4)])
async def test_encodings_are_tried_in_order_and_once(encoding: str | None, num_requests: int) -> None:
    ask = Asked({}, encoding)

    assert await learn(ask, ENCODINGS) == Quirks(encoding, "")
    assert [asked for _, asked in ask.asked] == [*ENCODINGS[: num_requests - 1], encoding]


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
