"""Small forwards as CUDA graphs, which launch a few hundred kernels with one call.

Computing a short text takes less time than launching its kernels one by one, and each launch releases the interpreter's
lock and must get it back from a busy event loop. A graph has a fixed shape. So a row is padded to one of a few sizes, with
empty texts at its end, and its longest text is treated as if it were as long as the row.

A new shape is computed without a graph the first time, and as a graph from the second time on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog
import torch

log = structlog.get_logger(__name__)

_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Numbers of texts in a row; the padding after the last text counts as a text.
_TEXTS = (2, 9, 33)
# The limit for one model; each graph holds some hundred nodes in the card's memory, a few MiB.
_MOST_GRAPHS = 64

Choice: TypeAlias = int | None
Indices: TypeAlias = npt.NDArray[np.int32]

MIXED = -1
"""The adapter choice of a row whose texts have different adapters."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The properties of a row that are fixed in a graph.

    Attributes:
        texts: the number of texts, including padding.
        longest: the maximum number of tokens of a text.
        parts: names of the row's arrays, in order.
        choice: the adapter of all texts, or ``MIXED``; ``None`` without adapters.
    """

    tokens: int
    texts: int
    longest: int
    parts: tuple[str, ...]
    choice: Choice

    @property
    def sizes(self) -> list[int]:
        """The lengths of the arrays."""
        return [self.texts + 1 if name == "boundaries" else self.tokens for name in self.parts]

    def fill(self, parts: Mapping[str, Indices], lengths: Sequence[int]) -> dict[str, Indices]:
        """Pad the arrays of a row with tokens of id 0 in one more text, and with empty texts after it."""
        filled = {}
        for name, size in zip(self.parts, self.sizes, strict=True):
            filled[name] = np.full(size, self.tokens if name == "boundaries" else 0, np.int32)
            filled[name][: len(parts[name])] = parts[name]
        assert filled["boundaries"][len(lengths)] == sum(lengths)  # noqa: S101  texts would run into each other
        return filled


def find_shape(lengths: Sequence[int], parts: Sequence[str], choice: Choice, longest_short: int | None) -> Shape | None:
    """Return the shape that a row fits into; ``None`` if it is too large for a graph.

    Args:
        longest_short: the longest text for the attention kernel for short texts; ``None`` without that kernel.
    """
    tokens = next((size for size in _TOKENS if size >= sum(lengths)), None)
    texts = next((size for size in _TEXTS if size > len(lengths)), None)
    if tokens is None or texts is None:
        return None
    is_short = longest_short is not None and max(lengths) <= longest_short
    return Shape(tokens, texts, longest_short if is_short and longest_short else tokens, tuple(parts), choice)


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: torch.Tensor
    states: torch.Tensor
    replay: Callable[[], None]


class Graphs:
    """The graphs of a model on one card; only one forward may run at a time.

    Args:
        compute: the forward of a row, which takes the row's arrays in one tensor.
    """

    def __init__(self, device: torch.device, compute: Callable[[Shape, torch.Tensor], torch.Tensor]) -> None:
        self._device = device
        self._compute = compute
        self._seen: set[Shape] = set()
        self._graphs: dict[Shape, _Graph] = {}
        self._capturer: Capturer | None = None
        self.is_on = True

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, shape: Shape, together: torch.Tensor) -> torch.Tensor:
        """Return the states of a row, ``(shape.tokens, width)``, which the next forward overwrites."""
        graph = self._graphs.get(shape)
        if graph is None:
            if not self.is_on or shape not in self._seen or len(self._graphs) >= _MOST_GRAPHS:
                self._seen.add(shape)
                return self._compute(shape, together)
            graph = self._capture(shape, together)
            if graph is None:
                return self._compute(shape, together)
        graph.inputs.copy_(together)
        graph.replay()
        return graph.states

    def _capture(self, shape: Shape, together: torch.Tensor) -> _Graph | None:
        """Return the graph of a shape; ``None`` after a failure, which turns graphs off."""
        inputs = together.clone()
        try:
            self._capturer = self._capturer or Capturer(self._device)
            states, replay = self._capturer.capture(lambda: self._compute(shape, inputs))
        except Exception as error:  # of any class; without graphs, forwards are only slower
            self.is_on = False
            log.warning("graphs_refused", device=str(self._device), error=repr(error))
            return None
        graph = self._graphs[shape] = _Graph(inputs, states, replay)
        return graph


class Capturer:
    """Captures graphs on a card, all on one stream and in one memory pool, because no two run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return the result of some work, and a function that computes it again in the same memory.

        Other threads may use the card in the meantime. (``torch.cuda.graph`` would also run the garbage collector, during
        which they would wait.)
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work()  # loads kernels and allocates workspaces, which is not allowed during a capture
            graph: Any = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:  # an open capture would make every later call fail
                with suppress(Exception):  # its error only says that the capture was interrupted
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return result, graph.replay


def boundaries_of(lengths: Sequence[int]) -> Indices:
    """Return where each text begins, and the end of the last, ``(texts + 1,)``."""
    return np.array([0, *accumulate(lengths)], np.int32)
