"""Ask the driver about the graphics cards, through its own library (NVML).

NVML works without CUDA and with any torch. It answers even while a card hangs, when a call to CUDA would block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, slots=True)
class Process:
    """Another process that uses a card.

    Attributes:
        memory_bytes: its memory on the card; ``None`` if the driver does not say (WSL2, some containers).
    """

    pid: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Card:
    """A card, or a slice of one (MIG).

    Attributes:
        index: its number in ``nvidia-smi``, in the order of the PCI bus.
        uuid: ``GPU-…`` or ``MIG-…``, as ``nvidia-smi -L`` shows it.
        capability: CUDA compute capability, such as (8, 6).
        total_bytes: its memory; 0 if the driver does not say, as for a card that shares the CPU's memory.
        free_bytes: memory that no process uses; 0 if the driver does not say.
        others: the other processes on the card.
        error: the reason why the driver cannot read the card, such as ``GPU is lost``; the other attributes are then
            empty.
    """

    index: int
    uuid: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    total_bytes: int = 0
    free_bytes: int = 0
    others: tuple[Process, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver and its cards.

    Attributes:
        version: the version of the driver, such as ``550.54.14``.
        cuda: the newest CUDA version that it supports; ``None`` if its CUDA library is not installed.
        cards: the cards in the order of the PCI bus, regardless of ``CUDA_VISIBLE_DEVICES``.
    """

    version: str
    cuda: tuple[int, int] | None
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """NVML's own failure.

    Attributes:
        code: one of pynvml's ``NVML_ERROR_*``.
    """

    code: int
    message: str


def read_driver() -> Driver | Failure:
    """Return the driver with the current state of its cards, or its failure to answer. Takes a few milliseconds."""
    import pynvml

    try:
        nvml = load()
        version = str(nvml.nvmlSystemGetDriverVersion())
        number = _ask_or(None, nvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda = None if number is None else (number // 1000, number % 1000 // 10)
        cards = [card for index in range(nvml.nvmlDeviceGetCount()) for card in _read_cards(nvml, index)]
    except pynvml.NVMLError as error:
        return Failure(error.value, str(error))
    return Driver(version, cuda, tuple(cards))


def visible_cards(cards: tuple[Card, ...], setting: str | None) -> tuple[Card, ...]:
    """Return the cards that CUDA shows: the listed cards, up to the first entry that is not a card, as in CUDA.

    The list contains numbers, whose leading digits alone count, or unique prefixes of UUIDs. A card that is listed
    twice hides all cards. CUDA numbers the cards in the order of the list, or of the PCI bus, as ``gateway.engine``
    requests.
    """
    if setting is None:
        return cards
    shown: list[Card] = []
    for entry in setting.split(","):
        name = entry.strip()
        if number := re.match(r"\+?(\d+)", name):
            found = [card for card in cards if card.index == int(number[1])][:1]
        else:
            found = [card for card in cards if name.startswith(("GPU-", "MIG-")) and card.uuid.startswith(name)]
        if len(found) != 1:
            break
        if found[0] in shown:
            return ()
        shown += found
    return tuple(shown)


@cache
def load() -> Any:
    """Return pynvml, initialized; a failure is not cached.

    Raises:
        pynvml.NVMLError: the driver is missing, or does not answer.
    """
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _read_cards(nvml: Any, index: int) -> Iterator[Card]:
    """Yield the card with an index, or its slices if it is divided."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
        slices = list(_slices(nvml, handle))
        for part in slices or [handle]:
            memory = _ask_or(None, nvml.nvmlDeviceGetMemoryInfo, part)
            yield Card(
                index=index,
                uuid=str(nvml.nvmlDeviceGetUUID(part)),
                name=str(nvml.nvmlDeviceGetName(part)),
                capability=capability,
                total_bytes=0 if memory is None else int(memory.total),
                free_bytes=0 if memory is None else int(memory.free),
                others=tuple(_others(nvml, part)),
            )
    except nvml.NVMLError as error:
        yield Card(index, error=str(error))


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    """Yield the handles of the slices of a card in MIG mode."""
    is_divided, _pending = _ask_or((0, 0), nvml.nvmlDeviceGetMigMode, handle)
    if is_divided:
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            part = _ask_or(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            if part is not None:
                yield part


def _others(nvml: Any, handle: Any) -> Iterator[Process]:
    """Yield the other processes on a card; NVML lists a process that computes and draws twice."""
    seen = {os.getpid()}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _ask_or((), ask, handle):
            if process.pid not in seen:
                seen.add(process.pid)
                path = _ask_or("", nvml.nvmlSystemGetProcessName, process.pid)
                name = PurePath(str(path).split(" ")[0]).name or "unknown"
                yield Process(process.pid, name, process.usedGpuMemory)


def _ask_or(default: Any, ask: Callable[..., Any], *args: Any) -> Any:
    """Return NVML's answer, or the default if this card or driver does not support the call.

    Raises:
        pynvml.NVMLError_GpuIsLost: the card has fallen off the bus.
    """
    import pynvml

    try:
        return ask(*args)
    except pynvml.NVMLError_GpuIsLost:
        raise
    except (pynvml.NVMLError, UnicodeDecodeError):  # the name of another process may have any bytes
        return default
