"""What an encoder takes and gives, for one text. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.types import MultiVector, Output, SparseVector, States, Vectors


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one text, special tokens included, never longer than the model takes.

    Attributes:
        spans: where the chunks of a late-chunked document are, as (first, end) positions; ``None`` for a plain text.
        second: where the second text of a pair begins, for a model that tells the two apart; else ``None``.
        num_attended: how many of the first tokens are attended to, if the others are not; else ``None``.
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
    """One text as an encoder takes it.

    Attributes:
        scorer: see :class:`gateway.types.EmbedJob`; applied to what the encoder returns.
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
    """What an encoder returns for an :class:`Item`.

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
