"""Device, number format and threads are chosen by the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pynvml
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
    device_notes,
    leave_out_full,
    others_on,
    see_cards,
    share_cores,
)
from gateway.engine.memory import available_host_bytes
from gateway.errors import LoadError
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_cuda, install_surroundings, install_torch

GT_1030 = FakeCard("NVIDIA GeForce GT 1030", (6, 1), 2 * GIB, 2 * GIB, "GPU-1030")
RTX_2080 = FakeCard("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11 * GIB, 11 * GIB, "GPU-2080")
RTX_3090, RTX_3090_TOO = FakeCard(), FakeCard(uuid="GPU-second")

See = Callable[..., None]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> See:
    """Return a function that puts cards into this machine, with a driver and a torch that fit."""

    def see(*cards: FakeCard, cuda_error: str = "", **driver: int) -> None:
        install(monkeypatch, FakeDriver(list(cards), **driver))
        install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
        install_surroundings(monkeypatch, tmp_path, vendors=("0x10de",) if cards else ())
        install_cuda(monkeypatch, list(cards), cuda_error)

    return see


@pytest.mark.parametrize(
    ("cards", "setting", "expected"),
    [
        ([], "auto", ("cpu",)),
        ([], "cpu", ("cpu",)),
        ([RTX_3090], "auto", ("cuda:0",)),
        ([RTX_3090], "cuda", ("cuda:0",)),
        ([RTX_3090], "cpu", ("cpu",)),
        ([RTX_3090, RTX_3090_TOO], "auto", ("cuda:0", "cuda:1")),
        ([RTX_3090, RTX_3090_TOO], "cuda", ("cuda:0", "cuda:1")),
        ([RTX_3090, RTX_3090_TOO], "cuda:1", ("cuda:1",)),
        ([GT_1030, RTX_3090], "auto", ("cuda:1",)),
        ([RTX_3090, RTX_2080], "auto", ("cuda:0",)),
        ([RTX_3090, RTX_2080], "cuda", ("cuda:0",)),
        ([RTX_3090, RTX_2080], "cuda:1", ("cuda:1",)),
        ([GT_1030, RTX_2080], "auto", ("cpu",)),
        ([GT_1030, RTX_2080], "cuda", ("cuda:1",)),
        ([GT_1030], "auto", ("cpu",)),
    ],
)
def test_a_replica_runs_on_each_device_that_is_asked_for(
    see: See, cards: list[FakeCard], setting: str, expected: tuple[str, ...]
) -> None:
    see(*cards)

    assert choose_devices(setting) == expected


@pytest.mark.parametrize(
    ("cards", "setting", "message"),
    [
        ([], "cuda", "device cuda cannot be used: no accelerator is present"),
        ([], "cuda:0", "device cuda:0 cannot be used: no accelerator is present"),
        (
            [RTX_3090],
            "cuda:1",
            "device cuda:1 cannot be used: there is no cuda:1 here, only cuda:0 NVIDIA GeForce RTX 3090",
        ),
        (
            [GT_1030],
            "cuda:0",
            "device cuda:0 cannot be used: torch for CUDA 13.0 has no kernels for an NVIDIA GeForce GT 1030",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(see: See, cards: list[FakeCard], setting: str, message: str) -> None:
    see(*cards)

    with pytest.raises(LoadError, match=f"^{re.escape(message)}"):
        choose_devices(setting)


@pytest.mark.parametrize("setting", ["auto", "cuda", "cuda:0"])
def test_a_card_that_cuda_cannot_start_is_never_replaced_by_the_cpu(see: See, setting: str) -> None:
    """The driver reports it as healthy, so its owner would not notice for days."""
    see(RTX_3090, cuda_error="CUDA unknown error - this may be due to a suspended machine\nand more")

    with pytest.raises(LoadError) as caught:
        choose_devices(setting)

    assert (
        "an NVIDIA GeForce RTX 3090 is here, but CUDA does not start (CUDA unknown error - this may be due to a suspended "
        "machine): restart the machine, or after it was suspended `sudo modprobe" in str(caught.value)
    )
    assert "and more" not in str(caught.value)
    assert ("; `device: cpu` in models.yaml runs it on the CPU" in str(caught.value)) == (setting == "auto")


def test_cuda_numbers_the_cards(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator may have set CUDA_DEVICE_ORDER to another order."""
    see(GT_1030, RTX_3090)
    install_cuda(monkeypatch, [RTX_3090, GT_1030])

    assert [card.uuid for card in see_cards().visible] == ["GPU-3090", "GPU-1030"]
    assert choose_devices("auto") == ("cuda:0",)


def test_cuda_names_a_slice_as_it_names_a_card(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's description has the free memory, and the other processes."""
    part = FakeCard("NVIDIA H100 MIG 1g.10gb", (0, 0), 10 * GIB, 3 * GIB, "MIG-1")
    see(FakeCard("NVIDIA H100", (9, 0), slices=[part]))
    install_cuda(monkeypatch, [FakeCard(part.name, (9, 0), 10 * GIB, uuid="GPU-1")])

    assert [(card.uuid, card.free_bytes) for card in see_cards().visible] == [("MIG-1", 3 * GIB)]


def test_a_card_that_only_cuda_knows_is_used(see: See) -> None:
    """Some small boards have CUDA without NVML."""
    see(RTX_3090, error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    [card] = see_cards().visible

    assert (card.name, card.uuid, card.capability, card.total_bytes) == (
        RTX_3090.name,
        RTX_3090.uuid,
        (8, 6),
        24 * GIB,
    )
    assert choose_devices("auto") == choose_devices("cuda:0") == ("cuda:0",)


NEAR_FULL = FakeCard(free=3 * GIB, uuid="GPU-full", processes=((7, "/usr/bin/ollama", 20 * GIB, True),))


@pytest.mark.parametrize(
    ("cards", "setting", "needed", "expected"),
    [
        ([RTX_3090, NEAR_FULL], "auto", 4 * GIB, ("cuda:0",)),
        ([RTX_3090, NEAR_FULL], "auto", 2 * GIB, ("cuda:0", "cuda:1")),
        ([RTX_3090, NEAR_FULL], "cuda", 4 * GIB, ("cuda:0", "cuda:1")),
        ([NEAR_FULL], "auto", 4 * GIB, ("cuda:0",)),
        ([NEAR_FULL, NEAR_FULL], "auto", 4 * GIB, ("cuda:0", "cuda:1")),
        (
            [NEAR_FULL, FakeCard("NVIDIA GB10", (12, 1), uuid="GPU-gb10", has_memory=False)],
            "auto",
            4 * GIB,
            ("cuda:1",),
        ),
        ([], "auto", 4 * GIB, ("cpu",)),
    ],
)
def test_a_card_that_is_full_is_left_out_where_another_has_room(
    see: See, cards: list[FakeCard], setting: str, needed: int, expected: tuple[str, ...]
) -> None:
    see(*cards)

    assert leave_out_full(setting, choose_devices(setting), needed) == expected


def test_notes_about_the_devices_for_the_operator(see: See) -> None:
    see(GT_1030, RTX_3090, NEAR_FULL)

    assert device_notes("auto", ("cuda:1",)) == (
        "cuda:0 (NVIDIA GeForce GT 1030) is left out: torch for CUDA 13.0 has no kernels for an NVIDIA GeForce GT 1030 "
        "(compute capability 6.1): install the build for CUDA 12.6, `make clean run "
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126`",
        "cuda:2 (NVIDIA GeForce RTX 3090) is left out: of its 24.0 GiB only 3.0 GiB are free",
    )
    assert device_notes("cuda:2", ("cuda:2",)) == (
        "other processes hold 20.0 GiB of cuda:2: ollama (pid 7) 20,480 MiB",
    )
    assert device_notes("cuda:1", ("cuda:1",)) == ()
    assert device_notes("cpu", ("cpu",)) == ()
    assert others_on("cuda:2") == "ollama (pid 7) 20,480 MiB"
    assert others_on("cpu") == others_on("cuda:1") == ""


def test_a_model_on_the_cpu_says_which_card_it_does_not_use(see: See) -> None:
    see(RTX_2080)
    assert device_notes("auto", choose_devices("auto")) == (
        "on the CPU, because an NVIDIA GeForce RTX 2080 Ti has compute capability 7.5, and packing texts needs 8.0: "
        "`device: cuda:0` in models.yaml uses it anyway, with padding",
    )
    see()
    assert device_notes("auto", choose_devices("auto")) == ()


def test_bfloat16_on_a_card_without_it_is_refused(see: See) -> None:
    see(RTX_2080, RTX_3090)

    assert choose_dtype("bfloat16", "cuda:1") == "bfloat16"
    with pytest.raises(
        LoadError, match=r"dtype bfloat16 needs compute capability 8.0, and that of cuda:0 is 7.5; use flo"
    ):
        choose_dtype("bfloat16", "cuda:0")


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "gte", "eurobert", "t5"])
def test_a_model_that_overflows_float16_is_not_in_float16_on_a_card(see: See, model_type: str) -> None:
    see(RTX_2080, RTX_3090)

    assert choose_dtype("auto", "cuda:1", model_type) == "bfloat16"
    assert choose_dtype("auto", "cuda:0", model_type) == "float32"
    assert choose_dtype("float16", "cuda:1", model_type) == "float16"
    assert choose_dtype("auto", "cuda:1", "xlm-roberta") == "float16"


def test_the_cards_have_the_numbers_that_the_driver_shows() -> None:
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


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
