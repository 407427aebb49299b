"""Describe a card and its state, from the driver's own library (NVML), to print with every measurement."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from gateway.engine.devices import card_uuid, slice_uuid

# Why a card runs below its highest clock, by NVML's bits; being idle is not of interest.
_REASONS = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat (driver)",
    "HwThermalSlowdown": "heat (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
    "ApplicationsClocksSetting": "locked clocks",
}


def describe_card(device: torch.device) -> str:
    """Return a card's name, memory, driver, power limit and highest clock; or the device's name."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    accumulation = "fp16" if torch.backends.cuda.matmul.allow_fp16_accumulation else "fp32"
    parts = [
        properties.name,
        f"{properties.total_memory / 2**30:.0f} GiB",
        f"capability {properties.major}.{properties.minor}",
        f"CUDA {torch.version.cuda}",
        f"{accumulation} accumulation",
    ]
    nvml, handle = _open(device)
    if nvml is not None:
        parts.append(f"driver {nvml.nvmlSystemGetDriverVersion()}")
        with suppress(nvml.NVMLError):  # a slice of a card (MIG) and some boards have neither
            parts.append(f"{nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000:.0f} W limit")
            parts.append(f"up to {nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)} MHz")
    return ", ".join(parts)


def describe_state(device: torch.device) -> str:
    """Return a card's current clock, temperature and power, and the reason for a low clock."""
    nvml, handle = _open(device)
    if nvml is None:
        return "n/a"
    try:
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        degrees = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError as error:  # a slice of a card (MIG) reports none of it
        return f"n/a ({error})"
    reasons = [name for key, name in _REASONS.items() if bits & getattr(nvml, f"nvmlClocksEventReason{key}")]
    return f"{clock} MHz, {degrees} °C, {watts:.0f} W, held down by: {', '.join(reasons) or 'nothing'}"


def _open(device: torch.device) -> tuple[Any, Any]:
    """Return the library and its handle of a card; NVML counts all cards, CUDA those that this process may use."""
    if device.type != "cuda":
        return None, None
    import pynvml

    name = card_uuid(torch.device(device).index or 0)
    for one in (name, slice_uuid(name)):
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(one)
    return None, None
