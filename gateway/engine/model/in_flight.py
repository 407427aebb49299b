"""Texts that a device still computes: their results are being copied to the host, and are read when the device is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.model.host_memory import start_receiving
from gateway.engine.model.items import Encoded


def start_copy(tensor: torch.Tensor) -> Callable[[], npt.NDArray[np.float32]]:
    """Start copying a float32 tensor to the host, and return a function that returns the copy once the device is done.

    Keep no views of the result: from a card, it is in page-locked memory, which is scarce.
    """
    received = start_receiving(tensor)
    return lambda: received


class InFlight:
    """Texts whose computation was launched on a device.

    Args:
        read: a function that builds the results from the numbers that the device has copied to the host.
        device: the device; all work that was launched on it so far belongs to these texts, or to earlier texts.
    """

    def __init__(self, read: Callable[[], list[Encoded]], device: torch.device) -> None:
        self._read = read
        self._end: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._end.record(torch.cuda.current_stream(device))

    @property
    def is_done(self) -> bool:
        """Whether the device is done with these texts.

        Raises:
            RuntimeError: the device has failed.
        """
        return self._end is None or bool(self._end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until the device is done with these texts.

        Raises:
            RuntimeError: the device has failed.
        """
        if self._end is not None:
            self._end.synchronize()

    def read(self) -> list[Encoded]:
        """Return the result of each text, in order; the device must be done."""
        return self._read()

    def finish(self) -> list[Encoded]:
        """Wait, and return the result of each text, in order."""
        self.wait()
        return self.read()


def in_order(parts: Sequence[tuple[Sequence[int], list[Encoded]]]) -> list[Encoded]:
    """Return the results of all parts of a batch, in the order of the batch.

    Args:
        parts: the positions of some texts in the batch, and their results.
    """
    encoded = {row: result for rows, results in parts for row, result in zip(rows, results, strict=True)}
    return [encoded[row] for row in range(len(encoded))]
