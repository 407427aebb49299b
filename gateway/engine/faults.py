"""Classify an error of a forward pass: too little memory, a lost card, or a fault of only this batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
import torch

from gateway.telemetry.tracebacks import chain

T = TypeVar("T")

log = structlog.get_logger(__name__)

# torch's CPU allocator and OpenVINO raise a plain RuntimeError; on a card that is full, cuBLAS gets no workspace.
_MEMORY_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "device_allocation_failed",  # cuDNN 9's name for it
    "nvml_success ==",  # torch's error when NVML cannot say which process holds the memory: on a slice, and on small boards
)
# Messages of the errors after which "the process must be terminated and relaunched":
# https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
_FINAL_SIGNS = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "illegal instruction",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "context is destroyed",
    "busy or unavailable",
)
# Any failing call to CUDA or its libraries may be the first to notice.
_CUDA_SIGNS = ("cuda error", "cublas_status_", "cudnn_status_", "cuda driver error")
# The time limit for releasing cached memory: freeing it waits for the kernels of its card, and a kernel may hang.
_RELEASE_S = 5.0
# The time limit for a card to show that it still computes; kernels that were launched earlier run first.
_ANSWER_S = 60.0


class CardLost(Exception):
    """A card can no longer compute in this process; the message has the device and the reason.

    Attributes:
        device: the card's torch device, if known.
    """

    device: str | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports too little memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _MEMORY_SIGNS)


def is_card_lost(error: BaseException, device: str) -> bool:
    """Return whether a card can no longer compute in this process, after an error on it.

    There are two kinds of CUDA errors. After some, such as an illegal access to memory, every call fails with the same
    error until the process ends. Others, such as a shape that a kernel does not support, affect only that call. If the
    message does not show the kind, the card is tested with a small computation.

    Args:
        device: torch device on which the error was raised.
    """
    if device == "cpu":
        return False
    # Check each error in the chain: the surrounding code may have raised a less specific error, or failed during cleanup.
    errors = [
        cause
        for cause, _is_context in chain(error)
        if isinstance(cause, RuntimeError) and not isinstance(cause, torch.OutOfMemoryError)
    ]
    if any(sign in str(cause).lower() for cause in errors for sign in _FINAL_SIGNS):
        return True
    return any(_is_from_cuda(cause) for cause in errors) and not still_computes(device)


def find_lost_card(error: BaseException, devices: Sequence[str]) -> str | None:
    """Return the device that was lost, after an error of work that used all of them; ``None`` if no device was lost."""
    for cause, _is_context in chain(error):
        if isinstance(cause, CardLost):
            return cause.device or devices[0]
    suspects = [device for device in devices if is_card_lost(error, device)]
    # An error does not name its card, so another card may still work.
    broken = [device for device in suspects if len(suspects) > 1 and not still_computes(device)]
    return next(iter(broken or suspects), None)


def _is_from_cuda(error: RuntimeError) -> bool:
    message = str(error).lower()
    is_from_cuda = isinstance(error, torch.AcceleratorError) or any(sign in message for sign in _CUDA_SIGNS)
    return is_from_cuda and "out of memory" not in message


def still_computes(device: str) -> bool:
    """Return whether a card computes within the time limit; too little memory does not count as a failure."""
    try:
        return on_card(device, _ANSWER_S, lambda: float(torch.ones(8, device=device).sum()) == 8)
    except Exception as error:  # any error means that the card does not compute
        return is_out_of_memory(error)


def on_card(device: str, limit_s: float, work: Callable[[], T]) -> T:
    """Run part of a load on a device, without waiting forever for a card that hangs.

    Raises:
        CardLost: the work has not ended within the limit; its thread is abandoned.
        Exception: any error of the work.
    """
    if device == "cpu":
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name=f"load-{device}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        lost = CardLost(f"{device} has not ended its work after {limit_s:.0f} s")
        lost.device = device
        raise lost
    return results[0]


def release_memory() -> None:
    """Release cached blocks of device memory for other models; wait a few seconds at most."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    thread = threading.Thread(target=_empty_cache, name="release-memory", daemon=True)
    thread.start()
    thread.join(_RELEASE_S)
    if thread.is_alive():
        log.error("memory_not_released", reason=f"a card has not finished its work for {_RELEASE_S:.0f} s")


def _empty_cache() -> None:
    try:
        torch.cuda.empty_cache()
    except Exception as error:  # on a lost card, every call fails
        log.warning("memory_not_released", reason=str(error))
