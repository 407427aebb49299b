"""Let the matrix products of some forwards add up in float16, and of no others.

torch has one switch for the whole process (``allow_fp16_accumulation``), which each product reads when it is launched. So a
forward turns it on only while no forward runs that must not have it: next to one of those it adds up in float32 as well,
which is slower and more exact.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Accumulation:
    """Counts the forwards of both kinds that run now, and sets torch's switch by them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = {True: 0, False: 0}

    @contextmanager
    def forward(self, *, in_float16: bool) -> Iterator[None]:
        """Run a forward on a card, by threads of any number.

        Args:
            in_float16: its products may add up in float16.
        """
        self._count(in_float16, 1)
        try:
            yield
        finally:
            self._count(in_float16, -1)

    def _count(self, in_float16: bool, change: int) -> None:
        with self._lock:
            self._num_running[in_float16] += change
            is_on = self._num_running[True] > 0 and self._num_running[False] == 0
            torch.backends.cuda.matmul.allow_fp16_accumulation = is_on


ACCUMULATION = Accumulation()
"""That of this process."""
