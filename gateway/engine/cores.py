"""The processor cores that this process may use: physical ones, by NUMA node, within its affinity and its quota."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_SYSTEM = Path("/sys")


@dataclass(frozen=True, slots=True)
class Cores:
    """Physical cores: a second thread on a core does not make matrices faster.

    Attributes:
        per_node: number of cores on each NUMA node that has any, in descending order.
        quota: number of cores whose time the control group grants (``docker run --cpus``); ``None`` for no limit.
    """

    per_node: tuple[int, ...]
    quota: float | None = None

    @property
    def num_usable(self) -> int:
        total = sum(self.per_node)
        return total if self.quota is None else max(1, min(total, int(self.quota)))


def read_cores(allowed: Collection[int] | None = None, system: Path = _SYSTEM) -> Cores:
    """Read the usable cores.

    Args:
        allowed: numbers of the logical processors that may be used; ``None`` for those of this process's affinity.
        system: where the kernel shows its hardware.
    """
    processors = os.sched_getaffinity(0) if allowed is None else allowed
    nodes = _nodes(system)
    cores: defaultdict[int, set[str]] = defaultdict(set)
    for processor in processors:
        siblings = _read(system / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        cores[nodes.get(processor, 0)].add(siblings or str(processor))
    return Cores(tuple(sorted(map(len, cores.values()), reverse=True)), _quota(system / "fs/cgroup"))


def _nodes(system: Path) -> dict[int, int]:
    """Return the NUMA node of each logical processor; empty if the kernel reports none."""
    folders = (system / "devices/system/node").glob("node[0-9]*")
    return {
        processor: int(folder.name.removeprefix("node"))
        for folder in folders
        for processor in _numbers(_read(folder / "cpulist"))
    }


def _numbers(ranges: str) -> list[int]:
    """Return the numbers of a list in the kernel's form, such as ``0-3,8``."""
    bounds = [part.partition("-") for part in ranges.split(",") if part]
    return [number for first, _, last in bounds for number in range(int(first), int(last or first) + 1)]


def _quota(folder: Path) -> float | None:
    """Return the number of cores whose time a control group grants, from the files of version 2 or 1."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_read(folder / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
