"""Token states of a batch, without padding: every runtime returns them, and every head reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.model.host_memory import send, start_receiving


def to_host(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Copy a float32 tensor to the host in one transfer, from a card through page-locked memory, several times as fast.

    Keep no views of the result: that memory is scarce.
    """
    received = start_receiving(tensor)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return received


def to_device(numbers: Sequence[int] | npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy whole numbers to a device as int64, without waiting for running computations of a card."""
    return send(np.asarray(numbers, np.int64), device)


@dataclass(frozen=True, slots=True)
class TokenStates:
    """The last hidden states of the texts of a batch, one after the other.

    Attributes:
        flat: ``(total, width)``, in the dtype that the model computes in.
        lengths: tokens of each text; their sum is ``total``.
        num_padding: number of padding tokens that were computed in addition.
    """

    flat: torch.Tensor
    lengths: Sequence[int]
    num_padding: int = 0

    @classmethod
    def from_padded(cls, states: torch.Tensor, lengths: Sequence[int]) -> TokenStates:
        """Drop the padding from ``(b, t, width)`` states of right-padded texts."""
        flat = states.flatten(0, 1)
        if min(lengths) == states.shape[1]:
            return cls(flat, lengths)
        # Counted on the host, which would otherwise wait for the card to count the mask's tokens.
        is_token = np.arange(states.shape[1]) < np.array(lengths)[:, None]
        places = to_device(np.flatnonzero(is_token), states.device)
        return cls(flat.index_select(0, places), lengths, is_token.size - sum(lengths))

    @property
    def starts(self) -> list[int]:
        """Position of each text's first token."""
        return [0, *accumulate(self.lengths)][:-1]

    def texts(self) -> tuple[torch.Tensor, ...]:
        """Return the states of each text, ``(t, width)``."""
        return torch.split(self.flat, list(self.lengths))

    def select(self, rows: Sequence[int]) -> TokenStates:
        """Return the states of some texts, in the order of ``rows``; without a copy if ``rows`` covers all texts."""
        if list(rows) == list(range(len(self.lengths))):
            return self
        texts = self.texts()
        return TokenStates(torch.cat([texts[row] for row in rows]), [self.lengths[row] for row in rows])

    def pool(self, pooling: Pooling) -> torch.Tensor:
        """Pool each text into a vector: ``(b, width)`` float32.

        The rules are sentence-transformers' (``sentence_transformer/modules/pooling.py``), computed in float32.
        """
        match pooling:
            case Pooling.CLS:
                return self._tokens(self.starts)
            case Pooling.LAST:
                return self._tokens([start + n - 1 for start, n in zip(self.starts, self.lengths, strict=True)])
            case Pooling.MAX:
                return torch.stack([states.float().amax(dim=0) for states in self.texts()])
            case Pooling.MEAN:
                return self._mean(self.flat, self.lengths)

    def pool_spans(self, spans: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        """Average each span of each text: ``(number of spans, width)`` float32, in order.

        Args:
            spans: for each text its spans as (first, end) token positions, which must not overlap.
        """
        pieces = [
            states[first:end]
            for states, text_spans in zip(self.texts(), spans, strict=True)
            for first, end in text_spans
        ]
        return self._mean(torch.cat(pieces), [len(piece) for piece in pieces])

    def _tokens(self, places: Sequence[int]) -> torch.Tensor:
        """Return the states of some tokens, ``(n, width)`` float32."""
        return self.flat.index_select(0, to_device(places, self.flat.device)).float()

    @staticmethod
    def _mean(flat: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        if len(lengths) == 1:  # one step, with an equal result
            return flat.float().mean(dim=0, keepdim=True)
        counts = to_device(lengths, flat.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), counts, output_size=len(flat))
        sums = torch.zeros(len(lengths), flat.shape[1], device=flat.device).index_add_(0, owner, flat.float())
        return sums / counts[:, None]
