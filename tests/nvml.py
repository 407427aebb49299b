"""NVIDIA's driver instead of a real one: pynvml's functions, replaced one by one at the edge, with pynvml's own errors."""

# ruff: noqa: N802  pynvml's own names

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from gateway.engine import cards, nvml

GIB = 2**30


@dataclass
class FakeCard:
    """A card of the driver. ``processes`` has, for each process, its number, name, memory in bytes, and whether it computes.

    Attributes:
        slices: the cards that it is divided into (MIG).
        error: one of pynvml's ``NVML_ERROR_*`` that everything about the card fails with.
        has_memory: whether the driver says how much memory it has.
    """

    name: str = "NVIDIA GeForce RTX 3090"
    capability: tuple[int, int] = (8, 6)
    total: int = 24 * GIB
    free: int = 24 * GIB
    uuid: str = "GPU-3090"
    processes: tuple[tuple[int, str, int | None, bool], ...] = ()
    slices: list[FakeCard] = field(default_factory=list)
    error: int = 0
    has_memory: bool = True


@dataclass
class FakeDriver:
    """The driver's library; its handles are the cards themselves.

    Attributes:
        cuda: the newest CUDA version, as NVML writes it; 0 for no CUDA library.
        error: one of pynvml's ``NVML_ERROR_*`` that it fails to start with.
    """

    cards: list[FakeCard]
    version: str = "580.95.05"
    cuda: int = 13000
    error: int = 0

    def nvmlInit(self) -> None:
        _raise(self.error)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.version

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        _raise(0 if self.cuda else pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        _raise(self.cards[index].error)
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:
        every = [*self.cards, *(part for card in self.cards for part in card.slices)]
        found = [card for card in every if card.uuid == uuid]
        _raise(0 if found else pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def nvmlDeviceGetCudaComputeCapability(self, card: FakeCard) -> tuple[int, int]:
        return card.capability

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:
        _raise(0 if card.slices else pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        _raise(0 if index < len(card.slices) else pynvml.NVML_ERROR_NOT_FOUND)
        return card.slices[index]

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> Any:
        _raise(0 if card.has_memory else pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)

    def nvmlDeviceGetUtilizationRates(self, card: FakeCard) -> Any:
        _raise(pynvml.NVML_ERROR_NOT_SUPPORTED if card.slices else 0)
        return SimpleNamespace(gpu=42)

    def nvmlDeviceGetPowerManagementLimit(self, card: FakeCard) -> int:
        _raise(pynvml.NVML_ERROR_NOT_SUPPORTED if card.uuid.startswith("MIG-") else 0)
        return 350_000

    def nvmlDeviceGetMaxClockInfo(self, card: FakeCard, clock: int) -> int:
        return 2100

    def nvmlDeviceGetClockInfo(self, card: FakeCard, clock: int) -> int:
        _raise(pynvml.NVML_ERROR_NOT_SUPPORTED if card.uuid.startswith("MIG-") else 0)
        return 1695

    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, card: FakeCard) -> int:
        return 348_000

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: FakeCard) -> int:
        return int(pynvml.nvmlClocksEventReasonSwPowerCap)

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[Any]:
        return [_process(*one) for one in card.processes if one[3]]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: FakeCard) -> list[Any]:
        return [_process(*one) for one in card.processes]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        names = [one[1] for card in self.cards for one in card.processes if one[0] == pid]
        _raise(0 if names and names[0] else pynvml.NVML_ERROR_NO_PERMISSION)
        return names[0]


def _process(pid: int, _name: str, memory: int | None, _computes: bool) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=memory)


def _raise(code: int) -> None:
    if code:
        raise pynvml.NVMLError(code)


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    """Have the gateway find this driver instead of the machine's."""
    for name in (name for name in dir(driver) if name.startswith("nvml")):
        monkeypatch.setattr(pynvml, name, getattr(driver, name))
    monkeypatch.setattr(nvml, "load", cache(nvml.load.__wrapped__))


def install_cuda(monkeypatch: pytest.MonkeyPatch, cards: list[FakeCard], error: str = "") -> None:
    """Have torch find these cards with CUDA, or say that CUDA does not start."""

    def properties(device: int | str) -> Any:
        card = cards[int(str(device).removeprefix("cuda").removeprefix(":") or 0)]
        major, minor = card.capability
        uuid = card.uuid.removeprefix("GPU-")
        return SimpleNamespace(uuid=uuid, name=card.name, major=major, minor=minor, total_memory=card.total)

    def start() -> None:
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards) and not error)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "init", start)


def install_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, *, cuda: str | None) -> None:
    """Have the gateway find another build of torch, by the file that torch itself describes its build in."""
    text = (
        "from typing import Optional\n\n__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']\n"
        f"__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda!r}\ngit_version = 'cf30153c4c13'\n"
        f"hip: Optional[str] = {'7.1.25424' if 'rocm' in version else None!r}\n"
    )
    (folder / "version.py").write_text(text)
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(cards, "find_spec", lambda _name: spec)


def install_surroundings(
    monkeypatch: pytest.MonkeyPatch, root: Path, *, vendors: tuple[str, ...] = (), where: str = ""
) -> None:
    """Have the gateway run with graphics cards of these makers (PCI ids), and in a ``container``, ``wsl`` or a ``mac``."""
    for number, vendor in enumerate(vendors):
        card = root / "sys/bus/pci/devices" / f"0000:0{number}:00.0"
        card.mkdir(parents=True, exist_ok=True)
        (card / "class").write_text("0x030000\n")
        (card / "vendor").write_text(f"{vendor}\n")
    disk = root / "sys/bus/pci/devices/0000:0f:00.0"
    disk.mkdir(parents=True, exist_ok=True)
    (disk / "class").write_text("0x010802\n")
    (disk / "vendor").write_text("0x10de\n")
    (root / "proc/sys/kernel").mkdir(parents=True, exist_ok=True)
    kernel = "6.6.87.2-microsoft-standard-WSL2" if where == "wsl" else "6.8.0-85-generic"
    (root / "proc/sys/kernel/osrelease").write_text(f"{kernel}\n")
    (root / "dev").mkdir(exist_ok=True)
    if where == "wsl":
        (root / "dev/dxg").touch()
    if where == "container":
        (root / ".dockerenv").touch()
    monkeypatch.setattr(cards, "_ROOT", root)
    monkeypatch.setattr(cards, "_MAKEFILE", root / ("none" if where == "container" else "dev"))
    monkeypatch.setattr(cards, "_PCI", root / "sys/bus/pci/devices")
    monkeypatch.setattr("sys.platform", "darwin" if where == "mac" else "linux")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
