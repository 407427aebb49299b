"""Estimate the memory of a model before it is loaded, and compare it with the device's free memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from gateway.engine.checkpoint.headers import read_shapes
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import Attention
from gateway.errors import LoadError, TooLittleMemory

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of a model on its device, in bytes: its weights, and the activations of its largest batch.

    Attributes:
        card_bytes: fixed memory of any model on a graphics card: CUDA's context, its libraries' workspaces, rounding.
    """

    weights_bytes: int
    batch_bytes: int
    card_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.batch_bytes + self.card_bytes


# CUDA's context takes 300 to 400 MiB once in a process, cuBLAS 8 to 32 MiB in each thread, and the allocator rounds up.
_CARD_BYTES = 512 * 2**20


# Measured with torch 2.13 and transformers 5.23; `tests/engine/test_memory_of_texts.py` measures them again.
# Bytes for each head and pair of tokens, in models whose attention is not computed in one kernel: scores, their copies in
# float32, and the terms that are added to them.
_SCORE_BYTES = {"mpnet": 13, "t5": 13, "gemma2": 12, "deberta-v2": 28}
# The same in OpenVINO 2026.4.
_COMPILED_SCORE_BYTES = {"mpnet": 16, "t5": 13, "gemma2": 4, "deberta-v2": 52}
# Bytes for each pair of tokens of a text: window masks, and the numbers from which they are made.
_WINDOW_BYTES = 22
# A mask of 0 and 1 for each pair of tokens, which the kernel converts to numbers.
_MASK_BYTES = 1
_COMPILED_MASK_BYTES = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that determine a model's memory.

    Attributes:
        num_weights: count of the numbers in its weights.
        hidden_width: width of a layer's input.
        intermediate_width: width inside a layer's feed-forward.
    """

    num_weights: int
    hidden_width: int
    intermediate_width: int
    attention: Attention
    model_type: str = ""


def plan_memory(
    checkpoint: Checkpoint, dtype: str, runtime: str, max_tokens: int, max_batch_tokens: int, device: str = "cpu"
) -> MemoryPlan:
    """Estimate the memory for serving a checkpoint in ``dtype`` with batches of up to ``max_batch_tokens``."""
    num_weights = sum(_num_weights(path) for path in checkpoint.all_weights)
    if checkpoint.splade is not None:  # its head holds a copy of the table of words
        num_weights += checkpoint.vocab_size * checkpoint.hidden_width
    shape = Shape(
        num_weights,
        checkpoint.hidden_width,
        checkpoint.intermediate_width,
        checkpoint.attention,
        checkpoint.model_type,
    )
    return estimate_memory(shape, dtype, runtime, max_tokens, max_batch_tokens, device)


def estimate_memory(
    shape: Shape, dtype: str, runtime: str, max_tokens: int, max_batch_tokens: int, device: str = "cpu"
) -> MemoryPlan:
    """Estimate the memory of a model of the given shape.

    At its peak, a forward of T tokens holds about the layer's input and residual, the query, key, value and context, and
    the feed-forward's input before and after its activation: T * (2 * width + 4 * attention + 2 * intermediate) numbers.
    It also holds three times the width in float32, in which norms are computed. :func:`_bytes_per_pair` has
    the part that grows with the square of a text's length. A document whose chunks are embedded together is one text.
    """
    size = DTYPE_BYTES[dtype]
    tokens = max(max_batch_tokens, max_tokens)
    numbers = 2 * shape.hidden_width + 4 * shape.attention.width + 2 * shape.intermediate_width
    activations = tokens * (numbers * size + 3 * shape.hidden_width * DTYPE_BYTES["float32"])
    # One text of the largest length, or a batch of texts that are as long as its tokens allow.
    alone, together = max_tokens**2, max_batch_tokens * min(max_tokens, max_batch_tokens)
    scores, mask, window = _bytes_per_pair(shape, size, runtime)
    pairs = scores * max(alone, together) + mask * together + window * alone
    return MemoryPlan(
        # OpenVINO packs a copy of torch's float32 weights, which stay in memory until it is done.
        weights_bytes=shape.num_weights * (size + DTYPE_BYTES["float32"] if runtime == "openvino" else size),
        batch_bytes=activations + pairs,
        card_bytes=0 if device == "cpu" else _CARD_BYTES,
    )


def _bytes_per_pair(shape: Shape, size: int, runtime: str) -> tuple[int, int, int]:
    """Return the bytes that a forward holds for each pair of tokens of a text.

    Attention in one kernel does not store scores, and a single text needs no mask, except for windows.

    Returns:
        The bytes of the scores, of the mask of a batch of several lengths, and of the masks of a single text.
    """
    if runtime == "torch-packed":
        return 0, 0, 0
    if runtime == "openvino":
        scores = _COMPILED_SCORE_BYTES.get(shape.model_type, 0) * shape.attention.num_heads
        return scores, _COMPILED_MASK_BYTES, _COMPILED_MASK_BYTES * (2 if shape.attention.has_windows else 1)
    scores = _SCORE_BYTES.get(shape.model_type, 0) * shape.attention.num_heads
    return scores, _MASK_BYTES + size, _WINDOW_BYTES if shape.attention.has_windows else 0


def require_memory(plan: MemoryPlan, available_bytes: int, device: str, others: str = "") -> None:
    """Refuse a model that would not fit.

    Args:
        others: the other processes on the device, for the message.

    Raises:
        TooLittleMemory: the plan needs more than is available; names the settings that would lower it.
    """
    if plan.total_bytes > available_bytes:
        card = f" + {format_bytes(plan.card_bytes)} for CUDA itself" if plan.card_bytes else ""
        next_to = f" next to {others}" if others else ""
        raise TooLittleMemory(
            f"too little memory on {device}: needs {format_bytes(plan.total_bytes)} "
            f"({format_bytes(plan.weights_bytes)} weights + {format_bytes(plan.batch_bytes)} for the largest batch{card}), "
            f"{format_bytes(available_bytes)} are free{next_to}. Lower max_batch_tokens or max_tokens, use a 16-bit dtype, "
            f"or disable another model{', or end one of those processes' if others else ''}",
            device,
            plan.total_bytes - available_bytes,
        )


def available_host_bytes() -> int:
    """Return the memory that this process may still use, in bytes: the machine's, or less inside a container."""
    available = psutil.virtual_memory().available
    try:
        # Inside a container, the limit of its control group (version 2) counts; "max" means no limit.
        limit = int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()) + _evictable_bytes()
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit))


def _evictable_bytes() -> int:
    """Return the bytes of files that the control group caches in memory and can evict.

    The kernel counts them as used, so after reading a few checkpoints, hardly any memory would seem free.
    """
    with suppress(OSError):
        for line in _CGROUP_STAT.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0


def format_bytes(num_bytes: int) -> str:
    """Return a size for people, such as ``1.2 GiB`` or ``91 MiB``."""
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"


def _num_weights(path: Path) -> int:
    """Return the count of numbers in a weights file, which may hold them in 16 or 32 bits."""
    if path.suffix == ".json":  # weights of queries by token, 10 characters or more for each
        return path.stat().st_size // 10
    try:
        return sum(prod(shape) for shape in read_shapes([path]).values())
    except LoadError:
        if path.suffix == ".safetensors":
            raise
        return path.stat().st_size // 2  # loading it gives the reason
