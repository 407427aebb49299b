"""The input and output of an encoder for one text. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.types import MultiVector, Output, SparseVector, States, Vectors


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one text, special tokens included, never longer than the model's limit.

    Attributes:
        spans: the (first, end) positions of the chunks of a late-chunked document; ``None`` for a plain text.
        second: the position where the second text of a pair begins, for a model with segments; else ``None``.
        num_attended: the number of first tokens that are attended to, if the others are not; else ``None``.
    """

    ids: list[int]
    is_truncated: bool = False
    spans: tuple[tuple[int, int], ...] | None = None
    second: int | None = None
    num_attended: int | None = None

    @property
    def num_vectors(self) -> int:
        return 1 if self.spans is None else len(self.spans)


@dataclass(frozen=True, slots=True)
class Item:
    """One text as input of an encoder.

    Attributes:
        scorer: see :class:`gateway.types.EmbedJob`; applied to the encoder's result.
    """

    tokens: Tokens
    task: str | None = None
    outputs: frozenset[Output] = frozenset({Output.DENSE})
    scorer: Callable[[Vectors, SparseVector | None, MultiVector | None], float] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens.ids)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of an encoder for an :class:`Item`.

    Attributes:
        dense: ``(k, width)`` float32, not normalized: one row for the text, or one for each span of its tokens.
        sparse: weights of tokens, if asked for.
        multivector: a vector for each token, if asked for.
        states: the state of each token, if asked for.
    """

    dense: Vectors
    sparse: SparseVector | None = None
    multivector: MultiVector | None = None
    states: States | None = None
