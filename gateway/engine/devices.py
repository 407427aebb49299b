"""Choose the device, the number format and the threads a model runs with."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from gateway.engine.memory import available_host_bytes
from gateway.errors import LoadError

_MIN_STREAMS = 2
_MAX_THREADS_A_STREAM = 4


def has_accelerator() -> bool:
    """Return whether a CUDA device is present."""
    return torch.cuda.is_available()


def choose_devices(setting: str) -> tuple[str, ...]:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to the devices that get a replica of the model each.

    Raises:
        LoadError: the device is not present.
    """
    num_cards = torch.cuda.device_count() if has_accelerator() else 0
    if setting == "cpu" or (setting == "auto" and not num_cards):
        return ("cpu",)
    if setting in ("auto", "cuda") and num_cards:
        return tuple(f"cuda:{index}" for index in range(num_cards))
    if setting == "cuda" or int(setting.partition(":")[2]) >= num_cards:
        raise LoadError(f"device {setting} is not present; this machine has {num_cards} CUDA devices")
    return (setting,)


def choose_dtype(setting: str, device: str) -> str:
    """Resolve ``auto`` to the fastest number format that keeps vectors within tolerance on the device.

    Raises:
        LoadError: float16 on a CPU, where it is many times slower than float32.
    """
    if setting == "float16" and device == "cpu":
        raise LoadError(
            "dtype float16 is about eight times slower than float32 on a CPU; use bfloat16, float32 or auto"
        )
    if setting != "auto":
        return setting
    if device != "cpu":
        return "float16"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 is emulated, and slower than float32. On Arm, torch does not say.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _num_cores() -> int:
    """Return the physical cores that this process may use: a second thread on a core does not make matrices faster."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0)))


def available_bytes(device: str) -> int:
    """Return the free memory of a device, in bytes."""
    if device == "cpu":
        return available_host_bytes()
    free, _total = torch.cuda.mem_get_info(device)
    return int(free)


@dataclass(frozen=True, slots=True)
class CpuThreads:
    """The cores of a model: forwards that run side by side, and the threads of each."""

    num_streams: int
    per_stream: int


def choose_cpu_threads(setting: int, runtime: str) -> CpuThreads:
    """Share the cores out; ``setting`` is the number of threads to use, 0 lets the gateway choose.

    The threads of one forward wait for each other after every operation: as soon as one of them shares its core with the
    event loop, all are late. Forwards side by side do not wait for each other, so OpenVINO runs several streams of few
    threads. torch has one pool of threads, which spin while they wait: it leaves one core to the event loop. Measured in
    docs/performance.md.
    """
    num_cores = _num_cores()
    if runtime != "openvino":
        return CpuThreads(1, setting or max(1, num_cores - 1))
    num_threads = setting or num_cores
    num_streams = min(num_threads, max(_MIN_STREAMS, num_threads // _MAX_THREADS_A_STREAM))
    return CpuThreads(num_streams, num_threads // num_streams)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports too little memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator and OpenVINO raise a plain RuntimeError.
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in message for sign in ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


def release_memory() -> None:
    """Give cached blocks of device memory back, so that a smaller batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_host_memory() -> None:
    """Give freed host memory back to the system, where the C library can: glibc keeps what lies between live blocks."""
    with suppress(AttributeError):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)
