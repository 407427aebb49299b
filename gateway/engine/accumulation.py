"""Choose the precision in which a card adds up matrix products, and let only some forwards use float16.

For float16, torch has one switch for the whole process (``allow_fp16_accumulation``), which each product reads when it is
launched. So the switch is on only while every running forward allows it. While another forward runs too, all products
accumulate in float32, which is slower and more exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

_NOTHING = nullcontext()


def keep_sums_in_float32() -> None:
    """Never split a product into parts that are added in 16 bits. Call it before the first product on a card.

    Otherwise, products of few rows would be split, and a text's vector would depend on its batch. A product reads the
    setting when it is launched, and a graph keeps what it has read.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class Accumulation:
    """Counts the running forwards of both kinds, and sets torch's switch accordingly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = {True: 0, False: 0}

    @contextmanager
    def forward(self, *, in_float16: bool) -> Iterator[None]:
        """Run a forward on a card. Any number of threads may call this.

        Args:
            in_float16: whether the products of the forward may accumulate in float16.
        """
        self._count(in_float16, 1)
        try:
            yield
        finally:
            self._count(in_float16, -1)

    def exact(self) -> AbstractContextManager[None]:
        """Let the products of a part of a forward accumulate in float32, whatever the forward allows."""
        return self.forward(in_float16=False) if self._num_running[True] else _NOTHING

    def _count(self, in_float16: bool, change: int) -> None:
        with self._lock:
            self._num_running[in_float16] += change
            is_on = self._num_running[True] > 0 and self._num_running[False] == 0
            torch.backends.cuda.matmul.allow_fp16_accumulation = is_on


ACCUMULATION = Accumulation()
"""The counter of this process."""


def keep_long_sums_exact(model: nn.Module, width: int) -> None:
    """Let the products of a model that add up more than ``width`` numbers accumulate in float32, in every forward.

    These are the second products of the feed-forwards. Their sums are the longest, and so lose the most in float16, or
    overflow (llama.cpp#26044).
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[1] > width:
            module.forward = partial(_compute_exactly, module.forward)


def _compute_exactly(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with ACCUMULATION.exact():
        return forward(x)
