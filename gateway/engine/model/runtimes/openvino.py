"""Run a compiled copy of the model with OpenVINO: on a CPU two to three times faster than torch.

transformers' model is traced once with dynamic shapes; its weights are shared with the compiled copy or packed into the
processor's own layout, and the torch model can go. OpenVINO's threads sleep when idle, where torch's spin.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gateway.engine.devices import CpuThreads
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.padded import pad, pad_segments
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# OpenVINO's telemetry reports each import and each conversion. Without the package, it uses a stub that sends nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # type: ignore[import-untyped]  # noqa: E402

AdapterTable: TypeAlias = npt.NDArray[np.float32]
# OpenVINO compiles kernels for each shape of a batch and by default keeps those of thousands: memory grows by 100 MiB for
# each thousand batches of mixed shapes. With 512 kernels it stays flat, at the same speed; without a cache, a short text
# takes twice as long.
_CACHED_KERNELS = 512
# The first batch of a new shape takes 5 to 10 ms longer, as much as a hundred tokens and more: batches of several texts
# are padded to a multiple of this, so that shapes recur. Computing the padding costs less.
_LENGTH_STEP = 8
# The tracer's state is the process's: one model at a time.
_TRACING = threading.Lock()
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}
# OpenVINO fuses the gated feed-forward of these in bfloat16. With a single thread in a stream, compiling that ends the
# process with SIGFPE, as of 2026.4 (openvinotoolkit/openvino#33300).
_GATED_MODEL_TYPES = (
    *("gte", "nomic_bert", "eurobert", "t5"),
    *("qwen3", "qwen2", "mistral", "llama", "gemma2", "gemma3_text", "lfm2"),
)


@dataclass(frozen=True, slots=True)
class CompiledFeatures:
    """The inputs of the compiled model by name, and the tokens of each text."""

    inputs: Mapping[str, npt.NDArray[np.generic]]
    lengths: Sequence[int]


class _Traced(nn.Module):
    """The model as a function of tensors alone, which is what can be traced."""

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        super().__init__()
        self._model = model
        self._mask = mask

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        adapter_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._mask is not None and adapter_mask is not None:
            self._mask.value = adapter_mask
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states: torch.Tensor = self._model(
            input_ids=input_ids, attention_mask=attention_mask, **segments
        ).last_hidden_state
        return states


class OpenVinoRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that runs a compiled copy of a torch model on the CPU."""

    name = "openvino"
    is_packed = False

    def __init__(
        self, compiled: openvino.CompiledModel, pad_id: int, adapter_table: AdapterTable | None, *, has_segments: bool
    ) -> None:
        self._request = compiled.create_infer_request()
        self._pad_id = pad_id
        self._adapter_table = adapter_table
        self._has_segments = has_segments

    @classmethod
    def compile(
        cls,
        model: PreTrainedModel,
        mask: AdapterMask | None,
        dtype: str,
        threads: CpuThreads,
        *,
        has_segments: bool = False,
    ) -> list[OpenVinoRuntime]:
        """Compile a model and return a runtime for each stream; they share the weights and run side by side.

        Args:
            model: in float32, on the CPU; not needed afterwards.
            dtype: ``float32`` or ``bfloat16``, which the processor must have.
            has_segments: the model takes segment ids, which mark the tokens of a pair's second text.

        Raises:
            RuntimeError: OpenVINO cannot compile the model.
        """
        if dtype == "bfloat16" and model.config.model_type in _GATED_MODEL_TYPES:
            threads = _wide_streams(threads)
        compiled = openvino.Core().compile_model(
            _convert(model, mask, has_segments=has_segments),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
                "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
                "NUM_STREAMS": threads.num_streams,
                "INFERENCE_NUM_THREADS": threads.num_streams * threads.per_stream,
            },
        )
        table = None if mask is None else mask.table.float().numpy()
        pad_id: int = model.config.pad_token_id or 0
        return [cls(compiled, pad_id, table, has_segments=has_segments) for _ in range(threads.num_streams)]

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> CompiledFeatures:
        input_ids, attention_mask = pad(rows, self._pad_id, _LENGTH_STEP if len(rows) > 1 else 1, attended)
        inputs: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": input_ids.numpy(),
            "attention_mask": attention_mask.numpy(),
        }
        if self._adapter_table is not None:
            inputs["adapter_mask"] = self._adapter_table[list(adapters)][:, None, :]
        if self._has_segments:
            segments = pad_segments(rows, seconds, input_ids.shape[1])
            inputs["token_type_ids"] = (torch.zeros_like(input_ids) if segments is None else segments).numpy()
        return CompiledFeatures(inputs, [len(row) for row in rows])

    def forward(self, features: CompiledFeatures) -> TokenStates:
        result = self._request.infer(features.inputs, share_inputs=True)
        states = torch.from_numpy(next(iter(result.values())))
        return TokenStates.from_padded(states, features.lengths)


def _wide_streams(threads: CpuThreads) -> CpuThreads:
    """Share the same threads out so that each stream has two or more.

    Raises:
        RuntimeError: there is only one.
    """
    # OpenVINO starts no more threads than the process has cores.
    num_threads = min(threads.num_streams * threads.per_stream, len(os.sched_getaffinity(0)))
    if num_threads < 2:
        raise RuntimeError("bfloat16 on a single thread crashes it with this architecture (openvino#33300)")
    num_streams = min(threads.num_streams, num_threads // 2)
    return CpuThreads(num_streams, num_threads // num_streams)


def _convert(model: PreTrainedModel, mask: AdapterMask | None, *, has_segments: bool) -> openvino.Model:
    """Trace the model with any batch size and length."""
    example = {
        "input_ids": torch.ones(2, 8, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
    }
    shapes = {"input_ids": [-1, -1], "attention_mask": [-1, -1]}
    if mask is not None:
        example["adapter_mask"] = mask.rows([0, -1])[:, None, :]
        shapes["adapter_mask"] = [-1, 1, example["adapter_mask"].shape[-1]]
    if has_segments:
        example["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 4] * 2)
        shapes["token_type_ids"] = [-1, -1]
    # The tracer warns of each Python branch on a shape; that the result holds for other shapes is checked on load.
    with _TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return openvino.convert_model(
                _Traced(model, mask).eval(),
                example_input=example,
                input=[(name, openvino.PartialShape(shape)) for name, shape in shapes.items()],
            )
        finally:
            _forget_traces()


def _forget_traces() -> None:
    """Drop what torch's tracer keeps of each module for good.

    It makes a class of each and compiles it: 17 MiB each time that a model of six layers is loaded. The remedy is torch's
    own, for its tests: ``clear_class_registry`` in ``torch/testing/_internal/jit_utils.py``.
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
