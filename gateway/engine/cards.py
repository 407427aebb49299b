"""Find the graphics cards, decide whether each can be used, and give a remedy for those that cannot.

This module does not import torch, because commands that load no model use it too. :func:`read_machine` examines the
machine, :meth:`Machine.obstacle_to` returns the reason why a setting gets no card, and :func:`find_obstacle` alone
decides about a single card.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from gateway.engine.nvml import Card, Driver, Failure, read_driver, visible_cards

PACKING_CAPABILITY = (8, 0)
"""The minimum compute capability of the attention kernel for packed texts (FlashAttention-2)."""

CUDA_12_INDEX = "https://download.pytorch.org/whl/cu126"
"""The package index with the build of torch for drivers that run CUDA 12 and not 13."""

# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_LEAST_DRIVER = {13: 580, 12: 525}
# https://github.com/pytorch/pytorch/blob/main/RELEASE.md#pytorch-cuda-support-matrix: for each version of CUDA, and
# those up to the next, the compute capabilities that the builds have kernels for: the lowest, and the first that is too
# high.
_KERNELS = {(12, 0): ((5, 0), (10, 0)), (12, 8): ((7, 5), (99, 0)), (13, 0): ((7, 5), (99, 0))}
_LEAST_ON_ARM = (8, 0)

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_PCI = Path("/sys/bus/pci/devices")
_ROOT = Path("/")
_MAKEFILE = Path(__file__).parents[2] / "Makefile"


class Reason(StrEnum):
    """The kind of reason why a card, or all cards, cannot be used; stable, for programs."""

    NO_CARD = "no_card"
    NOT_NVIDIA = "not_nvidia"
    NO_DRIVER = "no_driver"
    DRIVER_FAILED = "driver_failed"
    DRIVER_TOO_OLD = "driver_too_old"
    NO_CUDA_LIBRARY = "no_cuda_library"
    NO_TORCH = "no_torch"
    TORCH_WITHOUT_CUDA = "torch_without_cuda"
    HIDDEN = "hidden"
    CARD_FAILED = "card_failed"
    CARD_TOO_OLD = "card_too_old"
    CARD_TOO_NEW = "card_too_new"
    NOT_CHOSEN = "not_chosen"
    CUDA_FAILED = "cuda_failed"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The reason why a card, or all cards, cannot be used.

    Attributes:
        what: the problem with the versions, as a clause.
        mend: the remedy with its command, as a clause; empty if there is no remedy.
    """

    reason: Reason
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}" if self.mend else self.what


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch.

    Attributes:
        cuda: the CUDA version that it is built for; ``None`` for a build without CUDA.
    """

    version: str
    cuda: tuple[int, int] | None
    is_rocm: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The parts of the process's environment that affect the advice.

    Attributes:
        is_image: whether the process runs in the gateway's own image, or in another image without the files for ``make``.
        vendors: makers of the graphics cards on the PCI bus, which a container sees even if it may not use them.
    """

    is_container: bool = False
    is_image: bool = False
    is_wsl: bool = False
    is_mac: bool = False
    vendors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """The cards of this machine, and the facts that decide whether they can be used.

    Attributes:
        visible: the cards that CUDA shows this process: ``cuda:0`` is the first.
        visible_devices: the value of ``CUDA_VISIBLE_DEVICES``, if it is set.
        cuda_error: CUDA's error when torch started it; empty if it works; ``None`` if torch has not been asked.
    """

    torch: TorchBuild | None
    driver: Driver | Failure
    visible: tuple[Card, ...]
    visible_devices: str | None
    surroundings: Surroundings
    cuda_error: str | None = None

    @property
    def cards(self) -> tuple[Card, ...]:
        """All cards that the driver knows."""
        return () if isinstance(self.driver, Failure) else self.driver.cards

    @property
    def obstacle(self) -> Obstacle | None:
        """The reason why no card can be used; ``None`` if at least one can."""
        if self.cuda_error != "" and (problem := self._common_obstacle()) is not None:
            return problem
        return _shared([find_obstacle(card, self.torch) for card in self.visible])

    def _common_obstacle(self) -> Obstacle | None:
        """Return the obstacle that all cards have in common; ``None`` without one."""
        if isinstance(self.driver, Failure):
            return _driver_obstacle(self.driver, self.surroundings)
        if not self.cards:
            return _absent(self.surroundings)
        problem = _torch_obstacle(self.torch, self.driver, self.surroundings)
        if problem is None and not self.visible:
            what = f"CUDA_VISIBLE_DEVICES={self.visible_devices!r} hides it"
            problem = Obstacle(Reason.HIDDEN, what, "unset it, or list numbers that `nvidia-smi -L` shows")
        elif problem is None and self.cuda_error:
            if (known := _shared([find_obstacle(card, self.torch) for card in self.visible])) is not None:
                return known  # the driver's message is more precise than CUDA's
            problem = Obstacle(Reason.CUDA_FAILED, f"CUDA does not start ({self.cuda_error})", _MEND_CUDA)
        if problem is None:
            return None
        card = _with_article(self.cards[0].name) if self.cards[0].name else "a card"
        return Obstacle(problem.reason, f"{card} is here, but {problem.what}", problem.mend)

    @property
    def is_unsure(self) -> bool:
        """Whether torch must be asked, because the driver's library does not answer and this torch could use a card."""
        has_cuda = self.torch is not None and self.torch.cuda is not None
        return has_cuda and isinstance(self.driver, Failure) and self.cuda_error is None

    def obstacle_to(self, setting: str) -> Obstacle | None:
        """Return the reason why a value of ``device`` gets no card; ``None`` if it gets a card.

        Args:
            setting: ``auto``, ``cuda`` or ``cuda:N``.
        """
        if self.obstacle is not None or setting == "cuda":
            return self.obstacle
        if setting == "auto":
            return _shared([self.left_out(index) for index in range(len(self.visible))])
        index = int(setting.removeprefix("cuda:"))
        if index >= len(self.visible):
            here = ", ".join(f"cuda:{number} {card.name}" for number, card in enumerate(self.visible))
            return Obstacle(Reason.NO_CARD, f"there is no {setting} here, only {here}")
        return find_obstacle(self.visible[index], self.torch)

    def left_out(self, index: int) -> Obstacle | None:
        """Return the reason why ``device: auto`` leaves out a visible card; ``None`` if it uses the card."""
        card = self.visible[index]
        if (obstacle := find_obstacle(card, self.torch)) is not None or card.capability >= PACKING_CAPABILITY:
            return obstacle
        return Obstacle(
            Reason.NOT_CHOSEN,
            f"{_with_article(card.name)} has compute capability {_dots(card.capability)}, and packing texts needs "
            f"{_dots(PACKING_CAPABILITY)}",
            f"`device: cuda:{index}` in models.yaml uses it anyway, with padding",
        )


def read_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Read the current state of the driver, its cards, torch's build and the surroundings. Takes a few milliseconds."""
    driver = read_driver()
    visible_devices = environ.get("CUDA_VISIBLE_DEVICES")
    cards = () if isinstance(driver, Failure) else driver.cards
    return Machine(read_torch(), driver, visible_cards(cards, visible_devices), visible_devices, _surroundings(environ))


def read_torch() -> TorchBuild | None:
    """Read the build target of the installed torch, without importing it; ``None`` without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    values = dict(re.findall(r"^(\w+)(?:: [^=\n]+)? = '([^'\n]*)'$", text, re.MULTILINE))
    cuda = re.match(r"(\d+)\.(\d+)", values.get("cuda", ""))
    return TorchBuild(
        values.get("__version__", ""), (int(cuda[1]), int(cuda[2])) if cuda else None, is_rocm="hip" in values
    )


def find_obstacle(card: Card, torch: TorchBuild | None) -> Obstacle | None:
    """Return the reason why a card cannot be used with a torch for CUDA, regardless of a model's entry."""
    if card.error:
        return Obstacle(
            Reason.CARD_FAILED,
            f"the driver cannot read card {card.index} ({card.error})",
            "look for `Xid` in `dmesg`, and restart the machine",
        )
    cuda = (13, 0) if torch is None or torch.cuda is None else torch.cuda
    least, beyond = _KERNELS[max(version for version in _KERNELS if version <= max(cuda, (12, 0)))]
    name = f"{_with_article(card.name)} (compute capability {_dots(card.capability)})"
    what = f"torch for CUDA {_dots(cuda)} has no kernels for {name}"
    older = _KERNELS[12, 0][0]
    if platform.machine() == "aarch64":
        least = older = _LEAST_ON_ARM
    if card.capability < least:
        mend = f"install the build for CUDA 12.6, {_install(CUDA_12_INDEX)}" if older <= card.capability else ""
        return Obstacle(Reason.CARD_TOO_OLD, what, mend)
    if card.capability >= beyond:
        return Obstacle(
            Reason.CARD_TOO_NEW, what, f"upgrade the driver to {_LEAST_DRIVER[13]} or newer, then {_install('')}"
        )
    return None


def describe_others(card: Card) -> str:
    """Describe the other processes on a card, such as ``ollama (pid 812) 5,120 MiB``; empty without others."""
    return ", ".join(
        f"{process.name} (pid {process.pid})"
        + ("" if process.memory_bytes is None else f" {process.memory_bytes / 2**20:,.0f} MiB")
        for process in card.others
    )


def torch_index(driver: Driver) -> str | None:
    """Return the package index of a torch that the driver can run: empty for PyPI; ``None`` if the driver is too old."""
    major = 0 if driver.cuda is None else driver.cuda[0]
    return "" if major >= 13 else CUDA_12_INDEX if major == 12 else None


# --------------------------------------------------------------------------------------------------- what is in the way


def _shared(obstacles: Sequence[Obstacle | None]) -> Obstacle | None:
    """Return the first card's obstacle if all cards have one; ``None`` if a card has no obstacle."""
    return None if None in obstacles else obstacles[0]


def _torch_obstacle(torch: TorchBuild | None, driver: Driver, where: Surroundings) -> Obstacle | None:
    """Return the reason why this torch cannot use any card with this driver."""
    if torch is None:
        return Obstacle(Reason.NO_TORCH, "torch is not installed", "`make install`")
    if torch.is_rocm:
        what = f"torch {torch.version} is built for AMD's cards (ROCm)"
        return Obstacle(Reason.TORCH_WITHOUT_CUDA, what, _torch_remedy(driver, where))
    if torch.cuda is None:
        what = f"torch {torch.version} is a build without CUDA"
        return Obstacle(Reason.TORCH_WITHOUT_CUDA, what, _torch_remedy(driver, where))
    if driver.cuda is None:
        mend = "install the driver's compute part (libcuda.so.1)"
        if where.is_container:
            mend = "NVIDIA_DRIVER_CAPABILITIES must be `compute,utility` for this container"
        return Obstacle(Reason.NO_CUDA_LIBRARY, f"driver {driver.version} comes without its CUDA library", mend)
    if driver.cuda[0] < torch.cuda[0]:
        needed = _LEAST_DRIVER.get(torch.cuda[0])
        what = (
            f"driver {driver.version} (CUDA {_dots(driver.cuda)}) is too old for torch {torch.version}, which is built for "
            f"CUDA {_dots(torch.cuda)}" + ("" if needed is None else f" and needs driver {needed} or newer")
        )
        return Obstacle(Reason.DRIVER_TOO_OLD, what, _torch_remedy(driver, where))
    return None


def _torch_remedy(driver: Driver, where: Surroundings) -> str:
    index = torch_index(driver)
    if index is None:
        return f"upgrade the driver to {_LEAST_DRIVER[13]} or newer (now {driver.version})" + (
            " on Windows, not in WSL" if where.is_wsl else ""
        )
    other = "" if not index else f", or upgrade the driver to {_LEAST_DRIVER[13]} or newer"
    return f"install the build that fits, {_install(index, is_image=where.is_image)}{other}"


def _install(index: str, *, is_image: bool = False) -> str:
    """Return the command that installs torch from an index; empty for PyPI."""
    if is_image:
        return f"`docker build --build-arg TORCH_INDEX={index} .`"
    return f"`make clean run TORCH_INDEX={index}`" if index else "`make clean run`"


def _absent(where: Surroundings) -> Obstacle:
    """Return the reason why no card is present, with a working driver or without a driver."""
    if where.is_mac:
        return Obstacle(Reason.NOT_NVIDIA, "no accelerator is present that is supported; Apple's GPU (MPS) is not")
    if "NVIDIA" not in where.vendors and "AMD" in where.vendors:
        return Obstacle(Reason.NOT_NVIDIA, "no accelerator is present that is supported; AMD's cards (ROCm) are not")
    return Obstacle(Reason.NO_CARD, "no accelerator is present")


# Error codes of NVML, which are part of its interface: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html
_NO_PERMISSION, _NOT_LOADED, _NO_LIBRARY, _LOST, _MISMATCH, _UNKNOWN = 4, 9, 12, 15, 18, 999
_MENDS = {
    _NO_PERMISSION: "let this user read and write /dev/nvidia* (groups `video` and `render`)",
    _NOT_LOADED: "load the module with `sudo modprobe nvidia`; after an update of the kernel or the driver, restart the "
    "machine",
    _LOST: "look for `Xid` in `dmesg`, and restart the machine",
    _MISMATCH: "the driver was updated while its old module is loaded: restart the machine",
}
_MEND_CUDA = (
    "restart the machine, or after it was suspended `sudo modprobe --remove nvidia_uvm && sudo modprobe nvidia_uvm`"
)
_USE_GPUS = "start the container with `--gpus all`; the host needs NVIDIA's container toolkit"
_CONTAINER_MENDS = {
    _NOT_LOADED: _USE_GPUS,
    _NO_LIBRARY: _USE_GPUS,
    _NO_PERMISSION: f"{_USE_GPUS}, and the container's user needs access to /dev/nvidia*",
    _MISMATCH: "the host's driver was updated: restart the host, then the container",
    _UNKNOWN: "restart the container: the host has taken its cards away (`systemctl daemon-reload` does that)",
}


def _driver_obstacle(failure: Failure, where: Surroundings) -> Obstacle:
    """Return the reason why the driver does not answer."""
    if failure.code == _NO_LIBRARY and "NVIDIA" not in where.vendors and not where.is_wsl:
        return _absent(where)
    if where.is_wsl and failure.code in (_NO_LIBRARY, _NOT_LOADED):
        mend = "install NVIDIA's driver on Windows, not in WSL, and run `wsl --update`"
    elif where.is_container and failure.code in _CONTAINER_MENDS:
        mend = _CONTAINER_MENDS[failure.code]
    else:
        mend = _MENDS.get(failure.code, "`nvidia-smi` must work first; restarting the machine often helps")
    if failure.code == _NO_LIBRARY:
        if not where.is_container and not where.is_wsl:
            mend = f"install NVIDIA's driver, {_LEAST_DRIVER[13]} or newer"
        return Obstacle(Reason.NO_DRIVER, "an NVIDIA card is here, but its driver is not", mend)
    return Obstacle(Reason.DRIVER_FAILED, f"NVIDIA's driver does not answer ({failure.message})", mend)


# ----------------------------------------------------------------------------------------------------------- what is here


def _surroundings(environ: Mapping[str, str]) -> Surroundings:
    kernel = _read(_ROOT / "proc/sys/kernel/osrelease").lower()
    markers = (_ROOT / ".dockerenv", _ROOT / "run/.containerenv")
    is_container = "KUBERNETES_SERVICE_HOST" in environ or any(marker.exists() for marker in markers)
    return Surroundings(
        is_container=is_container,
        is_image=is_container and not _MAKEFILE.exists(),
        is_wsl="microsoft" in kernel and (_ROOT / "dev/dxg").exists(),
        is_mac=sys.platform == "darwin",
        vendors=tuple(_vendors_on_bus()),
    )


def _vendors_on_bus() -> list[str]:
    """Return the makers of the graphics cards and accelerators on the PCI bus (its classes 0x03 and 0x12)."""
    found = set()
    for folder in sorted(_PCI.glob("*")):
        if _read(folder / "class")[:4] in ("0x03", "0x12"):
            found.add(_VENDORS.get(_read(folder / "vendor"), ""))
    return sorted(found - {""})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _dots(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _with_article(name: str) -> str:
    """Return a card's name with its article."""
    return f"an {name}" if name[:1] in ("N", "A") else f"a {name}"
