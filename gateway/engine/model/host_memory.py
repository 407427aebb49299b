"""Copies between the host and a card through page-locked memory, for which the host does not wait.

torch has its own allocator for such memory, which records an event when the memory is *freed*. After a fatal error of the
card, recording it fails in a destructor and ends the process immediately, so that no request gets a response (torch 2.11 and
2.13). So this memory is never freed. A buffer is reused once its copy has ended and nothing on the host reads it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The sizes of buffers are powers of two, at least this one.
_LEAST_BYTES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Page-locked memory, and an event at the end of its last copy."""

    memory: torch.Tensor
    event: Any


class HostMemory:
    """The buffers of a process. Any number of threads may use it."""

    def __init__(self) -> None:
        # No lock: a finalizer returns a buffer, and the garbage collector may run it while its thread takes another one.
        self._idle: dict[tuple[torch.device, int], deque[_Buffer]] = {}
        self._all: list[_Buffer] = []
        # Keep the buffers even when the interpreter ends and clears all modules.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._all))

    def send(self, numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
        """Copy an array to a card.

        Raises:
            RuntimeError: the card has failed.
        """
        with self._buffer(numbers.nbytes, device) as buffer:
            source = buffer.memory[: numbers.nbytes].view(getattr(torch, numbers.dtype.name)).view(numbers.shape)
            source.numpy()[...] = numbers
            return source.to(device, non_blocking=True, copy=True)

    def start_receiving(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        """Start copying a tensor to the host, and return the array that holds the copy once the card is done.

        The buffer is reused when neither this array nor a view of it exists any longer.

        Raises:
            RuntimeError: the card has failed.
        """
        buffer = self._take(tensor.nbytes, tensor.device)
        target = buffer.memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        received: npt.NDArray[Any] = target.numpy()
        weakref.finalize(received, self._give, tensor.device, buffer).atexit = False
        target.copy_(tensor, non_blocking=True)
        buffer.event.record(_stream_of(tensor.device))
        return received

    @contextmanager
    def _buffer(self, num_bytes: int, device: torch.device) -> Iterator[_Buffer]:
        buffer = self._take(num_bytes, device)
        try:
            yield buffer
        finally:  # the card may have too little memory for a copy
            buffer.event.record(_stream_of(device))
            self._give(device, buffer)

    def _take(self, num_bytes: int, device: torch.device) -> _Buffer:
        """Return a buffer whose last copy has ended."""
        size = max(_LEAST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        with suppress(IndexError):
            buffer = self._idle_buffers(device, size).popleft()
            if buffer.event.query():
                return buffer
            self._give(device, buffer)
        buffer = _make_buffer(size)
        self._all.append(buffer)
        return buffer

    def _give(self, device: torch.device, buffer: _Buffer) -> None:
        self._idle_buffers(device, len(buffer.memory)).append(buffer)

    def _idle_buffers(self, device: torch.device, size: int) -> deque[_Buffer]:
        """Return the buffers of a size that nothing on the host reads."""
        return self._idle.setdefault((device, size), deque())


def _stream_of(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _make_buffer(size: int) -> _Buffer:
    return _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]


HOST_MEMORY = HostMemory()
"""The buffers of this process."""


def send(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device; the host does not wait for running computations of a card."""
    return HOST_MEMORY.send(numbers, device) if device.type == "cuda" else torch.from_numpy(numbers)


def start_receiving(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Start copying a tensor to the host, and return the array that holds the copy once the device is done."""
    return HOST_MEMORY.start_receiving(tensor) if tensor.is_cuda else np.asarray(tensor.numpy())
