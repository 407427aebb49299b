"""The consequences of a server's failure for the request, the server and the client. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import ceil

from gateway.backends.upstream.answers import error_of
from gateway.errors import (
    BadInput,
    ContextLengthExceeded,
    Overloaded,
    RequestError,
    UpstreamFailed,
    UpstreamUnavailable,
)

RETRY_AFTER_S = 5

_MAX_SHOWN = 5
_REFUSALS = {400, 413, 422}
_OPERATOR_FAULTS = {
    401: "refuses the API key",
    402: "requires payment",
    403: "refuses the API key",
    404: "has no such path or model",
    405: "has no such path",
    410: "no longer has the model",
}
# llama.cpp's messages about a single text, sent with status 500; its "physical batch" is a number of tokens.
_TEXT_WORDS = re.compile(r"context size|too large to process", re.IGNORECASE)
_LENGTH_WORDS = ("context length", "maximum length", "max_model_len", "less than")
# OpenAI counts the tokens of all texts of a request as well.
_BATCH_WORDS = re.compile(
    r"batch.?size|in one batch|too many (inputs|texts)|array too long|(number of|total) (inputs|texts)|"
    r"per request|(inputs|texts|requests) at once",
    re.IGNORECASE,
)


class Failure(Exception):
    """A server has not answered correctly. Another server may, or this server later.

    Attributes:
        outcome: the kind of failure in one word, for the metrics.
        retry_after_s: seconds until the server accepts a retry, if it says so.
        is_worth_repeating: whether to retry on the same server; otherwise only another server is tried.
        is_grave: whether this failure alone makes the server suspect, without further ones: the server returned
            unusable vectors, or may refuse every request.
        is_permanent: whether a retry by the client would get the same result.
        bad_texts: indices of texts with an unusable vector; otherwise empty.
    """

    def __init__(
        self,
        outcome: str,
        reason: str,
        *,
        retry_after_s: float | None = None,
        is_worth_repeating: bool = True,
        is_grave: bool = False,
        is_permanent: bool = False,
        bad_texts: Sequence[int] = (),
    ) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.retry_after_s = retry_after_s
        self.is_worth_repeating = is_worth_repeating
        self.is_grave = is_grave
        self.is_permanent = is_permanent
        self.bad_texts = tuple(bad_texts)

    def error(self, what: str, places: Sequence[int]) -> RequestError:
        """Return the client's error when no other server has answered either.

        Args:
            what: the beginning of the message.
            places: the position in the client's request of each text that the server was sent.
        """
        after = RETRY_AFTER_S if self.retry_after_s is None else ceil(self.retry_after_s)
        match self.outcome:
            case "overloaded":
                return Overloaded(f"{what}, and {self}", retry_after_s=after)
            case "unready" | "unreachable" | "refused":
                return unavailable(f"{what}, and {self}", after, is_permanent=self.is_permanent)
            case _:
                return UpstreamFailed(
                    f"{what}, and {self}{self._describe_texts(places)}", is_permanent=self.is_permanent
                )

    def _describe_texts(self, places: Sequence[int]) -> str:
        if not self.bad_texts:
            return ""
        numbers = [str(places[i]) for i in self.bad_texts]
        more = f" and {len(numbers) - _MAX_SHOWN} more" if len(numbers) > _MAX_SHOWN else ""
        return f" for text{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_MAX_SHOWN])}{more} (counted from 0)"


class TooLarge(Exception):
    """A server does not accept this many texts in one request, but may accept them in several.

    Attributes:
        refusal: the client's error if the request has only one text.
        is_number: whether the number of texts was too large, rather than the number of bytes.
    """

    def __init__(self, refusal: BadInput, *, is_number: bool) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.is_number = is_number


def listed(reasons: Iterable[str]) -> str:
    """Join reasons into one line; show at most five."""
    reasons = list(dict.fromkeys(filter(None, reasons)))
    more = f"; and {len(reasons) - _MAX_SHOWN} more" if len(reasons) > _MAX_SHOWN else ""
    return "; ".join(reasons[:_MAX_SHOWN]) + more


def given_up(
    model: str, failure: Failure | None, places: Sequence[int], reasons: Iterable[str], *, is_permanent: bool
) -> RequestError:
    """Return the client's error when no server has answered.

    Args:
        failure: the last failure, if a server was asked.
        places: as in :meth:`Failure.error`.
        reasons: otherwise, the reasons why no server was asked.
        is_permanent: whether all servers refuse every request.
    """
    what = f"model {model!r} runs elsewhere"
    if failure is not None:
        return failure.error(what, places)
    return unavailable(f"{what}, and no server answers: {listed(reasons)}", RETRY_AFTER_S, is_permanent=is_permanent)


def unavailable(message: str, retry_after_s: int, *, is_permanent: bool) -> UpstreamUnavailable:
    """Return the error for a model whose servers do not answer. If they refuse, a retry is pointless."""
    after = None if is_permanent else retry_after_s
    return UpstreamUnavailable(message, retry_after_s=after, is_permanent=is_permanent)


def failure_of(
    server: str, model: str, status: int, content: bytes, retry_after_s: float | None
) -> Failure | BadInput | TooLarge:
    """Return the failure or refusal that an answer with an error status means.

    Args:
        server, model: their names, for messages.
        retry_after_s: as the answer says.
    """
    message, code = error_of(content)
    quoted = f": {message}" if message else ""
    is_of_a_text = _TEXT_WORDS.search(message) is not None
    if status in _REFUSALS or (status == 500 and is_of_a_text):
        is_too_long = is_of_a_text or _is_about_length(code, message)
        is_number = _BATCH_WORDS.search(message) is not None and not is_of_a_text
        kind = ContextLengthExceeded if is_too_long and not is_number else BadInput
        refusal = kind(f"the server of model {model!r} refuses the request{quoted}", param="input")
        if is_number or (status == 413 and not is_too_long):
            # The number of tokens depends on the texts, so a limit on it does not apply to other requests.
            return TooLarge(refusal, is_number=is_number and "token" not in message.lower())
        return refusal
    if status in _OPERATOR_FAULTS:
        reason = f"{server} {_OPERATOR_FAULTS[status]} ({status}){quoted}"
        return Failure("refused", reason, is_worth_repeating=False, is_grave=True, is_permanent=True)
    if 300 <= status < 400:
        reason = f"{server} redirects ({status}), which is not followed: put the address of the API itself into `urls`"
        return Failure("refused", reason, is_worth_repeating=False, is_grave=True, is_permanent=True)
    if status in (429, 503):
        outcome = "overloaded" if status == 429 else "unready"
        return Failure(outcome, f"{server} is {outcome} ({status}){quoted}", retry_after_s=retry_after_s)
    # 408, 502 and 504 come from a proxy in between. With a 500, the server itself may have failed on these texts.
    is_proxys = status in (408, 502, 504)
    return Failure("failed", f"{server} answers {status}{quoted}", is_worth_repeating=is_proxys, is_grave=not is_proxys)


def _is_about_length(code: str, message: str) -> bool:
    return code == ContextLengthExceeded.code or (
        ("token" in message or "characters" in message) and any(words in message for words in _LENGTH_WORDS)
    )
