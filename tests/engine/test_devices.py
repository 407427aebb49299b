"""Device, number format and threads are chosen by the machine, and memory errors are distinguished from others."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine import devices
from gateway.engine.cores import Cores
from gateway.engine.devices import (
    CpuThreads,
    available_bytes,
    choose_cpu_threads,
    choose_devices,
    choose_dtype,
    has_accelerator,
    is_out_of_memory,
    release_memory,
    share_cores,
)
from gateway.engine.memory import available_host_bytes
from gateway.errors import LoadError


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """The number of CUDA devices that torch sees."""
    number: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    return number


@pytest.mark.parametrize(
    ("cards", "setting", "expected"),
    [
        (0, "auto", ("cpu",)),
        (0, "cpu", ("cpu",)),
        (1, "auto", ("cuda:0",)),
        (1, "cuda", ("cuda:0",)),
        (1, "cpu", ("cpu",)),
        (3, "auto", ("cuda:0", "cuda:1", "cuda:2")),
        (3, "cuda", ("cuda:0", "cuda:1", "cuda:2")),
        (3, "cuda:0", ("cuda:0",)),
        (3, "cuda:2", ("cuda:2",)),
        (3, "cpu", ("cpu",)),
    ],
    indirect=["cards"],
)
def test_a_replica_runs_on_each_device_that_is_asked_for(cards: int, setting: str, expected: tuple[str, ...]) -> None:
    assert has_accelerator() == (cards > 0)
    assert choose_devices(setting) == expected


@pytest.mark.parametrize(
    ("cards", "setting"),
    [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (3, "cuda:3"), (3, "cuda:10")],
    indirect=["cards"],
)
def test_a_device_that_is_not_there_is_refused(cards: int, setting: str) -> None:
    message = f"device {setting} is not present; this machine has {cards} CUDA devices"
    with pytest.raises(LoadError, match=f"^{re.escape(message)}$"):
        choose_devices(setting)


@pytest.mark.parametrize(
    ("setting", "device", "has_bfloat16", "expected"),
    [
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda:1", False, "float16"),
        ("float32", "cpu", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float16", "cuda:0", True, "float16"),
        ("bfloat16", "cuda:0", False, "bfloat16"),
        ("float32", "cuda:0", True, "float32"),
    ],
)
def test_the_number_format(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: str, has_bfloat16: bool, expected: str
) -> None:
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: has_bfloat16)

    assert choose_dtype(setting, device) == expected


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(LoadError, match="dtype float16 is about eight times slower"):
        choose_dtype("float16", "cpu")


@pytest.mark.parametrize(
    ("setting", "runtime", "cores", "expected"),
    [
        (0, "torch", Cores((1,)), CpuThreads(1, 1)),
        (0, "torch", Cores((2,)), CpuThreads(1, 1)),
        (0, "torch", Cores((16,)), CpuThreads(1, 15)),
        (0, "torch", Cores((32, 32)), CpuThreads(1, 63)),
        (0, "torch", Cores((32, 32), quota=4.0), CpuThreads(1, 3)),
        (6, "torch", Cores((2,)), CpuThreads(1, 6)),
        (0, "openvino", Cores((1,)), CpuThreads(1, 1)),
        (0, "openvino", Cores((2,)), CpuThreads(2, 1)),
        (0, "openvino", Cores((4,)), CpuThreads(2, 2)),
        (0, "openvino", Cores((8,)), CpuThreads(2, 4)),
        (0, "openvino", Cores((16,)), CpuThreads(4, 4)),
        (0, "openvino", Cores((64,)), CpuThreads(16, 4)),
        (0, "openvino", Cores((64,), quota=2.5), CpuThreads(2, 1)),
        (0, "openvino", Cores((64,), quota=0.5), CpuThreads(1, 1)),
        (0, "openvino", Cores((2,), quota=8.0), CpuThreads(2, 1)),
        (1, "openvino", Cores((16,)), CpuThreads(1, 1)),
        (4, "openvino", Cores((16,)), CpuThreads(2, 2)),
        (4, "openvino", Cores((2,)), CpuThreads(2, 2)),
        (0, "openvino", Cores((32, 32)), CpuThreads(16, 4, are_bound=True)),
        (0, "openvino", Cores((6, 6)), CpuThreads(2, 6, are_bound=True)),
        (0, "openvino", Cores((1, 1)), CpuThreads(2, 1, are_bound=True)),
        (0, "openvino", Cores((16, 4)), CpuThreads(5, 4, are_bound=True)),
        (0, "openvino", Cores((32, 32), quota=48.0), CpuThreads(12, 4)),
        (0, "openvino", Cores((32, 32), quota=8.0), CpuThreads(2, 4)),
        (40, "openvino", Cores((32, 32)), CpuThreads(10, 4, are_bound=True)),
        (8, "openvino", Cores((32, 32)), CpuThreads(2, 4)),
        (80, "openvino", Cores((32, 32)), CpuThreads(20, 4)),
    ],
)
def test_the_cores_are_shared_out(setting: int, runtime: str, cores: Cores, expected: CpuThreads) -> None:
    assert share_cores(cores, setting, runtime) == expected


@pytest.mark.parametrize("num_cores", range(1, 130))
def test_no_more_threads_than_cores(num_cores: int) -> None:
    for setting in range(num_cores + 1):
        threads = share_cores(Cores((num_cores,)), setting, "openvino")
        total = threads.num_streams * threads.per_stream
        assert min(threads.num_streams, threads.per_stream) >= 1
        assert total <= (setting or num_cores) < total + threads.num_streams


@given(st.lists(st.integers(1, 64), min_size=2, max_size=4), st.integers(0, 300), st.none() | st.floats(0.1, 300))
def test_no_stream_has_threads_on_two_nodes(nodes: list[int], setting: int, quota: float | None) -> None:
    cores = Cores(tuple(sorted(nodes, reverse=True)), quota)

    threads = share_cores(cores, setting, "openvino")

    total = threads.num_streams * threads.per_stream
    assert 1 <= total <= (setting or cores.num_usable)
    if threads.are_bound:
        assert threads.num_streams <= sum(node // threads.per_stream for node in cores.per_node)


def test_the_cores_are_those_of_this_process() -> None:
    threads = choose_cpu_threads(0, "openvino")

    assert 1 <= threads.num_streams * threads.per_stream <= len(os.sched_getaffinity(0))


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (5, 10)}[device])
    monkeypatch.setattr(devices, "available_host_bytes", lambda: 7)

    assert (available_bytes("cuda:1"), available_bytes("cpu")) == (5, 7)
    assert available_host_bytes() > 7


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("the device has fallen off the bus"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
    ids=repr,
)
def test_out_of_memory_is_distinguished_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="has memory that is really too large to ask for")
def test_torch_says_so_when_there_is_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.float32)

    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("cards", [0, 1], indirect=True)
def test_cached_memory_is_given_back_where_there_is_a_cache(monkeypatch: pytest.MonkeyPatch, cards: int) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))

    release_memory()

    assert len(calls) == cards
