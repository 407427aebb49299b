"""The state of the cards for a scrape: the driver's values, and a scrape that no card can fail."""

from __future__ import annotations

import pynvml
import pytest
import torch

from gateway.engine import card_metrics, nvml
from gateway.engine.card_metrics import read_cards
from gateway.telemetry import metrics
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_cuda


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    card_metrics._handle.cache_clear()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _index: GIB)


def test_a_scrape_reads_cards_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice's utilization is not known; CUDA does not say that it is a slice."""
    part = FakeCard("NVIDIA H100 MIG 1g.10gb", (0, 0), 10 * GIB, 3 * GIB, "MIG-1")
    part.slices = [part]  # its utilization is not supported
    card = FakeCard(free=20 * GIB)
    install(monkeypatch, FakeDriver([card, part]))
    install_cuda(monkeypatch, [card, FakeCard(uuid="GPU-1")])

    read_cards()

    memory = metrics.values(metrics.GPU_MEMORY)
    assert {key: value / GIB for key, value in memory.items() if key[0] in ("cuda:0", "cuda:1")} == {
        ("cuda:0", "allocated"): 1,
        ("cuda:0", "total"): 24,
        ("cuda:0", "used"): 4,
        ("cuda:1", "allocated"): 1,
        ("cuda:1", "total"): 10,
        ("cuda:1", "used"): 7,
    }
    assert metrics.values(metrics.GPU_UTILIZATION)["cuda:0",] == 0.42
    metrics.GPU_MEMORY.clear()
    metrics.GPU_UTILIZATION.clear()


def test_a_card_that_cuda_cannot_describe_leaves_the_others_in_the_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [FakeCard(uuid="GPU-a"), FakeCard(uuid="GPU-b")]
    install(monkeypatch, FakeDriver(cards))
    install_cuda(monkeypatch, cards)
    describe = torch.cuda.get_device_properties

    def fail(index: int) -> object:
        if index == 0:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return describe(index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)

    read_cards()

    assert ("cuda:0", "total") not in metrics.values(metrics.GPU_MEMORY)
    assert metrics.values(metrics.GPU_MEMORY)["cuda:1", "total"] == 24 * GIB
    metrics.GPU_MEMORY.clear()
    metrics.GPU_UTILIZATION.clear()


def test_a_test_of_cards_leaves_no_driver_behind() -> None:
    """NVML is initialized once a process; the tests after this one have no card, whatever order they run in."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, FakeDriver([FakeCard()]))
        install_cuda(patch, [FakeCard()])
        read_cards()

    driver = nvml.read_driver()
    assert isinstance(driver, nvml.Failure)
    assert driver.code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
