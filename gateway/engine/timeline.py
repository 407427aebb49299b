"""Divide the time of one request among its stages."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from itertools import pairwise
from typing import TypeAlias

from gateway.types import Timings

Span: TypeAlias = tuple[float, float]
"""When something began and ended, on ``time.monotonic()``."""


class Stage(IntEnum):
    """A stage of a request. Stages may overlap; the first in this order counts."""

    INFERENCE = 0
    """A batch with one of the request's texts is being computed."""
    QUEUE = 1
    """A text of the request waits for a batch."""
    TOKENIZE = 2
    """A text of the request is being tokenized."""
    TURN = 3
    """The request waits for its turn to be tokenized."""


class Timeline:
    """The stages of a request in time.

    Its stages overlap: while the first texts are computed, others wait, and the rest is still being tokenized. Each moment
    is counted once, so that the parts never add up to more than the elapsed time, even with parallel batches.
    """

    def __init__(self) -> None:
        self._spans: dict[Stage, list[Span]] = {stage: [] for stage in Stage}

    def add(self, stage: Stage, start: float, end: float) -> None:
        if end > start:
            self._spans[stage].append((start, end))

    def timings(self) -> Timings:
        """Return the seconds of each stage; waiting for the tokenizer counts as waiting in the queue."""
        spans: list[Span] = []
        covered = [0.0]
        for stage in Stage:
            spans += self._spans[stage]
            covered.append(covered_s(spans))
        inference_s, queue_s, tokenize_s, turn_s = (after - before for before, after in pairwise(covered))
        return Timings(tokenize_s=tokenize_s, queue_s=queue_s + turn_s, inference_s=inference_s)


def covered_s(spans: Iterable[Span]) -> float:
    """Return the number of seconds that at least one of the spans covers."""
    seconds, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds
