"""Run a compiled copy of the model with OpenVINO: on a CPU three to four times faster than torch.

transformers' model is traced once with dynamic shapes. Where its family allows it (:mod:`.attention`), several texts share
a row (:mod:`.rows`), and masks and positions are inputs. Its weights are shared with the compiled copy or packed into the
processor's own layout, and the torch model can go. OpenVINO's threads sleep when idle, where torch's spin.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gateway.engine.devices import CpuThreads
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.attention import (
    FULL,
    SLIDING,
    AttentionRule,
    make_masks,
    positions,
    uncounted_id,
)
from gateway.engine.model.runtimes.padded import group_by_length
from gateway.engine.model.runtimes.rows import Layout, lay_out, plan_forwards
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# OpenVINO's telemetry reports each import and each conversion. Without the package, it uses a stub that sends nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # type: ignore[import-untyped]  # noqa: E402

AdapterTable: TypeAlias = npt.NDArray[np.float32]
# OpenVINO compiles kernels for each shape of a forward and by default keeps those of thousands: memory grows by 100 MiB for
# each thousand batches of mixed shapes. With 512 kernels it stays flat, at the same speed; without a cache, a short text
# takes twice as long.
_CACHED_KERNELS = 512
# The first batch of a new shape takes 5 to 10 ms longer, as much as a hundred tokens and more: where each text has a row to
# itself, several are padded to a multiple of this, so that shapes recur. Computing the padding costs less.
_LENGTH_STEP = 8
# In a mask that is added to the attention's scores: closed. Smaller numbers may overflow once others are added.
_CLOSED = np.float32(-1e9)
# The tracer's state is the process's: one model at a time.
_TRACING = threading.Lock()
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}
# OpenVINO fuses the gated feed-forward of these in bfloat16. With a single thread in a stream, compiling that ends the
# process with SIGFPE, as of 2026.4 (openvinotoolkit/openvino#33300).
_GATED_MODEL_TYPES = (
    *("gte", "nomic_bert", "eurobert", "t5"),
    *("qwen3", "qwen2", "mistral", "llama", "gemma2", "gemma3_text", "lfm2"),
)

Inputs: TypeAlias = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class CompiledFeatures:
    """The inputs of the compiled model by name, and where the tokens of the texts are.

    Attributes:
        places: of each text's tokens, one text after the other, among the tokens of all rows.
        lengths: tokens of each text.
    """

    inputs: Inputs
    places: npt.NDArray[np.intp]
    lengths: Sequence[int]


class _Traced(nn.Module):
    """The model as a function of tensors alone, which is what can be traced.

    The arguments of ``forward`` have the names of the inputs, and the order in which :class:`InputMaker` makes them.
    """

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None, rule: AttentionRule | None) -> None:
        super().__init__()
        self._model = model
        self._mask = mask
        self._takes_mask_by_type = rule is not None and bool(rule.layer_types)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        full_attention: torch.Tensor | None = None,
        sliding_attention: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        adapter_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._mask is not None and adapter_mask is not None:
            self._mask.value = adapter_mask
        mask: Any = next((one for one in (attention_mask, full_attention, sliding_attention) if one is not None), None)
        if self._takes_mask_by_type:
            mask = {FULL: full_attention, SLIDING: sliding_attention}
        optional = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        states: torch.Tensor = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        ).last_hidden_state
        return states


class InputMaker:
    """Makes the inputs of a compiled model from the texts of a forward.

    Args:
        rule: what tells texts in one row apart; ``None``: each has a row to itself, and the model makes its masks.
    """

    def __init__(
        self, model: PreTrainedModel, mask: AdapterMask | None, rule: AttentionRule | None, *, has_segments: bool
    ):
        config = model.config
        self.rule = rule
        self._pad_id: int = config.pad_token_id or 0
        self._width: int = config.hidden_size
        self._uncounted_id = uncounted_id(config)
        # An attention that is not torch's own adds its mask to the scores.
        self._is_added = config._attn_implementation != "sdpa"
        self._adapter_table: AdapterTable | None = None if mask is None else mask.table.float().numpy()
        self._has_segments = has_segments

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return the texts of each forward."""
        return group_by_length(lengths) if self.rule is None else plan_forwards(lengths, self._width)

    def make(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> CompiledFeatures:
        """Make the inputs; the arguments are those of :meth:`gateway.engine.model.runtimes.base.Runtime.prepare`."""
        lengths = [len(row) for row in rows]
        layout = self._lay_out(lengths)
        shape = (len(layout.rows), layout.length)
        owners = np.full(shape, -1)
        ids = np.full(shape, self._pad_id)
        position_ids = np.zeros(shape, np.int64)
        segments = np.zeros(shape, np.int64)
        is_key = None if attended is None else np.zeros(shape, bool)
        starts = [0] * len(rows)
        for i, row in enumerate(layout.rows):
            start = 0
            for text in row:
                end = start + lengths[text]
                starts[text] = i * layout.length + start
                owners[i, start:end] = text
                ids[i, start:end] = rows[text]
                position_ids[i, start:end] = positions(rows[text], self._uncounted_id)
                if seconds is not None and (second := seconds[text]) is not None:
                    segments[i, start + second : end] = 1
                if is_key is not None and attended is not None:
                    is_key[i, start : start + attended[text]] = True
                start = end
        inputs: Inputs = {"input_ids": ids, **self._masks(owners, is_key)}
        if self.rule is not None:
            inputs["position_ids"] = position_ids
        if self._adapter_table is not None:
            inputs["adapter_mask"] = self._adapter_table[np.array([*adapters, -1])[owners]]
        if self._has_segments:
            inputs["token_type_ids"] = segments
        places = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        return CompiledFeatures(inputs, places, lengths)

    def _lay_out(self, lengths: Sequence[int]) -> Layout:
        if self.rule is not None:
            return lay_out(lengths, self._width)
        step = _LENGTH_STEP if len(lengths) > 1 else 1
        return Layout([[i] for i in range(len(lengths))], -(-max(lengths) // step) * step)

    def _masks(self, owners: npt.NDArray[np.intp], is_key: npt.NDArray[np.bool_] | None) -> Inputs:
        if self.rule is None:
            return {"attention_mask": (owners >= 0 if is_key is None else is_key).astype(np.int64)}
        masks = make_masks(owners, is_key, self.rule)
        return {
            name: np.where(mask, np.float32(0), _CLOSED) if self._is_added else mask for name, mask in masks.items()
        }


class OpenVinoRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that runs a compiled copy of a torch model on the CPU."""

    name = "openvino"

    def __init__(self, compiled: openvino.CompiledModel, inputs: InputMaker) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = inputs

    @classmethod
    def compile(
        cls,
        model: PreTrainedModel,
        mask: AdapterMask | None,
        dtype: str,
        threads: CpuThreads,
        *,
        has_segments: bool = False,
        rule: AttentionRule | None = None,
    ) -> list[OpenVinoRuntime]:
        """Compile a model and return a runtime for each stream; they share the weights and run side by side.

        Args:
            model: in float32, on the CPU; not needed afterwards.
            dtype: ``float32`` or ``bfloat16``, which the processor must have.
            has_segments: the model takes segment ids, which mark the tokens of a pair's second text.
            rule: what tells texts in one row apart; ``None``: each has a row to itself.

        Raises:
            RuntimeError: OpenVINO cannot compile the model.
        """
        if dtype == "bfloat16" and model.config.model_type in _GATED_MODEL_TYPES:
            threads = _wide_streams(threads)
        inputs = InputMaker(model, mask, rule, has_segments=has_segments)
        compiled = openvino.Core().compile_model(
            _convert(_Traced(model, mask, rule), inputs, [0, -1] if mask is not None else [-1, -1]),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
                "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
                "NUM_STREAMS": threads.num_streams,
                "INFERENCE_NUM_THREADS": threads.num_streams * threads.per_stream,
                # Bound to cores, the streams of every model and process would take the same ones first.
                "ENABLE_CPU_PINNING": threads.are_bound,
            },
        )
        return [cls(compiled, inputs) for _ in range(threads.num_streams)]

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        return self._inputs.groups(lengths)

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> CompiledFeatures:
        return self._inputs.make(rows, adapters, seconds, attended)

    def forward(self, features: CompiledFeatures) -> TokenStates:
        # The result is the request's own memory, which the next forward writes to: taking the texts' tokens copies them.
        result = self._request.infer(features.inputs, share_inputs=True, share_outputs=True)
        states = torch.from_numpy(next(iter(result.values())))
        num_computed = states.shape[0] * states.shape[1]
        flat = states.flatten(0, 1)[torch.from_numpy(features.places)]
        return TokenStates(flat, features.lengths, num_computed - len(features.places))


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
    return CpuThreads(num_streams, num_threads // num_streams, threads.are_bound)


def _convert(traced: _Traced, inputs: InputMaker, adapters: Sequence[int]) -> openvino.Model:
    """Trace the model with any number of rows of any length."""
    texts = [[1] * 9, [1] * 7, [1] * 16]  # rows of 16 tokens, of which one has two texts where that is possible
    example = inputs.make(texts, [*adapters, -1], [4] * 3).inputs
    shapes = {name: [-1] * array.ndim for name, array in example.items()}
    if "adapter_mask" in example:
        shapes["adapter_mask"][-1] = example["adapter_mask"].shape[-1]
    for name in (FULL, SLIDING):
        if name in shapes:
            shapes[name][1] = 1
    # The tracer warns of each Python branch on a shape; that the result holds for other shapes is checked on load.
    with _TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return openvino.convert_model(
                traced.eval(),
                example_input={name: torch.from_numpy(array) for name, array in example.items()},
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
