"""Run a compiled copy of the model with OpenVINO: on a CPU two to three times faster than torch.

transformers' model is traced once with dynamic shapes; its weights are shared with the compiled copy or packed into the
processor's own layout, and the torch model can go. OpenVINO's threads sleep when idle, where torch's spin.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from gateway.engine.adapters import AdapterMask
from gateway.engine.devices import CpuThreads
from gateway.engine.openvino_library import openvino
from gateway.engine.runtimes.padded import pad
from gateway.engine.states import TokenStates

AdapterTable: TypeAlias = npt.NDArray[np.float32]
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


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
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, adapter_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._mask is not None and adapter_mask is not None:
            self._mask.value = adapter_mask
        states: torch.Tensor = self._model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class OpenVinoRuntime:
    """The :class:`~gateway.engine.runtimes.base.Runtime` that runs a compiled copy of a torch model on the CPU."""

    name = "openvino"
    is_packed = False

    def __init__(self, compiled: openvino.CompiledModel, pad_id: int, adapter_table: AdapterTable | None) -> None:
        self._request = compiled.create_infer_request()
        self._pad_id = pad_id
        self._adapter_table = adapter_table

    @classmethod
    def compile(
        cls, model: PreTrainedModel, mask: AdapterMask | None, dtype: str, threads: CpuThreads
    ) -> list[OpenVinoRuntime]:
        """Compile a model and return a runtime for each stream; they share the weights and run side by side.

        Args:
            model: in float32, on the CPU; not needed afterwards.
            dtype: ``float32`` or ``bfloat16``, which the processor must have.
        """
        compiled = openvino.Core().compile_model(
            _convert(model, mask),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
                "NUM_STREAMS": threads.num_streams,
                "INFERENCE_NUM_THREADS": threads.num_streams * threads.per_stream,
            },
        )
        table = None if mask is None else mask.table.float().numpy()
        pad_id: int = model.config.pad_token_id or 0
        return [cls(compiled, pad_id, table) for _ in range(threads.num_streams)]

    def prepare(self, rows: Sequence[Sequence[int]], adapters: Sequence[int]) -> CompiledFeatures:
        input_ids, attention_mask = pad(rows, self._pad_id)
        inputs: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": input_ids.numpy(),
            "attention_mask": attention_mask.numpy(),
        }
        if self._adapter_table is not None:
            inputs["adapter_mask"] = self._adapter_table[list(adapters)][:, None, :]
        return CompiledFeatures(inputs, [len(row) for row in rows])

    def forward(self, features: CompiledFeatures) -> TokenStates:
        result = self._request.infer(features.inputs, share_inputs=True)
        states = torch.from_numpy(next(iter(result.values())))
        return TokenStates.from_padded(states, features.lengths)


def _convert(model: PreTrainedModel, mask: AdapterMask | None) -> openvino.Model:
    """Trace the model with any batch size and length."""
    example = {
        "input_ids": torch.ones(2, 8, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
    }
    shapes = {"input_ids": [-1, -1], "attention_mask": [-1, -1]}
    if mask is not None:
        example["adapter_mask"] = mask.rows([0, -1])[:, None, :]
        shapes["adapter_mask"] = [-1, 1, example["adapter_mask"].shape[-1]]
    with warnings.catch_warnings():
        # The tracer warns of each Python branch on a shape; that the result holds for other shapes is checked on load.
        warnings.simplefilter("ignore")
        return openvino.convert_model(
            _Traced(model, mask).eval(),
            example_input=example,
            input=[(name, openvino.PartialShape(shape)) for name, shape in shapes.items()],
        )
