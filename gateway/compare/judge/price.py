"""The price of a judge, which is shown before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.compare.judge.prompt import make_messages
from gateway.config.wording import count

# An estimate for English. Texts in other scripts have more tokens per character, but also more bytes.
_BYTES_PER_TOKEN = 4
_ANSWER_TOKENS = 40
_TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True, slots=True)
class Price:
    """The number of required requests, and an estimate of their tokens.

    Attributes:
        num_calls: number of requests to send.
        num_known: number of grades from earlier runs.
        destination: the host that gets the texts; ``None`` if they stay on this machine.
    """

    num_calls: int
    num_known: int
    prompt_tokens: int
    answer_tokens: int
    destination: str | None

    @property
    def num_tokens(self) -> int:
        """The total number of tokens."""
        return self.prompt_tokens + self.answer_tokens

    def __str__(self) -> str:
        known = f" ({self.num_known:,} grades are known from an earlier run)" if self.num_known else ""
        return (
            f"The judge needs {count(self.num_calls, 'request')}{known}, with about {_rounded(self.prompt_tokens)} tokens "
            f"to read and {_rounded(self.answer_tokens)} to write; a judge that thinks first writes more."
        )

    @property
    def privacy(self) -> str:
        """A sentence about the destination of the texts."""
        if self.destination is None:
            return "Queries and documents stay on this machine."
        return f"Queries and documents are sent to {self.destination}."


def estimate_price(texts: Sequence[tuple[str, str, int]], num_known: int, destination: str | None) -> Price:
    """Estimate the price of grading.

    Args:
        texts: the query, the document and the order of the examples of each request.
    """
    size = sum(
        len(message["content"].encode(errors="replace"))
        for query, document, order in texts
        for message in make_messages(query, document, order)
    )
    prompt_tokens = size // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE * len(texts)
    return Price(len(texts), num_known, prompt_tokens, _ANSWER_TOKENS * len(texts), destination)


def _rounded(number: int) -> str:
    """Return an estimate with two digits: ``2.9 million``, ``160,000``."""
    if number >= 1_000_000:
        return f"{number / 1e6:.2g} million" if number < 10_000_000 else f"{number / 1e6:,.0f} million"
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}"
