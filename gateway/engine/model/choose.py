"""Choose the runtime of a model: with the same function for the memory plan and when its weights are loaded."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import load_config
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES
from gateway.engine.model.runtimes.flash import DTYPES, HEAD_WIDTH_STEP, MAX_HEAD_WIDTH, MIN_CAPABILITY
from gateway.errors import LoadError


def choose_runtime(setting: str, device: str, dtype: str, model_type: str) -> str:
    """Return the runtime of a setting of ``models.yaml``: ``openvino``, ``torch`` or ``torch-packed``.

    ``auto`` means OpenVINO on a CPU if it is installed, and torch otherwise. torch is packed if the architecture allows it
    and the card has the attention kernel for the dtype. ``torch`` is never packed.

    Args:
        setting: also ``reference`` (padded) and ``packed``, on any device.
        dtype: name of a torch dtype.

    Raises:
        LoadError: the setting asks for OpenVINO, which is not installed, or the device is not a CPU.
    """
    if setting in ("reference", "packed"):
        return "torch" if setting == "reference" else "torch-packed"
    if setting == "openvino" and device != "cpu":
        raise LoadError(
            f"runtime openvino runs on CPUs only, and this model is on {device}; use runtime: torch or auto"
        )
    is_installed = find_spec("openvino") is not None
    if setting == "openvino" and not is_installed:
        raise LoadError("runtime openvino: the package openvino is not installed; use runtime: torch or auto")
    if device == "cpu":
        return "openvino" if is_installed and setting != "torch" else "torch"
    can_pack = setting == "auto" and model_type in PACKED_MODEL_TYPES and has_attention_kernel(device, dtype)
    return "torch-packed" if can_pack else "torch"


def choose_runtime_of(checkpoint: Checkpoint, setting: str, device: str, dtype: str) -> str:
    """Return the runtime of a checkpoint: :func:`choose_runtime`, with a check of its files.

    Raises:
        LoadError: as in :func:`choose_runtime`; or the setting is ``packed``, and the model cannot be packed.
    """
    runtime = choose_runtime(setting, device, dtype, checkpoint.model_type)
    if runtime != "torch-packed":
        return runtime
    obstacle = _why_not_packed(checkpoint)
    if obstacle and setting == "packed":
        raise LoadError(f"{checkpoint.folder}: {obstacle} cannot be packed")
    return "torch" if obstacle else runtime


def has_attention_kernel(device: str, dtype: str) -> bool:
    """Return whether attention within packed texts has a kernel on a CUDA device, for tensors of a dtype."""
    return dtype in DTYPES and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def _why_not_packed(checkpoint: Checkpoint) -> str:
    """Return the obstacle to computing texts in one packed row; empty without one."""
    if checkpoint.model_type not in PACKED_MODEL_TYPES:
        return f"model_type {checkpoint.model_type!r}"
    if checkpoint.has_own_code:  # its attention may cross the boundaries of texts
        return "a model with the checkpoint's own code"
    if getattr(load_config(checkpoint.transformer), "is_decoder", False):
        return "one-way attention (is_decoder: true)"
    head_width = checkpoint.attention.width // checkpoint.attention.num_heads
    if head_width % HEAD_WIDTH_STEP or head_width > MAX_HEAD_WIDTH:
        return f"attention with heads of {head_width} numbers, which the kernel does not take,"
    return ""
