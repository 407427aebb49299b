"""Attention within the texts of a packed row: FlashAttention on a card, and text by text elsewhere.

The kernel is built into torch (CUDA), so the flash-attn package, which would have to be compiled, is not needed. The kernel
is called directly, because torch's function for texts of varying length launches a second kernel and passes through Python
for each layer. The kernel does not exist on a CPU, where each text is computed separately. That is slow but equivalent, so
the surrounding code can be tested without a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

# The limits of the kernel, from the checks in pytorch's flash_api.cpp.
DTYPES = ("float16", "bfloat16")
MIN_CAPABILITY = (8, 0)
HEAD_WIDTH_STEP, MAX_HEAD_WIDTH = 8, 256


@dataclass(frozen=True, slots=True)
class Texts:
    """The places of the texts in a packed row.

    Attributes:
        boundaries: ``(b + 1,)`` int32, on the device: where each text begins, and the end of the last.
        lengths: tokens of each text.
        longest: the number of tokens of the longest text; kept because every layer needs it.
    """

    boundaries: torch.Tensor
    lengths: Sequence[int]
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest", max(self.lengths))


def has_kernel(tensor: torch.Tensor) -> bool:
    """Return whether attention over a tensor is computed by the kernel."""
    return tensor.is_cuda


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, texts: Texts, keys: Texts, scale: float
) -> torch.Tensor:
    """Attend within each text.

    Args:
        query: ``(total, heads, d)``, the last dimension contiguous.
        key: ``(k, heads, d)``: the tokens that are attended to; ``value`` has the same shape.
        texts: the places of the texts in ``query``.
        keys: the places of the texts in ``key`` and ``value``.

    Returns:
        ``(total, heads, d)``.
    """
    if has_kernel(query):
        flash = torch.ops.aten._flash_attention_forward
        longest = texts.longest, keys.longest
        options = 0.0, False, False  # no dropout, not causal, no mask for debugging
        attended: torch.Tensor = flash(
            query, key, value, texts.boundaries, keys.boundaries, *longest, *options, scale=scale
        )[0]
        return attended
    counts = ((query, texts.lengths), (key, keys.lengths), (value, keys.lengths))
    pieces = zip(*(torch.split(tensor, list(numbers)) for tensor, numbers in counts), strict=True)
    alone = []
    for piece in pieces:
        q, k, v = (tensor.transpose(0, 1) for tensor in piece)
        alone.append(functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1))
    return torch.cat(alone)
