"""Decide whether a model accepts a request, by the number of texts and (estimated) tokens that already wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil

from gateway.errors import Overloaded
from gateway.telemetry import metrics
from gateway.types import EmbedJob, Priority

# The weight of the newest batch in the measured rate.
_RATE_WEIGHT = 0.1
_CHARS_PER_TOKEN = 4
# A caller without other requests may queue this many texts even if others have filled the queue.
_NEWCOMER_TEXTS = 32
_NEWCOMERS_SHARE = 1.5
# Low-priority work has a separate queue, whose limits are those of the main queue divided by this number.
_LOW_PART = 4


@dataclass(slots=True)
class _Lane:
    """The requests of one priority that have no answer yet, and the limits of their texts and tokens."""

    max_texts: int
    max_tokens: int
    name: str = ""
    num_texts: int = 0
    num_tokens: int = 0
    callers: Counter[str] = field(default_factory=Counter)


class Admission:
    """Counts the texts and tokens of the unanswered requests, and refuses requests beyond the limits.

    Tokens are estimated, because a request is admitted before it is tokenized. Low-priority work is counted separately,
    so that it takes no room from other work.

    Args:
        longest_text: the number of tokens of the longest text that the model reads.
    """

    def __init__(self, model: str, max_texts: int, max_tokens: int, longest_text: int) -> None:
        self._model = model
        self._longest_text = longest_text
        self._tokens_per_s: float | None = None
        low = _Lane(max_texts // _LOW_PART, max_tokens // _LOW_PART, "low-priority work: ")
        self._lanes = {Priority.NORMAL: _Lane(max_texts, max_tokens), Priority.LOW: low}

    @property
    def num_texts(self) -> int:
        """Texts of normal priority that wait."""
        return self._lanes[Priority.NORMAL].num_texts

    @property
    def num_tokens(self) -> int:
        """Estimated tokens of those texts."""
        return self._lanes[Priority.NORMAL].num_tokens

    @property
    def num_low_texts(self) -> int:
        """Low-priority texts that wait."""
        return self._lanes[Priority.LOW].num_texts

    @property
    def is_empty(self) -> bool:
        """Whether nothing is counted."""
        return not any(lane.num_texts for lane in self._lanes.values())

    @contextmanager
    def admit(self, job: EmbedJob) -> Iterator[None]:
        """Count a job while the context is open.

        Raises:
            Overloaded: too many texts or tokens are already waiting.
        """
        lane = self._lanes[job.priority]
        num_texts, num_tokens = len(job.texts), self._estimate_tokens(job)
        self._require_room(lane, job.caller, num_texts, num_tokens)
        lane.callers[job.caller] += 1
        self._count(lane, num_texts, num_tokens)
        try:
            yield
        finally:
            lane.callers[job.caller] -= 1
            if not lane.callers[job.caller]:
                del lane.callers[job.caller]
            self._count(lane, -num_texts, -num_tokens)

    def note_rate(self, num_tokens: int, seconds: float) -> None:
        """Update the measured rate of the model with a batch."""
        rate = num_tokens / max(seconds, 1e-6)
        self._tokens_per_s = rate + (1 - _RATE_WEIGHT) * ((self._tokens_per_s or rate) - rate)

    def _require_room(self, lane: _Lane, caller: str, num_texts: int, num_tokens: int) -> None:
        is_full = lane.num_texts + num_texts > lane.max_texts or lane.num_tokens + num_tokens > lane.max_tokens
        # An idle model accepts any request: otherwise a large request could never be served.
        if is_full and lane.num_texts and not self._is_newcomer(lane, caller, num_texts):
            raise Overloaded(
                f"model {self._model!r} is full: {lane.name}{lane.num_texts} texts (about {lane.num_tokens} tokens) are "
                f"waiting, this request has {num_texts} (about {num_tokens}); the limits are {lane.max_texts} texts and "
                f"{lane.max_tokens} tokens",
                retry_after_s=ceil(lane.num_tokens / self._tokens_per_s) if self._tokens_per_s else 1,
            )

    @staticmethod
    def _is_newcomer(lane: _Lane, caller: str, num_texts: int) -> bool:
        """Return whether this is a small request of a caller that has no others: one caller must not block the rest."""
        return (
            num_texts <= _NEWCOMER_TEXTS
            and lane.num_texts + num_texts <= _NEWCOMERS_SHARE * lane.max_texts
            and caller not in lane.callers
        )

    def _estimate_tokens(self, job: EmbedJob) -> int:
        return sum(min(self._longest_text, length // _CHARS_PER_TOKEN + 2) for length in job.lengths)

    def _count(self, lane: _Lane, num_texts: int, num_tokens: int) -> None:
        lane.num_texts += num_texts
        lane.num_tokens += num_tokens
        if lane is self._lanes[Priority.LOW]:
            metrics.LOW_QUEUE_TEXTS.labels(self._model).set(lane.num_texts)
            return
        metrics.QUEUE_TEXTS.labels(self._model).set(lane.num_texts)
        metrics.QUEUE_TOKENS.labels(self._model).set(lane.num_tokens)
