"""Read the state of the graphics cards, for the metrics."""

from __future__ import annotations

from functools import cache
from typing import Any

import structlog
import torch

from gateway.engine import nvml
from gateway.engine.devices import card_uuid, slice_uuid
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)


def show_cards() -> None:
    """Show the state of the cards among the metrics from now on."""
    metrics.at_scrape(read_cards)


def read_cards() -> None:
    """Set the metrics of all cards that this process may use.

    The values come from the driver's own library (NVML), which answers even when a card hangs. A call to CUDA would then
    block the whole gateway.
    """
    import pynvml

    try:
        driver = nvml.load()
    except pynvml.NVMLError as error:
        log.debug("cards_not_read", error=str(error))
        return
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        metrics.GPU_MEMORY.labels(device, "allocated").set(torch.cuda.memory_allocated(index))
        try:
            handle = _handle(driver, index)
            memory = driver.nvmlDeviceGetMemoryInfo(handle)
            metrics.GPU_MEMORY.labels(device, "total").set(memory.total)
            metrics.GPU_MEMORY.labels(device, "used").set(memory.used)
            metrics.GPU_UTILIZATION.labels(device).set(driver.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        # A slice of a card (MIG) reports no utilization; CUDA may fail.
        except (pynvml.NVMLError, RuntimeError) as error:
            log.debug("card_not_read", device=device, error=str(error))


@cache
def _handle(driver: Any, index: int) -> Any:
    """Return NVML's handle of a card; NVML counts all cards of the machine, and CUDA those that this process may use."""
    name = card_uuid(index)
    try:
        return driver.nvmlDeviceGetHandleByUUID(name)
    except driver.NVMLError_NotFound:
        return driver.nvmlDeviceGetHandleByUUID(slice_uuid(name))
