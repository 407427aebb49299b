"""Build the encoder of a checkpoint: tokenizer, model, adapters, heads, and the fastest runtime that agrees with torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gateway.config.wording import cut
from gateway.engine.accumulation import ACCUMULATION, keep_long_sums_exact
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sources import file_sha256
from gateway.engine.compiled_cache import CompiledCache, describe_engine, key_of
from gateway.engine.devices import CpuThreads, available_bytes
from gateway.engine.faults import is_card_lost, is_out_of_memory
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.agreement import MIN_COSINE, least_cosine
from gateway.engine.model.build_heads import build_heads, build_query_table
from gateway.engine.model.choose import choose_runtime_of
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.load_tokenizer import Tokenizers, load_tokenizers
from gateway.engine.model.runtimes.attention import attention_rule
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.engine.model.splade import QueryTableEncoder
from gateway.engine.model.static import load_table
from gateway.engine.model.tokenizer import Tokenizer
from gateway.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gateway.engine.model.runtimes.packed import PackedRuntime

# The plan of a model and its construction choose the runtime with the same function.
__all__ = ["BuildOptions", "build_encoders", "choose_runtime_of"]

log = structlog.get_logger(__name__)

# The merged weights of a model's adapters may take this share of a card's free memory.
_MERGED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options for building an encoder.

    Attributes:
        device: torch device, such as ``cpu`` or ``cuda:0``.
        dtype: name of the torch dtype to compute in.
        runtime: ``auto``, ``torch``, ``openvino``; or, whatever the device, ``reference`` (torch, padded) or ``packed``.
        max_tokens: the longest text; at most the checkpoint's own limit.
        merges_adapters: whether to merge weights for each adapter if texts are packed; ``None``: if the memory allows it.
        accumulates_in_float16: whether matrix products on a card may accumulate in float16. Then small batches are not
            computed as graphs, whose products accumulate in float32.
        max_query_tokens: the longest query, if queries and documents are treated differently.
        threads: how a model on the CPU uses its cores.
        tasks: instruction of each task.
        instruction: the instruction for a text without a task.
        trust_remote_code: whether Python code of the checkpoint may run in this process.
        compiled_folder: where compiled models are kept for a later start; ``None`` keeps none.
    """

    device: str
    dtype: str
    runtime: str
    max_tokens: int
    threads: CpuThreads
    tasks: Mapping[str, str]
    instruction: str = ""
    trust_remote_code: bool = False
    compiled_folder: Path | None = None
    max_query_tokens: int = 2**62
    merges_adapters: bool | None = None
    accumulates_in_float16: bool = False


def build_encoders(checkpoint: Checkpoint, options: BuildOptions) -> list[Encoder]:
    """Load a checkpoint once, and return an encoder for each stream of the runtime; the encoders share all weights.

    Raises:
        LoadError: the checkpoint is corrupt or incomplete, or contradicts its configuration.
    """
    runtimes: Sequence[Runtime]
    if checkpoint.static is not None:
        tokenizer, static = load_table(checkpoint, options.max_tokens)
        tokenizers, runtimes = Tokenizers(tokenizer), [static]
    else:
        limits, may_run = (options.max_tokens, options.max_query_tokens), options.trust_remote_code
        tokenizers = load_tokenizers(
            checkpoint, *limits, trust_remote_code=may_run, cache=_readings(checkpoint, options)
        )
        runtimes = _build_runtimes(checkpoint, options, tokenizers.texts)
    folders = checkpoint.adapter_folders
    heads = build_heads(checkpoint, options.device, options.dtype, tokenizers)
    table = build_query_table(checkpoint, options.max_query_tokens)
    encoders = []
    for runtime in runtimes:
        encoder = (Encoder if table is None else QueryTableEncoder)(
            tokenizers.texts,
            runtime,
            heads,
            width=checkpoint.width,
            tasks=options.tasks,
            adapters={task: folders.index(folder) for task, folder in checkpoint.adapters.items()},
            instruction=options.instruction,
            query_tokenizer=tokenizers.queries if table is None else table.tokenizer,
        )
        if isinstance(encoder, QueryTableEncoder) and table is not None:
            encoder.query_table = table
        encoder.accumulates_in_float16 = options.accumulates_in_float16
        # Padded texts, and SPLADE's head, wait for the card between its kernels.
        encoder.works_ahead = runtime.name == "torch-packed" and options.device != "cpu" and checkpoint.splade is None
        encoders.append(encoder)
    if checkpoint.classifier is None:  # the tokenizers of pairs have compared their templates with the limit
        _require_room(encoders[0], checkpoint, options.tasks)
    return encoders


def _require_room(encoder: Encoder, checkpoint: Checkpoint, tasks: Iterable[str]) -> None:
    """Refuse a limit that leaves no room for a text: all texts of a task would have the same vector."""
    for task in (None, *tasks):
        limit, room = encoder.limits(task)
        if room < 1:
            instruction = encoder.instruction(task)
            what = f"the special tokens{instruction and f' and the instruction {cut(instruction)!r}'}"
            raise LoadError(
                f"{checkpoint.folder}: texts are cut at {limit} tokens, and {what} take {limit - room}: a text has none left"
            )


def _readings(checkpoint: Checkpoint, options: BuildOptions) -> CompiledCache | None:
    """Return the cache of what transformers reads; ``None`` if it is needed at each start, to run the model."""
    runtime = choose_runtime_of(checkpoint, options.runtime, options.device, options.dtype)
    is_used = options.compiled_folder is not None and runtime == "openvino" and not checkpoint.has_own_code
    return CompiledCache(options.compiled_folder).readings if is_used else None


def _build_runtimes(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> Sequence[Runtime]:
    runtime = choose_runtime_of(checkpoint, options.runtime, options.device, options.dtype)
    if runtime == "openvino":
        runtimes = _try_openvino(checkpoint, options, tokenizer)
        if runtimes:
            return runtimes
    model, mask = _load_model(checkpoint, options, options.dtype)
    if options.accumulates_in_float16:
        keep_long_sums_exact(model, model.config.hidden_size)
    reference = PaddedRuntime(model, mask)
    if runtime == "torch-packed":
        return [_try_packed(checkpoint, options, tokenizer, model, mask) or reference]
    return [reference]


def _try_packed(
    checkpoint: Checkpoint,
    options: BuildOptions,
    tokenizer: Tokenizer,
    model: PreTrainedModel,
    mask: AdapterMask | None,
) -> Runtime | None:
    """Return the packing runtime if it agrees with transformers' own code on the same weights; ``None`` otherwise."""
    from gateway.engine.model.runtimes.packed import PackedRuntime  # slow to import

    def problem() -> str:
        with ACCUMULATION.forward(in_float16=False):  # regardless of other models
            cosine = least_cosine(packed, PaddedRuntime(model, mask), checkpoint, tokenizer, is_packed=True)
        limit = MIN_COSINE[options.dtype]
        if cosine >= limit:  # it may be NaN
            return ""
        return f"packed vectors have a cosine of {cosine:.6f} to those of padded texts; the minimum is {limit}"

    try:
        packed = PackedRuntime(model, mask)
        if _should_merge(options, packed.merged_bytes):
            packed.merge()
        message = problem()
    except Exception as error:  # a card without one of the kernels may raise anything
        message = _why_not_computed(error, options.device)
    if not message:
        if options.device != "cpu":
            _tune(packed, options, problem)
        return packed
    if options.runtime == "packed":
        raise LoadError(f"{checkpoint.folder}: {message}")
    log.warning("packed_refused", folder=str(checkpoint.folder), reason=message, fallback="torch")
    return None


def _tune(packed: PackedRuntime, options: BuildOptions, problem: Callable[[], str]) -> None:
    """Enable faster kernels and graphs for a packed runtime, if it still agrees with transformers' own code.

    Args:
        problem: compares again, and returns the problem, or an empty string.
    """
    from gateway.engine.model.runtimes.tuning import tune, untune

    try:
        tune(packed, captures=not options.accumulates_in_float16)
        # A graph computes a shape only from the second time on.
        message = problem() or problem()
    except Exception as error:  # a kernel or a graph may raise anything; torch computes without them
        message = _why_not_computed(error, options.device)
    if message:
        untune(packed)
        log.warning("tuning_refused", device=options.device, reason=message)


def _why_not_computed(error: Exception, device: str) -> str:
    """Return the reason why the packed forward cannot be computed.

    Raises:
        Exception: the given error, if padded texts would fail as well.
    """
    if is_out_of_memory(error) or is_card_lost(error, device):
        raise error
    return f"the packed forward cannot be computed: {type(error).__name__}: {error}"


def _should_merge(options: BuildOptions, num_bytes: int) -> bool:
    if options.merges_adapters is not None:
        return options.merges_adapters
    return options.device != "cpu" and num_bytes <= _MERGED_SHARE * available_bytes(options.device)


def _load_model(
    checkpoint: Checkpoint, options: BuildOptions, dtype: str
) -> tuple[PreTrainedModel, AdapterMask | None]:
    from gateway.engine.model.load_model import load_model  # slow to import

    return load_model(checkpoint, options.device, dtype, trust_remote_code=options.trust_remote_code)


def _try_openvino(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> Sequence[Runtime]:
    """Compile the model, and return the result if it agrees with torch; empty otherwise.

    A model that has agreed is kept on disk and not compared again, because its key covers everything that the comparison
        depends on.
    """
    from gateway.engine.model.runtimes.openvino import OpenVinoRuntime, TracedModel  # slow to import, only for a CPU

    cache = CompiledCache(None if checkpoint.has_own_code else options.compiled_folder)
    key = _compiled_key(checkpoint, options, tokenizer)
    if (entry := cache.find(key)) is not None:
        try:
            return OpenVinoRuntime.compile(TracedModel.read(entry), options.dtype, options.threads)
        except Exception as error:  # OpenVINO and json raise many classes
            log.warning("compiled_cache_unusable", entry=str(entry), error=str(error))
    model, mask = _load_model(checkpoint, options, "float32")
    reference = PaddedRuntime(model, mask)
    rule = None if checkpoint.has_own_code else attention_rule(model.config)
    try:
        traced = TracedModel.trace(
            model, mask, rule, has_segments=tokenizer.has_segments, unattended_length=checkpoint.unattended_length
        )
        runtimes = OpenVinoRuntime.compile(traced, options.dtype, options.threads)
        cosine = least_cosine(runtimes[0], reference, checkpoint, tokenizer)
    except Exception as error:  # an architecture that cannot be traced or compiled may raise anything
        if options.runtime == "openvino":
            raise LoadError(f"{checkpoint.folder}: OpenVINO cannot run it: {error}") from error
        log.warning("openvino_failed", folder=str(checkpoint.folder), error=str(error), fallback="torch")
        return []
    if not cosine >= MIN_COSINE[options.dtype]:  # it may be NaN
        message = (
            f"OpenVINO's vectors have a cosine of {cosine:.6f} to torch's; the minimum is {MIN_COSINE[options.dtype]}"
        )
        if options.runtime == "openvino":
            raise LoadError(f"{checkpoint.folder}: {message}")
        log.warning("openvino_differs", folder=str(checkpoint.folder), reason=message, fallback="torch")
        return []
    runtimes[0].origin = weakref.ref(model)
    cache.store(key, sum(tensor.nbytes for tensor in model.parameters()), traced.save)
    return runtimes


def _compiled_key(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> str:
    """Return the key of a compiled model: a hash over everything that affects its numbers or their agreement with torch."""
    from gateway.engine.model.runtimes.openvino import describe_processor

    return key_of(
        {
            "checkpoint": checkpoint.fingerprint,
            "config": file_sha256(checkpoint.transformer / "config.json"),  # parts of it are not in the fingerprint
            "adapters": list(checkpoint.adapters),
            "dtype": options.dtype,
            "max_tokens": options.max_tokens,
            "has_segments": tokenizer.has_segments,
            "processor": describe_processor(),
            **describe_engine(),
        }
    )
