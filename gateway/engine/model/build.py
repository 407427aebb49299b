"""Build the encoder of a checkpoint: tokenizer, model, adapters, heads, and the fastest runtime that agrees with torch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch
from torch.nn import functional

from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sources import file_sha256
from gateway.engine.devices import CpuThreads
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.build_heads import build_heads, build_query_table
from gateway.engine.model.compiled_cache import CompiledCache, key_of
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.load_tokenizer import Tokenizers, load_tokenizers
from gateway.engine.model.runtimes.attention import attention_rule
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES, Runtime
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.engine.model.splade import QueryTableEncoder
from gateway.engine.model.static import load_table
from gateway.engine.model.tokenizer import Tokenizer
from gateway.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = structlog.get_logger(__name__)

# Cosine to torch's float32 that a compiled model must keep on every text, by the precision it computes in.
_MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.999}
# Tokens of the texts it is measured on, forward by forward: in one row if they can share it, in two, and a text alone.
_SAMPLE_LENGTHS = ((60, 24, 7, 2), (300, 40, 30, 20), (17,))


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options for building an encoder.

    Attributes:
        device: torch device, such as ``cpu`` or ``cuda:0``.
        dtype: name of the torch dtype to compute in.
        runtime: ``auto``, ``torch``, ``openvino``; or, whatever the device, ``reference`` (torch, padded) or ``packed``.
        max_tokens: the longest text; at most the checkpoint's own limit.
        max_query_tokens: the longest query, where queries and documents are treated differently.
        threads: how a model on the CPU uses its cores.
        tasks: instruction of each task.
        instruction: put before a text that has no task.
        trust_remote_code: let the checkpoint bring Python code that then runs in this process.
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


def build_encoders(checkpoint: Checkpoint, options: BuildOptions) -> list[Encoder]:
    """Load a checkpoint once, and return an encoder for each stream that the runtime has; they share all weights.

    Raises:
        LoadError: the checkpoint is corrupt, incomplete, or not what its configuration says.
    """
    runtimes: Sequence[Runtime]
    if checkpoint.static is not None:
        tokenizer, static = load_table(checkpoint, options.max_tokens)
        tokenizers, runtimes = Tokenizers(tokenizer), [static]
    else:
        limits, may_run = (options.max_tokens, options.max_query_tokens), options.trust_remote_code
        tokenizers = load_tokenizers(checkpoint, *limits, trust_remote_code=may_run)
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
        encoders.append(encoder)
    return encoders


def choose_runtime(setting: str, device: str, model_type: str) -> str:
    """Return the runtime of a setting of :class:`BuildOptions`: ``openvino``, ``torch`` or ``torch-packed``.

    ``auto`` is OpenVINO on a CPU, where it is installed, and elsewhere torch, packed where the architecture allows it.

    Raises:
        LoadError: OpenVINO is asked for and is not installed, or not on a CPU.
    """
    if setting == "reference":
        return "torch"
    if setting == "packed":
        return "torch-packed"
    if setting == "openvino" and device != "cpu":
        raise LoadError(f"runtime openvino is for the CPU, and this model runs on {device}; use runtime: torch or auto")
    is_installed = find_spec("openvino") is not None
    if setting == "openvino" and not is_installed:
        raise LoadError("runtime openvino: the package openvino is not installed; use runtime: torch or auto")
    if device != "cpu":
        return "torch-packed" if model_type in PACKED_MODEL_TYPES else "torch"
    return "openvino" if is_installed and setting in ("auto", "openvino") else "torch"


def _build_runtimes(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> Sequence[Runtime]:
    runtime = choose_runtime(options.runtime, options.device, checkpoint.model_type)
    if runtime == "openvino":
        runtimes = _try_openvino(checkpoint, options, tokenizer)
        if runtimes:
            return runtimes
    model, mask = _load_model(checkpoint, options, options.dtype)
    obstacle = _why_not_packed(checkpoint, model)
    if options.runtime == "packed" and obstacle:
        raise LoadError(f"{checkpoint.folder}: {obstacle} cannot be packed")
    if runtime != "torch-packed" or obstacle:
        return [PaddedRuntime(model, mask)]
    from gateway.engine.model.runtimes.packed import PackedRuntime  # slow to import

    return [PackedRuntime(model, mask)]


def _load_model(
    checkpoint: Checkpoint, options: BuildOptions, dtype: str
) -> tuple[PreTrainedModel, AdapterMask | None]:
    from gateway.engine.model.load_model import load_model  # slow to import

    return load_model(checkpoint, options.device, dtype, trust_remote_code=options.trust_remote_code)


def _why_not_packed(checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    """Return the obstacle to computing texts in one packed row; empty without one."""
    if checkpoint.model_type not in PACKED_MODEL_TYPES:
        return f"model_type {checkpoint.model_type!r}"
    if checkpoint.has_own_code:  # its attention may not be the one that keeps to a text
        return f"{type(model).__name__}, which is the checkpoint's own code,"
    return "one-way attention (is_decoder: true)" if getattr(model.config, "is_decoder", False) else ""


def _try_openvino(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> Sequence[Runtime]:
    """Compile the model, and keep the result only if it agrees with torch; nothing otherwise.

    A model that has agreed is kept on disk, and is not compared again: nothing that the comparison depends on may differ.
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
        traced = TracedModel.trace(model, mask, rule, has_segments=tokenizer.has_segments)
        runtimes = OpenVinoRuntime.compile(traced, options.dtype, options.threads)
        cosine = _agreement(runtimes[0], reference, checkpoint, tokenizer)
    except Exception as error:  # an architecture that cannot be traced or compiled may raise anything
        if options.runtime == "openvino":
            raise LoadError(f"{checkpoint.folder}: OpenVINO cannot run it: {error}") from error
        log.warning("openvino_failed", folder=str(checkpoint.folder), error=str(error), fallback="torch")
        return []
    if not cosine >= _MIN_COSINE[options.dtype]:  # it may be NaN
        message = (
            f"OpenVINO's vectors have a cosine of {cosine:.6f} to torch's, the least is {_MIN_COSINE[options.dtype]}"
        )
        if options.runtime == "openvino":
            raise LoadError(f"{checkpoint.folder}: {message}")
        log.warning("openvino_differs", folder=str(checkpoint.folder), reason=message, fallback="torch")
        return []
    runtimes[0].origin = weakref.ref(model)
    cache.store(key, sum(tensor.nbytes for tensor in model.parameters()), traced.save)
    return runtimes


def _compiled_key(checkpoint: Checkpoint, options: BuildOptions, tokenizer: Tokenizer) -> str:
    """Return the key of a compiled model: a hash over all that its numbers, and their agreement with torch, depend on."""
    from gateway.engine.model.runtimes.openvino import describe_processor

    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return key_of(
        {
            "checkpoint": checkpoint.fingerprint,
            "config": file_sha256(checkpoint.transformer / "config.json"),  # parts of it are not in the fingerprint
            "adapters": list(checkpoint.adapters),
            "dtype": options.dtype,
            "max_tokens": options.max_tokens,
            "has_segments": tokenizer.has_segments,
            "processor": describe_processor(),
            "versions": [version(package) for package in ("torch", "transformers")],
            "engine": [file_sha256(source) for source in sources],
        }
    )


@torch.inference_mode()
def _agreement(runtime: Runtime, reference: Runtime, checkpoint: Checkpoint, tokenizer: Tokenizer) -> float:
    """Return the smallest cosine between two runtimes, over texts of several lengths in several forwards; NaN is possible.

    One text reaches beyond the window of attention that some architectures have: what is traced with a short text may
    go wrong there.
    """
    ids = tokenizer.sample_ids()
    adapter = cycle(range(-1, len(checkpoint.adapter_folders)))
    cosines = []
    for batch in _SAMPLE_LENGTHS:
        lengths = [min(length, tokenizer.max_tokens) for length in batch]
        rows = [(ids * length)[:length] for length in lengths]
        adapters = [next(adapter) for _ in rows]
        seconds = [length // 2 if tokenizer.has_segments else None for length in lengths]
        ours, theirs = (
            one.forward(one.prepare(rows, adapters, seconds)).pool(checkpoint.pooling) for one in (runtime, reference)
        )
        cosines.append(functional.cosine_similarity(ours, theirs))
    return float(torch.cat(cosines).min())
