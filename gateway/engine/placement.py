"""Choose a model's devices, dtype and runtime, and estimate the memory that it needs on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.devices import (
    available_bytes,
    choose_devices,
    choose_dtype,
    device_notes,
    leave_out_full,
    others_on,
)
from gateway.engine.faults import release_memory
from gateway.engine.memory import MemoryPlan, format_bytes, plan_memory, require_memory
from gateway.engine.model.choose import choose_runtime_of
from gateway.engine.model.static import place_table
from gateway.errors import TooLittleMemory

# On a CPU, a batch of more than some thousand tokens is not faster, only later; a GPU needs more tokens to be busy.
MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model runs.

    Attributes:
        devices: the devices, all of one kind; each gets a replica.
        memory: the memory that the model needs on each device.
        notes: remarks for an operator about the choice of the devices.
    """

    devices: tuple[str, ...]
    dtype: str
    runtime: str
    max_batch_tokens: int
    memory: MemoryPlan
    notes: tuple[str, ...] = ()


def place(entry: ModelEntry, checkpoint: Checkpoint, max_tokens: int) -> Placement:
    """Place a model on the devices of this machine.

    Raises:
        LoadError: the device in the model's entry is missing, or cannot run the model.
    """
    if checkpoint.static is not None:  # a table of vectors is always on the CPU
        devices, dtype, runtime, max_batch_tokens = place_table(entry)
        memory = plan_memory(checkpoint, dtype, runtime, max_tokens, max_batch_tokens)
        return Placement(devices, dtype, runtime, max_batch_tokens, memory)
    devices = choose_devices(entry.device)
    dtype = choose_dtype(entry.dtype, devices[0], checkpoint.model_type)
    runtime = choose_runtime_of(checkpoint, entry.runtime, devices[0], dtype)
    max_batch_tokens = entry.max_batch_tokens or MAX_BATCH_TOKENS[devices[0].partition(":")[0]]
    memory = plan_memory(checkpoint, dtype, runtime, max_tokens, max_batch_tokens, devices[0])
    devices = leave_out_full(entry.device, devices, memory.total_bytes)
    return Placement(devices, dtype, runtime, max_batch_tokens, memory, device_notes(entry.device, devices))


def place_reference(checkpoint: Checkpoint, device: str, max_tokens: int) -> str:
    """Return the device for a copy of a model in float32, next to the model that serves: its own, or else the CPU.

    Raises:
        TooLittleMemory: neither has enough free memory.
    """
    release_memory()
    shortages = []
    for candidate in dict.fromkeys((device, "cpu")):
        memory = plan_memory(checkpoint, "float32", "torch", max_tokens, max_tokens, candidate)
        free = available_bytes(candidate)
        if memory.total_bytes <= free:
            return candidate
        shortages.append(f"{format_bytes(memory.total_bytes)} on {candidate}, where {format_bytes(free)} are free")
    raise TooLittleMemory(
        f"too little memory to compare the model with a copy in float32, which needs {', or '.join(shortages)}. Stop other "
        "programs, or use a machine with more memory",
        device,
    )


def require_room_on(devices: Sequence[str], memory: MemoryPlan) -> None:
    """Refuse a model that does not fit into the memory that is free now.

    Raises:
        TooLittleMemory: one of the devices has too little memory.
    """
    for device in devices:
        free = available_bytes(device)
        require_memory(memory, free, device, others_on(device) if memory.total_bytes > free else "")


def has_room(devices: Sequence[str], memory: MemoryPlan) -> bool:
    """Return whether a model fits into the memory that is free now on one of its devices."""
    return any(available_bytes(device) >= memory.total_bytes for device in devices)
