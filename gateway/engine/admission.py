"""Decide whether a model takes a request: by the texts and the (estimated) tokens that wait for it already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

from gateway.errors import Overloaded
from gateway.telemetry import metrics
from gateway.types import EmbedJob

# How much the newest batch counts in the measured rate.
_RATE_WEIGHT = 0.1
_CHARS_PER_TOKEN = 4
# So many texts of a caller get in although others have filled the queue.
_NEWCOMER_TEXTS = 32
_NEWCOMERS_SHARE = 1.5


class Admission:
    """Counts the texts and tokens of the requests that have no answer yet, and refuses more than the limits.

    Tokens are estimated, as a request is admitted before it is tokenized.

    Args:
        longest_text: the tokens of the longest text that the model reads.
    """

    def __init__(self, model: str, max_texts: int, max_tokens: int, longest_text: int) -> None:
        self._model = model
        self._max_texts = max_texts
        self._max_tokens = max_tokens
        self._longest_text = longest_text
        self._tokens_per_s: float | None = None
        self._callers: Counter[str] = Counter()
        self.num_texts = 0
        self.num_tokens = 0

    @contextmanager
    def admit(self, job: EmbedJob) -> Iterator[None]:
        """Count a job while the context is open.

        Raises:
            Overloaded: too much is waiting already.
        """
        num_texts, num_tokens = len(job.texts), self._estimate_tokens(job)
        self._require_room(job.caller, num_texts, num_tokens)
        self._callers[job.caller] += 1
        self._count(num_texts, num_tokens)
        try:
            yield
        finally:
            self._callers[job.caller] -= 1
            if not self._callers[job.caller]:
                del self._callers[job.caller]
            self._count(-num_texts, -num_tokens)

    def note_rate(self, num_tokens: int, seconds: float) -> None:
        """Learn from a batch how fast the model computes."""
        rate = num_tokens / max(seconds, 1e-6)
        self._tokens_per_s = rate + (1 - _RATE_WEIGHT) * ((self._tokens_per_s or rate) - rate)

    def _require_room(self, caller: str, num_texts: int, num_tokens: int) -> None:
        is_full = self.num_texts + num_texts > self._max_texts or self.num_tokens + num_tokens > self._max_tokens
        # An idle model takes any request: no request may be impossible forever.
        if is_full and self.num_texts and not self._is_newcomer(caller, num_texts):
            raise Overloaded(
                f"model {self._model!r} is full: {self.num_texts} texts (about {self.num_tokens} tokens) are waiting, "
                f"this request has {num_texts} (about {num_tokens}); the limits are {self._max_texts} texts and "
                f"{self._max_tokens} tokens",
                retry_after_s=ceil(self.num_tokens / self._tokens_per_s) if self._tokens_per_s else 1,
            )

    def _is_newcomer(self, caller: str, num_texts: int) -> bool:
        """Return whether this is a small request of a caller with no other: one caller must not fill the queue for all."""
        return (
            num_texts <= _NEWCOMER_TEXTS
            and self.num_texts + num_texts <= _NEWCOMERS_SHARE * self._max_texts
            and caller not in self._callers
        )

    def _estimate_tokens(self, job: EmbedJob) -> int:
        return sum(min(self._longest_text, length // _CHARS_PER_TOKEN + 2) for length in job.lengths)

    def _count(self, num_texts: int, num_tokens: int) -> None:
        self.num_texts += num_texts
        self.num_tokens += num_tokens
        metrics.QUEUE_TEXTS.labels(self._model).set(self.num_texts)
        metrics.QUEUE_TOKENS.labels(self._model).set(self.num_tokens)
