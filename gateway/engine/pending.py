"""A request in flight, and its answer once all of its texts are computed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gateway.engine.model.items import Encoded, Tokens
from gateway.engine.scheduler import RequestHandle, TokenSequence
from gateway.engine.timeline import Timeline
from gateway.errors import RequestError
from gateway.types import Embeddings, Output


@dataclass(eq=False, slots=True, kw_only=True)
class PendingRequest(RequestHandle):
    """A request in flight, which is filled batch by batch; to the queue, it is the handle of its waiters.

    Attributes:
        text_name: name of the texts in an error message.
        tokenizing: the tokenizing task that the request waits for.
        encoded: the results so far, by index.
        sequences: the sequences that the request waits for.
    """

    done: asyncio.Future[None]
    num_missing: int
    text_name: str
    tokenizing: asyncio.Future[Any] | None = None
    encoded: dict[int, Encoded] = field(default_factory=dict)
    tokens: list[Tokens] = field(default_factory=list)
    num_tokens: int = 0
    sequences: set[TokenSequence] = field(default_factory=set)
    timeline: Timeline = field(default_factory=Timeline)
    error: RequestError | None = None
    admitted_at: float = field(default_factory=time.monotonic)

    def end(self, error: RequestError | None = None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)
        if self.tokenizing is not None and not self.tokenizing.done():  # it will never run
            self.tokenizing.set_result([])

    def release(self) -> None:
        """Drop texts, results and error. The queue remembers a request for a while, even one that has been answered."""
        self.error = None  # the frames of its traceback hold the texts
        self.encoded.clear()
        self.tokens.clear()
        self.sequences.clear()

    def embeddings(self, outputs: frozenset[Output], width: int) -> Embeddings:
        rows = [self.encoded[i] for i in range(len(self.encoded))]
        num_tokens = [n for tokens in self.tokens for n in _token_counts(tokens)]
        return Embeddings(
            vectors=np.concatenate([row.dense for row in rows]) if rows else np.zeros((0, width), np.float32),
            num_tokens=num_tokens,
            truncated=[i for i, tokens in enumerate(self.tokens) if tokens.is_truncated],
            timings=self.timeline.timings(),
            sparse=[row.sparse for row in rows if row.sparse is not None] if Output.SPARSE in outputs else None,
            multivectors=[row.multivector for row in rows if row.multivector is not None]
            if Output.MULTIVECTOR in outputs
            else None,
            states=[row.states for row in rows if row.states is not None] if Output.STATES in outputs else None,
        )


def _token_counts(tokens: Tokens) -> list[int]:
    """Return the number of tokens of each vector that ``tokens`` will give."""
    return [len(tokens.ids)] if tokens.spans is None else [end - first for first, end in tokens.spans]
