"""Choose the device, the number format and the threads of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from gateway.engine.cards import PACKING_CAPABILITY, Machine, Reason, describe_others, find_obstacle, read_machine
from gateway.engine.checkpoint.classes import OVERFLOWING
from gateway.engine.cores import Cores, read_cores
from gateway.engine.memory import available_host_bytes, format_bytes
from gateway.engine.nvml import Card
from gateway.errors import LoadError

# Other processes on a card are reported if they hold at least this much memory; a desktop takes less.
_NOTED_BYTES = 2**30
_MIN_STREAMS = 2
_MAX_THREADS_A_STREAM = 4


def choose_devices(setting: str) -> tuple[str, ...]:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to devices; each gets a replica of the model.

    ``auto`` uses every card that can pack texts, or the CPU if this machine has no such card. ``cuda`` uses the same cards,
    or older cards if it finds no others, but never the CPU.

    Raises:
        LoadError: the device is not present, or cannot be used; the message says what to do.
    """
    if setting == "cpu":
        return ("cpu",)
    machine = see_cards()
    obstacle = machine.obstacle_to(setting)
    if obstacle is None and setting in ("auto", "cuda"):
        every = range(len(machine.visible))
        best = [index for index in every if machine.left_out(index) is None]
        usable = [index for index in every if find_obstacle(machine.visible[index], machine.torch) is None]
        return tuple(f"cuda:{index}" for index in best or usable)
    if obstacle is None:
        return (setting,)
    if setting != "auto":
        raise LoadError(f"device {setting} cannot be used: {obstacle}")
    if obstacle.reason is Reason.CUDA_FAILED:  # otherwise a good card would silently stay idle
        raise LoadError(f"{obstacle}; `device: cpu` in models.yaml runs it on the CPU")
    return ("cpu",)


def leave_out_full(setting: str, devices: Sequence[str], needed_bytes: int) -> tuple[str, ...]:
    """Leave out the cards with too little free memory for a model, if ``device: auto`` has others with enough.

    If no card has enough, all stay: the model may be refused, or wait until another model frees memory.
    """
    if setting != "auto" or len(devices) < 2:
        return tuple(devices)
    cards = see_cards().visible
    fitting = [
        device
        for device in devices
        if not (card := _card_of(device, cards)).total_bytes or card.free_bytes >= needed_bytes
    ]
    return tuple(fitting or devices)


def _card_of(device: str, cards: Sequence[Card]) -> Card:
    """Return the card of a CUDA device; an unknown card if the device is not among the cards."""
    index = int(device.partition(":")[2])
    return cards[index] if index < len(cards) else Card(index)


def device_notes(setting: str, devices: Sequence[str]) -> tuple[str, ...]:
    """Return remarks for an operator about the choice of a model's devices: cards that are not used, or shared.

    Args:
        setting: the setting that led to the devices.
    """
    if setting == "cpu":
        return ()
    machine = see_cards()
    if "cpu" in devices:
        obstacle = machine.obstacle_to(setting)
        is_usual = obstacle is None or obstacle.reason in (Reason.NO_CARD, Reason.NOT_NVIDIA)
        return () if is_usual else (f"on the CPU, because {obstacle}",)
    notes = []
    for index, card in enumerate(machine.visible):
        device = f"cuda:{index}"
        if device in devices:
            held = sum(process.memory_bytes or 0 for process in card.others)
            if held >= _NOTED_BYTES:
                notes.append(f"other processes hold {format_bytes(held)} of {device}: {describe_others(card)}")
        elif setting in ("auto", "cuda"):
            too_full = f"of its {format_bytes(card.total_bytes)} only {format_bytes(card.free_bytes)} are free"
            notes.append(f"{device} ({card.name or 'unknown'}) is left out: {machine.left_out(index) or too_full}")
    return tuple(notes)


def others_on(device: str) -> str:
    """Describe the other processes on a device; empty without other processes, and for the CPU."""
    return "" if device == "cpu" else describe_others(_card_of(device, see_cards().visible))


def see_cards() -> Machine:
    """Return the machine with the cards as CUDA itself shows them. Takes as long as starting CUDA.

    If the driver's library does not answer, or does not know a card, CUDA's own description of the card counts.
    """
    machine = read_machine()
    if machine.torch is None or machine.torch.cuda is None:  # without CUDA, or with ROCm, which also calls itself CUDA
        return machine
    if not torch.cuda.is_available():
        return replace(machine, cuda_error=_why_cuda_fails())
    known = {card.uuid: card for card in machine.cards}
    shown = []
    for index in range(torch.cuda.device_count()):
        name = card_uuid(index)
        shown.append(known.get(name) or known.get(slice_uuid(name)) or _describe(index))
    return replace(machine, visible=tuple(shown), cuda_error="")


def _why_cuda_fails() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises errors of several classes
        return str(error).splitlines()[0]
    return "torch.cuda.is_available() is false"


def _describe(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        index,
        card_uuid(index),
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory,
        properties.total_memory,
    )


def card_uuid(index: int) -> str:
    """Return the name by which the driver knows a CUDA device."""
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def slice_uuid(name: str) -> str:
    """Return the name by which the driver knows a CUDA device that is a slice of a card: torch omits the prefix."""
    return f"MIG-{name.removeprefix('GPU-')}"


def choose_dtype(setting: str, device: str, model_type: str = "") -> str:
    """Resolve ``auto`` to the fastest number format that keeps vectors within tolerance on the device.

    Args:
        model_type: the architecture; empty if it is not known yet.

    Raises:
        LoadError: float16 on a CPU, where it is many times slower than float32, or bfloat16 on a card without it.
    """
    if setting == "auto" and device == "cpu":
        return "bfloat16" if _cpu_has_bfloat16() else "float32"
    if setting == "auto" and model_type not in OVERFLOWING:
        return "float16"
    if setting in ("auto", "bfloat16") and device != "cpu":
        capability = _card_of(device, see_cards().visible).capability
        if not (0, 0) < capability < PACKING_CAPABILITY:
            return "bfloat16"
        if setting == "auto":
            return "float32"
        raise LoadError(
            f"dtype bfloat16 needs compute capability 8.0, and that of {device} is {capability[0]}.{capability[1]}; use "
            "float16, float32 or auto"
        )
    if setting == "float16" and device == "cpu":
        raise LoadError(
            "dtype float16 is about eight times slower than float32 on a CPU; use bfloat16, float32 or auto"
        )
    return setting


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 is emulated, and slower than float32. On Arm, torch does not say.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def available_bytes(device: str) -> int:
    """Return the free memory of a device, in bytes."""
    if device == "cpu":
        return available_host_bytes()
    free, _total = torch.cuda.mem_get_info(device)
    return int(free)


@dataclass(frozen=True, slots=True)
class CpuThreads:
    """The cores of a model: the number of parallel forwards, and the threads of each.

    Attributes:
        are_bound: whether each stream stays on the cores of one NUMA node, near its memory.
    """

    num_streams: int
    per_stream: int
    are_bound: bool = False


def choose_cpu_threads(setting: int, runtime: str) -> CpuThreads:
    """Distribute the cores that this process may use; see :func:`share_cores`."""
    return share_cores(read_cores(), setting, runtime)


def share_cores(cores: Cores, setting: int, runtime: str) -> CpuThreads:
    """Distribute cores among the forwards of a model; ``setting`` is the number of threads, and 0 lets the gateway choose.

    The threads of one forward wait for each other after every operation: if one of them shares its core with the event
    loop, all are late. Parallel forwards do not wait for each other, so OpenVINO runs several streams with few threads
    each, and no stream has threads on two NUMA nodes. torch has one pool of threads, which spin while they wait, so one
    core is left to the event loop. docs/performance.md has measurements.
    """
    num_threads = setting or cores.num_usable
    if runtime != "openvino":
        return CpuThreads(1, setting or max(1, num_threads - 1))
    if num_threads <= cores.per_node[0]:  # one node has room for all
        num_streams = min(num_threads, max(_MIN_STREAMS, num_threads // _MAX_THREADS_A_STREAM))
        return CpuThreads(num_streams, num_threads // num_streams)
    if num_threads > sum(cores.per_node) or len(cores.per_node) == 1:  # the setting asks for more than there are
        return share_cores(Cores((num_threads,)), setting, runtime)
    used = _first(cores.per_node, num_threads)
    per_stream = used[0] // max(1, used[0] // _MAX_THREADS_A_STREAM)
    # A container with a quota shares its cores with others, which would bind their threads to the same cores.
    return CpuThreads(sum(node // per_stream for node in used), per_stream, are_bound=cores.quota is None)


def _first(per_node: Sequence[int], num_cores: int) -> list[int]:
    """Return the number of cores used on each node if ``num_cores`` are taken node by node."""
    used: list[int] = []
    for node in per_node:
        used.append(min(node, num_cores - sum(used)))
    return used


def trim_host_memory() -> None:
    """Return freed host memory to the system, if the C library can: glibc keeps free memory between live blocks."""
    with suppress(AttributeError):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)
