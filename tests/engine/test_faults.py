"""An error of a forward means too little memory, a lost card, or a fault of its batch alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from structlog.testing import capture_logs

from gateway.engine import faults
from gateway.engine.faults import (
    CardLost,
    find_lost_card,
    is_card_lost,
    is_out_of_memory,
    on_card,
    release_memory,
    still_computes,
)
from gateway.errors import LoadError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1154"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
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


FINAL = [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: misaligned address",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
]
UNCLEAR = [
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    torch.AcceleratorError("CUDA error: unknown error"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
HARMLESS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("CUDA error: an illegal memory access was encountered"),
    MemoryError(),
    IndexError("index out of range in self"),
]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices on which a test computation was tried; each fails."""
    asked: list[str] = []
    monkeypatch.setattr(faults, "still_computes", lambda device: bool(asked.append(device)))
    return asked


@pytest.mark.parametrize("message", FINAL)
@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_after_some_errors_a_card_is_lost(probes: list[str], kind: type[RuntimeError], message: str) -> None:
    assert is_card_lost(kind(message), "cuda:0")
    assert not is_card_lost(kind(message), "cpu")
    assert not probes


@pytest.mark.parametrize("error", UNCLEAR, ids=repr)
def test_where_the_message_does_not_tell_the_card_is_asked(
    monkeypatch: pytest.MonkeyPatch, probes: list[str], error: BaseException
) -> None:
    """A text that a kernel cannot take must not end the process."""
    assert is_card_lost(error, "cuda:1")
    assert probes == ["cuda:1"]

    monkeypatch.setattr(faults, "still_computes", lambda _device: True)
    assert not is_card_lost(error, "cuda:1")


@pytest.mark.parametrize("error", HARMLESS, ids=repr)
def test_other_errors_say_nothing_about_the_card(probes: list[str], error: BaseException) -> None:
    assert not is_card_lost(error, "cuda:0")
    assert not probes


def raised(error: BaseException, before: BaseException, *, is_cause: bool) -> BaseException:
    """Return an error after it has been raised from another one, or while that was handled."""
    try:
        try:
            raise before
        except BaseException:
            if is_cause:
                raise error from before
            raise error  # noqa: B904  the tested case
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("is_cause", [True, False])
def test_a_lost_card_may_be_behind_another_error(probes: list[str], is_cause: bool) -> None:
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")

    def full() -> BaseException:
        return torch.OutOfMemoryError("CUDA out of memory")

    assert is_card_lost(raised(LoadError("cannot be run"), lost, is_cause=is_cause), "cuda:0")
    assert is_card_lost(raised(full(), lost, is_cause=is_cause), "cuda:0")
    assert not is_card_lost(raised(ValueError("no such key"), full(), is_cause=is_cause), "cuda:0")
    assert not is_card_lost(raised(LoadError("cannot be run"), lost, is_cause=is_cause), "cpu")
    assert not probes
    chained = raised(ValueError("first"), KeyError("second"), is_cause=is_cause)
    chained.__cause__ = chained  # as faulty code can leave it
    assert not is_card_lost(chained, "cuda:0")


def test_of_several_cards_the_lost_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["cuda:0", "cuda:1", "cuda:2"]
    error = LoadError("the model cannot be run")
    error.__cause__ = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(faults, "still_computes", lambda device: device != "cuda:1")

    assert find_lost_card(error, devices) == "cuda:1"
    assert find_lost_card(LoadError("it is corrupt"), devices) is None
    monkeypatch.setattr(faults, "still_computes", lambda _device: True)
    assert find_lost_card(error, devices) == "cuda:0"  # no card may serve after such an error: any name will do
    end = threading.Event()
    with pytest.raises(CardLost) as caught:
        on_card("cuda:2", 0.01, lambda: end.wait(20))
    end.set()
    assert find_lost_card(caught.value, devices) == "cuda:2"


def test_a_card_that_does_not_answer_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(faults, "_ANSWER_S", 0.01)
    monkeypatch.setattr(torch, "ones", lambda *_size, device: end.wait(20))

    assert not still_computes("cuda:0")
    end.set()


def test_whether_a_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert still_computes("cpu")

    def fail(error: Exception) -> Callable[..., torch.Tensor]:
        def ones(*_size: int, device: str) -> torch.Tensor:
            raise error

        return ones

    monkeypatch.setattr(torch, "ones", fail(torch.AcceleratorError("CUDA error: unknown error")))
    assert not still_computes("cuda:0")
    monkeypatch.setattr(torch, "ones", fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert still_computes("cuda:0")


# --------------------------------------------------------------------------------------------------------------- loads


def test_the_work_of_a_load_on_a_card_has_a_time_limit() -> None:
    end = threading.Event()

    with pytest.raises(CardLost, match=r"^cuda:0 has not ended its work after 0 s$"):
        on_card("cuda:0", 0.01, lambda: end.wait(20))
    end.set()


def test_the_work_of_a_load_on_a_card_gives_its_result_or_its_error() -> None:
    def fail() -> None:
        raise KeyError("an error")

    assert on_card("cuda:0", 20, lambda: threading.current_thread().name) == "load-cuda:0"
    assert on_card("cuda:0", 20, lambda: None) is None
    assert on_card("cpu", 0, threading.current_thread) is threading.current_thread()
    for device in ("cuda:0", "cpu"):
        with pytest.raises(KeyError, match="an error"):
            on_card(device, 20, fail)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("is_initialized", [True, False])
def test_cached_memory_is_given_back_where_there_is_a_cache(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))

    release_memory()

    assert len(calls) == is_initialized


def test_a_lost_card_that_gives_no_memory_back_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)

    with capture_logs() as lines:
        release_memory()

    assert [(line["event"], line["reason"]) for line in lines] == [
        ("memory_not_released", "CUDA error: an illegal memory access was encountered")
    ]


def test_a_card_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeing memory waits for the kernels of its card."""
    end = threading.Event()
    monkeypatch.setattr(faults, "_RELEASE_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: end.wait(20))

    with capture_logs() as lines:
        release_memory()
    end.set()

    assert [line["event"] for line in lines] == ["memory_not_released"]
