"""Learn how a server deviates from others of its kind, before any client's text is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gateway.backends.upstream.answers import Answer
from gateway.backends.upstream.dialects import Encoding
from gateway.backends.upstream.failures import Failure
from gateway.errors import RequestError
from gateway.golden import SAME_MODEL_COSINE
from gateway.vectors import cosine

BLANKS = ("", " ", ".")
"""Replacements for an empty text. A period is the least meaningful text for a server that refuses blank texts."""

_TEXT = "Hello, world"
# With these outcomes, the server understood the request and refused it. Others are inconclusive.
_UNFIT = ("failed", "wrong", "broken")


@dataclass(frozen=True, slots=True)
class Quirks:
    """The peculiarities of one server.

    Attributes:
        encoding: sent as ``encoding_format``.
        blank: the replacement for an empty text, one of ``BLANKS``; ``None`` if the server refuses all of them.
        has_numbers: whether the server writes vectors as numbers for every requested encoding.
    """

    encoding: Encoding
    blank: str | None = ""
    has_numbers: bool = False

    def first_refused(self, texts: Sequence[str]) -> int | None:
        """Return the index of the first text that the server refuses, if any."""
        if self.blank is not None:
            return None
        return next((i for i, text in enumerate(texts) if not text.strip()), None)

    def applied(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts to send."""
        match self.blank:
            case "" | None:
                return texts
            case " ":
                return [text or " " for text in texts]
            case stand_in:
                return [text if text.strip() else stand_in for text in texts]


_Ask: TypeAlias = Callable[[Sequence[str], Quirks], Awaitable[Answer]]


async def learn(ask: _Ask, encodings: Sequence[Encoding]) -> Quirks:
    """Find out a server's quirks.

    Args:
        ask: requests vectors from the server.
        encodings: the encodings to try, the best first.

    Raises:
        Failure: it does not answer.
        RequestError: it does not take any request.
    """
    quirks, answer = await _first_accepted(ask, encodings)
    if not answer.has_numbers and "float" in encodings:
        quirks, answer = await _compare_encodings(ask, quirks, answer)
    width = answer.vectors.shape[1]
    for blank in BLANKS:
        if await _accepts_blank(ask, blank, quirks, width):
            return Quirks(quirks.encoding, blank, quirks.has_numbers)
    return Quirks(quirks.encoding, None, quirks.has_numbers)


async def _compare_encodings(ask: _Ask, quirks: Quirks, answer: Answer) -> tuple[Quirks, Answer]:
    """Switch to numbers if a server's numbers differ from its base64; return the quirks and the answer.

    Base64 may hold a type other than float32 without any sign of it.
    """
    try:
        numbers = await ask([_TEXT], Quirks("float"))
    except (Failure, RequestError) as error:
        if isinstance(error, Failure) and error.outcome not in _UNFIT:
            raise
        return quirks, answer
    if not numbers.has_numbers or cosine(numbers.vectors[0], answer.vectors[0]) >= SAME_MODEL_COSINE:
        return quirks, answer
    return Quirks("float", has_numbers=True), numbers


async def _first_accepted(ask: _Ask, encodings: Sequence[Encoding]) -> tuple[Quirks, Answer]:
    first: Failure | RequestError | None = None
    for encoding in encodings:
        try:
            answer = await ask([_TEXT], Quirks(encoding))
        except (Failure, RequestError) as error:
            if isinstance(error, Failure) and error.outcome not in _UNFIT:
                raise
            first = first or error
        else:
            return Quirks(encoding, has_numbers=answer.has_numbers), answer
    assert first is not None  # noqa: S101  there is an encoding to try
    raise first


async def _accepts_blank(ask: _Ask, text: str, quirks: Quirks, width: int) -> bool:
    """Return whether a server returns a vector for a blank text."""
    try:
        answer = await ask([text], quirks)
    except RequestError:
        return False
    except Failure as failure:
        if failure.outcome not in _UNFIT:
            raise
        return False
    return bool(answer.vectors.shape[1] == width)
