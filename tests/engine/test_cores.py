"""The cores of a process are physical ones, on their NUMA nodes, within its affinity and its quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.engine.cores import Cores, read_cores


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Make the kernel's files of a machine: 2 nodes of 4 cores of 2 threads, where thread n + 8 shares the core of n."""
    for processor in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{processor % 8},{processor % 8 + 8}\n")
    for node, processors in enumerate(("0-3,8-11", "4-7,12-15")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{processors}\n")
    (tmp_path / "devices/system/node/has_cpu").write_text("0-1\n")
    (tmp_path / "fs/cgroup/cpu").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (range(16), (4, 4)),
        (range(8), (4, 4)),
        ([0, 8], (1,)),
        ([0, 1, 2, 8, 9, 12], (3, 1)),
        ([4, 5, 6, 3], (3, 1)),
    ],
)
def test_threads_of_one_core_count_once(system: Path, allowed: list[int], expected: tuple[int, ...]) -> None:
    assert read_cores(allowed, system) == Cores(expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "unreadable\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_counts(system: Path, files: dict[str, str], expected: float | None) -> None:
    for name, content in files.items():
        (system / "fs/cgroup" / name).write_text(content)

    assert read_cores(range(4), system).quota == expected


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(Cores((4, 4)), 8), (Cores((4, 4), 2.5), 2), (Cores((4, 4), 0.5), 1), (Cores((4, 4), 64.0), 8)],
)
def test_a_part_of_a_core_is_not_a_core(cores: Cores, expected: int) -> None:
    assert cores.num_usable == expected


def test_a_kernel_that_shows_nothing_has_a_core_for_each_processor(tmp_path: Path) -> None:
    assert read_cores([0, 1, 5], tmp_path) == Cores((3,))


def test_this_machine_has_cores() -> None:
    assert 1 <= sum(read_cores().per_node) <= len(os.sched_getaffinity(0))
