"""Run a compiled copy of the model with OpenVINO, which is three to four times faster than torch on a CPU.

transformers' model is traced once with dynamic shapes. If its family allows it (:mod:`.attention`), several texts share a
row (:mod:`.rows`), and masks and positions are inputs. The compiled copy shares the weights or packs them into the
processor's layout, and the torch model is then dropped. OpenVINO's threads sleep when idle, while torch's spin.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gateway.engine.devices import CpuThreads
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.attention import FULL, SLIDING, AttentionRule
from gateway.engine.model.runtimes.inputs import CompiledFeatures, InputMaker
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# OpenVINO's telemetry reports each import and each conversion. Without the package, it uses a stub that sends nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # type: ignore[import-untyped]  # noqa: E402

# OpenVINO compiles kernels for each shape of a forward, and by default keeps the kernels of thousands of shapes: memory
# grows by 100 MiB for each thousand batches of mixed shapes. With 512 kernels it stays flat, at the same speed; without a
# cache, a short text takes twice as long.
_CACHED_KERNELS = 512
# The tracer's state is global to the process, so only one model is traced at a time.
_TRACING = threading.Lock()
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}
# OpenVINO fuses the gated feed-forward of these models in bfloat16. With a single thread per stream, compiling it crashes
# the process with SIGFPE, as of 2026.4 (openvinotoolkit/openvino#33300).
_GATED_MODEL_TYPES = (
    *("gte", "nomic_bert", "eurobert", "t5"),
    *("qwen3", "qwen2", "mistral", "llama", "gemma2", "gemma3_text", "lfm2"),
)
_MODEL = "model.xml"
_ZEROING = "gateway-zeroing"


class _Traced(nn.Module):
    """The model as a function of tensors only, so that it can be traced.

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
        mask: Any = next(
            (candidate for candidate in (attention_mask, full_attention, sliding_attention) if candidate is not None),
            None,
        )
        if self._takes_mask_by_type:
            mask = {FULL: full_attention, SLIDING: sliding_attention}
        optional = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        states: torch.Tensor = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        ).last_hidden_state
        return states


@dataclass(frozen=True, slots=True)
class TracedModel:
    """A model in OpenVINO's form, with its weights in float32, and the maker of its inputs."""

    model: openvino.Model
    inputs: InputMaker

    @classmethod
    def trace(
        cls,
        model: PreTrainedModel,
        mask: AdapterMask | None,
        rule: AttentionRule | None,
        *,
        has_segments: bool,
        unattended_length: int = 0,
    ) -> TracedModel:
        """Trace a torch model in float32 on the CPU; the result shares its weights.

        Args:
            rule: the rule that separates texts in a row; ``None`` if each text has a separate row.
            has_segments: the model takes segment ids, which mark the tokens of a pair's second text.
            unattended_length: the length of texts whose last tokens are not attended to; 0 without such texts.

        Raises:
            Exception: of any class, if the architecture cannot be traced.
        """
        inputs = InputMaker.of(model, mask, rule, has_segments=has_segments)
        has_window = rule is not None and rule.window is not None and unattended_length > rule.window
        with _zeroing(model.config) if has_window and not inputs.adds_mask else nullcontext():
            traced = _convert(_Traced(model, mask, rule), inputs, [0, -1] if mask is not None else [-1, -1])
        return cls(traced, inputs)

    def save(self, folder: Path) -> None:
        """Write everything into files of a folder, for :meth:`read`.

        Raises:
            OSError, RuntimeError: the files cannot be written.
        """
        openvino.save_model(self.model, folder / _MODEL, compress_to_fp16=False)
        self.inputs.save(folder)

    @classmethod
    def read(cls, folder: Path) -> TracedModel:
        """Read the files that :meth:`save` has written. The weights stay in their file, which is mapped into memory.

        Raises:
            OSError, ValueError, TypeError, RuntimeError: the files were changed after they were written.
        """
        return cls(openvino.Core().read_model(folder / _MODEL), InputMaker.read(folder))


def describe_processor() -> list[str]:
    """Return OpenVINO's version and the processor, on which the computed numbers depend."""
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [openvino.__version__, core.get_property("CPU", "FULL_DEVICE_NAME"), *capabilities]


class OpenVinoRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that runs a compiled copy of a torch model on the CPU.

    Attributes:
        origin: the traced torch model, which only the tracer's own reference cycles still hold.
    """

    name = "openvino"
    extra_bytes = 0
    origin: weakref.ref[nn.Module] | None = None

    def __init__(self, compiled: openvino.CompiledModel, inputs: InputMaker) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = inputs

    @classmethod
    def compile(cls, traced: TracedModel, dtype: str, threads: CpuThreads) -> list[OpenVinoRuntime]:
        """Compile a model and return a runtime for each stream; they share the weights and run side by side.

        Args:
            dtype: ``float32`` or ``bfloat16``, which the processor must have.

        Raises:
            RuntimeError: OpenVINO cannot compile the model.
        """
        if dtype == "bfloat16" and traced.inputs.model_type in _GATED_MODEL_TYPES:
            threads = _wide_streams(threads)
        compiled = openvino.Core().compile_model(
            traced.model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
                "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
                "NUM_STREAMS": threads.num_streams,
                "INFERENCE_NUM_THREADS": threads.num_streams * threads.per_stream,
                # If bound, the streams of all models and processes would take the same cores first.
                "ENABLE_CPU_PINNING": threads.are_bound,
            },
        )
        return [cls(compiled, traced.inputs) for _ in range(threads.num_streams)]

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
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
        # The result is the request's own memory, which the next forward overwrites. Selecting the texts' tokens copies
        # them.
        result = self._request.infer(features.inputs, share_inputs=True, share_outputs=True)
        states = torch.from_numpy(next(iter(result.values())))
        num_computed = states.shape[0] * states.shape[1]
        flat = states.flatten(0, 1).index_select(0, torch.from_numpy(features.places))
        return TokenStates(flat, features.lengths, num_computed - len(features.places))


def _wide_streams(threads: CpuThreads) -> CpuThreads:
    """Redistribute the threads so that each stream has two or more.

    Raises:
        RuntimeError: only one thread is available.
    """
    # OpenVINO starts no more threads than the process has cores.
    num_threads = min(threads.num_streams * threads.per_stream, len(os.sched_getaffinity(0)))
    if num_threads < 2:
        raise RuntimeError("bfloat16 on a single thread crashes it with this architecture (openvino#33300)")
    num_streams = min(threads.num_streams, num_threads // 2)
    return CpuThreads(num_streams, num_threads // num_streams, threads.are_bound)


@contextmanager
def _zeroing(config: PreTrainedConfig) -> Iterator[None]:
    """Let the attention give 0 to a token that sees nothing, as torch's kernels do; OpenVINO's give NaN.

    Tokens that are not attended to do not see each other. Behind a short text, a window may hold no other tokens.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ZEROING, _attend_or_zero)
    before, config._attn_implementation = config._attn_implementation, _ZEROING
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend_or_zero(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    states, _weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sees = attention_mask.any(dim=-1).transpose(1, 2)[..., None]  # for states of (b, t, heads, width)
    return torch.where(sees, states, torch.zeros_like(states)), None


def _convert(traced: _Traced, inputs: InputMaker, adapters: Sequence[int]) -> openvino.Model:
    """Trace the model with any number of rows of any length."""
    texts = [[1] * 9, [1] * 7, [1] * 16]  # rows of 16 tokens; one has two texts, if possible
    example = inputs.make(texts, [*adapters, -1], [4] * 3).inputs
    shapes = {name: [-1] * array.ndim for name, array in example.items()}
    if "adapter_mask" in example:
        shapes["adapter_mask"][-1] = example["adapter_mask"].shape[-1]
    for name in (FULL, SLIDING):
        if name in shapes:
            shapes[name][1] = 1
    # The tracer warns about each Python branch on a shape. A check on load covers other shapes.
    with _TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = openvino.convert_model(
                traced.eval(),
                example_input={name: torch.from_numpy(array) for name, array in example.items()},
                input=[(name, openvino.PartialShape(shape)) for name, shape in shapes.items()],
            )
        finally:
            _forget_traces()
    _drop_marks(model)
    return model


def _drop_marks(model: openvino.Model) -> None:
    """Drop the converter's marks, such as those on constants that must not be folded; a saved model does not have them.

    With them, a model would be compiled differently than after it was saved, and its vectors would differ in the last
    bits.
    """
    for operation in model.get_ops():
        marks = operation.get_rt_info()
        for name in list(marks):
            del marks[name]


def _forget_traces() -> None:
    """Drop the data that torch's tracer otherwise keeps forever for each module.

    The tracer makes a class of each module and compiles it, which takes 17 MiB each time a model of six layers is loaded.
    torch's own tests use the same remedy: ``clear_class_registry`` in ``torch/testing/_internal/jit_utils.py``.
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
