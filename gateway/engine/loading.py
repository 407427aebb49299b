"""Load one model of the registry: find it, read it, check that it fits, build its encoder, warm it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.batcher import Limits
from gateway.engine.card_metrics import read_cards
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.prompts import RETRIEVAL, tasks_of
from gateway.engine.checkpoint.read import Checkpoint, read_checkpoint
from gateway.engine.checkpoint.sources import locate, verify_sha256
from gateway.engine.devices import CpuThreads, available_bytes, choose_cpu_threads, choose_devices, choose_dtype
from gateway.engine.infinity import Engine, engine_args
from gateway.engine.memory import MemoryPlan, plan_memory, require_memory
from gateway.engine.model.build import BuildOptions, build_encoders, choose_runtime_of
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.model.static import place_table
from gateway.engine.reranking import choose_weights
from gateway.errors import LoadError
from gateway.golden import MIN_COSINE, GoldenCheck
from gateway.golden import read as read_golden
from gateway.precision import Ranges
from gateway.ranges import read as read_ranges
from gateway.telemetry import metrics
from gateway.types import LabelFunction, ModelInfo, ModelKind, Output, Truncate, canonical_task

# On a CPU a batch beyond some thousand tokens is no faster, only later; a GPU needs more to be busy.
MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# The longest text of the warm-up.
_WARM_UP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that is known about a model before its weights are read.

    Attributes:
        tasks: instruction of each task, by canonical name.
        instruction: put before a text that has no task.
        outputs: the outputs that are served.
        dimensions: accepted sizes of a dense vector, largest first; none for a model without one.
        ranges: of the dimensions, by size, if the registry names a file.
    """

    entry: ModelEntry
    checkpoint: Checkpoint
    outputs: tuple[Output, ...]
    devices: tuple[str, ...]
    dtype: str
    runtime: str
    max_tokens: int
    max_batch_tokens: int
    dimensions: tuple[int, ...]
    tasks: dict[str, str]
    instruction: str
    ranges: Mapping[int, Ranges]
    memory: MemoryPlan

    @property
    def device(self) -> str:
        """The first of the devices: they are of one kind."""
        return self.devices[0]

    @property
    def kind(self) -> ModelKind:
        classifier = self.checkpoint.classifier
        if classifier is None:
            return ModelKind.EMBED
        return ModelKind.RERANK if classifier.is_reranker else ModelKind.CLASSIFY

    @property
    def has_states(self) -> bool:
        """Whether a text's tokens have states, which its vector is made of."""
        return self.kind is ModelKind.EMBED and self.checkpoint.static is None and self.checkpoint.width > 0

    @property
    def info(self) -> ModelInfo:
        """The model's description for the rest of the gateway."""
        classifier = self.checkpoint.classifier if self.kind is ModelKind.CLASSIFY else None
        return ModelInfo(
            id=self.entry.id,
            source=self.entry.source,
            revision=self.entry.revision,
            fingerprint=self.checkpoint.fingerprint,
            width=self.checkpoint.width,
            dimensions=self.dimensions,
            max_tokens=self.max_tokens,
            pooling=self.checkpoint.head,
            is_normalized=self.checkpoint.is_normalized,
            device=", ".join(self.devices),
            dtype=self.dtype,
            engine=f"infinity/{self.runtime}",
            memory_bytes=self.memory.total_bytes,
            outputs=self.outputs,
            can_chunk_late=self.has_states and self.checkpoint.pooling is Pooling.MEAN and Output.DENSE in self.outputs,
            tasks=self.tasks,
            default_task=canonical_task(self.entry.default_task)
            if self.entry.default_task
            else self.checkpoint.default_task,
            instruction=self.instruction,
            has_states=self.has_states,
            token_width=self.checkpoint.token_width if Output.MULTIVECTOR in self.outputs else 0,
            max_weights=self.checkpoint.max_weights,
            rerank=choose_weights(self.entry, self.outputs) if self.kind is ModelKind.EMBED else {},
            is_mean_maxsim=self.checkpoint.colbert is None or self.checkpoint.colbert.is_mean,
            kind=self.kind,
            labels=() if classifier is None else classifier.labels,
            label_function=LabelFunction.NONE if classifier is None else classifier.function,
            ranges=self.ranges,
        )

    def as_loaded(self, engine: Engine) -> LoadPlan:
        """Return the plan with the runtime that the model has got: torch may have replaced OpenVINO or packing."""
        runtime = engine.encoders[0].runtime
        memory = plan_memory(self.checkpoint, self.dtype, runtime.name, self.max_tokens, self.max_batch_tokens)
        memory = replace(memory, weights_bytes=memory.weights_bytes + runtime.extra_bytes)
        return replace(self, runtime=runtime.name, memory=memory)

    def build_options(self, device: str, threads: CpuThreads, compiled_folder: Path | None = None) -> BuildOptions:
        """Return the options for building the encoder of one replica."""
        return BuildOptions(
            device=device,
            dtype=self.dtype,
            runtime=self.entry.runtime,
            max_tokens=self.max_tokens,
            threads=threads,
            tasks=self.tasks,
            instruction=self.instruction,
            trust_remote_code=self.entry.trust_remote_code,
            compiled_folder=compiled_folder,
            max_query_tokens=min(
                self.checkpoint.max_query_tokens, self.entry.max_tokens or self.checkpoint.position_limit
            ),
        )


def plan_load(entry: ModelEntry, *, may_download: bool = True) -> LoadPlan:
    """Find and read a model's checkpoint, and decide how it runs; no weights are loaded.

    Raises:
        LoadError: the checkpoint is missing, differs from the registry's entry, or is of a kind that is not served.
    """
    folder = locate(entry, may_download=may_download)
    verify_sha256(folder, entry.sha256)
    checkpoint = read_checkpoint(
        folder,
        trust_remote_code=entry.trust_remote_code,
        source=entry.source,
        instruction=entry.instruction,
        is_sparse=entry.outputs == (Output.SPARSE,),
    )
    if checkpoint.classifier is not None:
        _require_no_vectors(entry)
    devices, dtype, runtime, max_batch_tokens = _place(entry, checkpoint)
    max_tokens = _max_tokens(entry, checkpoint)
    tasks = _tasks(entry, checkpoint)
    outputs = _outputs(entry, checkpoint)
    choose_weights(entry, outputs)
    dimensions = _dimensions(entry, checkpoint)
    return LoadPlan(
        entry=entry,
        checkpoint=checkpoint,
        outputs=outputs,
        devices=devices,
        dtype=dtype,
        runtime=runtime,
        max_tokens=max_tokens,
        max_batch_tokens=max_batch_tokens,
        dimensions=dimensions,
        tasks=tasks,
        instruction=_instruction(checkpoint, tasks),
        ranges=read_ranges(entry.ranges, checkpoint.fingerprint, dimensions, is_normalized=checkpoint.is_normalized),
        memory=plan_memory(checkpoint, dtype, runtime, max_tokens, max_batch_tokens),
    )


def _place(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[tuple[str, ...], str, str, int]:
    """Return where and how a model runs: its devices, dtype, runtime, and the tokens of a batch."""
    if checkpoint.static is not None:
        return place_table(entry)
    devices = choose_devices(entry.device)
    dtype = choose_dtype(entry.dtype, devices[0])
    runtime = choose_runtime_of(checkpoint, entry.runtime, devices[0], dtype)
    return devices, dtype, runtime, entry.max_batch_tokens or MAX_BATCH_TOKENS[devices[0].partition(":")[0]]


def require_room(plan: LoadPlan) -> None:
    """Refuse a model that does not fit into the memory that is free now.

    Raises:
        TooLittleMemory: one of its devices has too little.
    """
    for device in plan.devices:
        require_memory(plan.memory, available_bytes(device), device)


def load_engine(plan: LoadPlan, settings: Settings, *, checks_golden: bool = True) -> Engine:
    """Load the weights, warm the model up, and return its engine, not yet started.

    Args:
        checks_golden: check the model's golden vectors, if it has any.

    Raises:
        TooLittleMemory: a device has too little memory left.
        LoadError: the weights are corrupt, or give vectors that are not finite or not the golden ones.
    """
    threads = choose_cpu_threads(settings.cpu_threads, plan.runtime)
    torch.set_num_threads(choose_cpu_threads(settings.cpu_threads, "torch").per_stream)
    _set_accumulation(plan)
    golden = None
    if checks_golden and plan.entry.golden is not None:
        vectors = read_golden(Path(plan.entry.golden), plan.checkpoint.fingerprint, plan.tasks)
        golden = GoldenCheck(plan.entry.id, vectors, MIN_COSINE[plan.dtype])
    require_room(plan)
    encoders = []
    for device in plan.devices:
        for encoder in build_encoders(plan.checkpoint, plan.build_options(device, threads, settings.compiled_folder)):
            encoder.device = device
            _warm_up(encoder, plan)
            if golden is not None:
                golden.check(encoder.embed)
            encoders.append(encoder)
    limits = Limits(plan.max_batch_tokens, settings.max_queue_texts, settings.max_queue_tokens)
    if plan.device != "cpu":
        metrics.at_scrape(read_cards)
    args = engine_args(
        plan.entry.id,
        plan.checkpoint.folder,
        plan.device,
        plan.dtype,
        revision=plan.entry.revision,
        trust_remote_code=plan.entry.trust_remote_code,
    )
    return Engine(args, encoders, limits, golden)


def load_reference(plan: LoadPlan) -> Encoder:
    """Load a model as the reference that golden vectors are recorded with: torch, float32, padded, on the first device.

    Raises:
        LoadError: the weights are corrupt.
    """
    options = plan.build_options(plan.device, choose_cpu_threads(0, "torch"))
    [encoder] = build_encoders(plan.checkpoint, replace(options, dtype="float32", runtime="reference"))
    return encoder


def _set_accumulation(plan: LoadPlan) -> None:
    if not plan.entry.fp16_accumulation:
        return
    if plan.dtype != "float16" or plan.entry.golden is None:
        raise LoadError(
            f"fp16_accumulation needs dtype float16 (this is {plan.dtype}) and golden vectors to watch over it (golden: "
            f"{plan.entry.golden or 'is not set'})"
        )
    torch.backends.cuda.matmul.allow_fp16_accumulation = True  # of the whole process


def _warm_up(encoder: Encoder, plan: LoadPlan) -> None:
    """Run the shortest batch and a large one once, so that no request pays for first-time allocations.

    A text of 32,768 tokens would take a large model minutes on a CPU.
    """
    longest = min(plan.max_tokens, _WARM_UP_TOKENS)
    texts = ["warm up", *["warm up " * longest] * max(1, plan.max_batch_tokens // longest)]
    outputs = frozenset(plan.outputs)
    for task in RETRIEVAL if plan.checkpoint.has_sides else (plan.info.default_task,):
        if plan.checkpoint.static is None:
            rows = encoder.tokenize(texts, task, Truncate.END)
            tokens = [row if len(row.ids) <= longest else replace(row, ids=row.ids[:longest]) for row in rows]
        else:  # whose tokenizer may know none of the words above
            tokens = [Tokens(list(range(plan.checkpoint.vocab_size)))] * 2
        for batch in (tokens[:1], tokens[1:]):
            try:
                encoded = encoder.encode([Item(row, task, outputs) for row in batch])
            except Exception as error:  # a configuration that makes no sense can make a model raise anything
                reason = f"{type(error).__name__}: {error}"
                raise LoadError(f"{plan.checkpoint.folder}: the model cannot be run: {reason}") from error
            for row, one in zip(batch, encoded, strict=True):
                _require_promised(one, len(row.ids), plan)


def _require_promised(encoded: Encoded, num_tokens: int, plan: LoadPlan) -> None:
    """Check the outputs of a model for one text against its description.

    Raises:
        LoadError: an output has another shape, or is not finite.
    """
    checkpoint = plan.checkpoint
    folder, width = checkpoint.folder, checkpoint.width
    if encoded.dense.shape != (1, width):
        raise LoadError(f"{folder}: the model gives {encoded.dense.shape[-1]} numbers, promised are {width}")
    found = {Output.DENSE: encoded.dense}
    if encoded.sparse is not None:
        found[Output.SPARSE] = encoded.sparse.values
    if encoded.multivector is not None:
        found[Output.MULTIVECTOR] = vectors = encoded.multivector
        # BGE-M3's rule leaves out the first token; ColBERT's those of some words.
        is_right = len(vectors) <= num_tokens if checkpoint.colbert else len(vectors) == num_tokens - 1
        if not is_right or vectors.shape[1] != checkpoint.token_width:
            raise LoadError(
                f"{folder}: the model gives {len(vectors)} vectors of {vectors.shape[1]} numbers for {num_tokens} tokens, "
                f"promised are {checkpoint.token_width}"
            )
    missing = [output for output in plan.outputs if output not in found]
    if missing:
        raise LoadError(f"{folder}: the model gives no {', '.join(missing)}")
    for output, numbers in found.items():
        if not np.isfinite(numbers).all():
            what = "vectors" if output is Output.DENSE else f"{output} vectors"
            raise LoadError(f"{folder}: the model returns {what} that are not finite in {plan.dtype}")
    if plan.kind is ModelKind.EMBED and width and not encoded.dense.any():
        raise LoadError(f"{folder}: the model returns vectors of zeros: are its weights all zero?")


def _require_no_vectors(entry: ModelEntry) -> None:
    """Refuse keys of the registry that only a model that embeds may have.

    Raises:
        LoadError: names the keys.
    """
    asked = [
        key for key in ("default_task", "prompts", "dimensions", "golden", "ranges", "rerank") if getattr(entry, key)
    ]
    asked += [] if entry.outputs == (Output.DENSE,) else ["outputs"]
    if asked:
        raise LoadError(f"{', '.join(asked)} cannot be set: this model scores texts, and gives no vectors")


def _outputs(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Output, ...]:
    """Return the outputs to serve: those of the registry; a model without a dense output has its own by default."""
    if Output.DENSE not in checkpoint.outputs:
        if named := [key for key in ("dimensions", "golden", "ranges") if getattr(entry, key)]:
            raise LoadError(
                f"{' and '.join(named)} cannot be set: this model has no dense vectors, only {', '.join(checkpoint.outputs)}"
            )
        if "outputs" not in entry.model_fields_set:
            return checkpoint.outputs
    missing = [output.value for output in entry.outputs if output not in checkpoint.outputs]
    if missing:
        raise LoadError(
            f"outputs {', '.join(missing)}: the checkpoint has no such head, only {', '.join(checkpoint.outputs)}"
        )
    return entry.outputs


def _max_tokens(entry: ModelEntry, checkpoint: Checkpoint) -> int:
    if entry.max_tokens is not None and entry.max_tokens > checkpoint.position_limit:
        raise LoadError(
            f"max_tokens is {entry.max_tokens}, but the model has positions for {checkpoint.position_limit}"
        )
    return entry.max_tokens or checkpoint.max_tokens


def _dimensions(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[int, ...]:
    too_wide = [size for size in entry.dimensions if size > checkpoint.width]
    if too_wide:
        raise LoadError(f"dimensions lists {too_wide[0]}, but the model's vectors have {checkpoint.width}")
    return tuple(sorted({checkpoint.width, *entry.dimensions} - {0}, reverse=True))


def _tasks(entry: ModelEntry, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the instruction of each task: the registry's ``prompts`` over the checkpoint's own."""
    tasks = tasks_of(checkpoint.prompts, entry.prompts, checkpoint.adapters)
    if checkpoint.has_sides:
        tasks = {**dict.fromkeys(RETRIEVAL, ""), **tasks}
        if others := [task for task in tasks if task not in RETRIEVAL]:
            raise LoadError(f"the task {others[0]!r} cannot be: this model has queries and documents only")
    if checkpoint.adapters:
        bare = [task for task in tasks if task not in checkpoint.adapters]
        if bare:  # its texts would be embedded without an adapter, in a space that no task was trained for
            raise LoadError(f"the task {bare[0]!r} has no adapter; there are: {', '.join(checkpoint.adapters)}")
    default = entry.default_task
    if default is None and checkpoint.layout is Layout.JINA_V5:
        raise LoadError(
            f"default_task must be set: Jina v5 has no vectors without a task. Choose one of {', '.join(tasks)}; "
            "text-matching treats all texts alike"
        )
    if default is not None and canonical_task(default) not in tasks:
        raise LoadError(f"default_task is {default!r}, but the model's tasks are: {', '.join(tasks) or 'none'}")
    return tasks


def _instruction(checkpoint: Checkpoint, tasks: Mapping[str, str]) -> str:
    """Return the instruction of a text without a task: the default prompt, as the registry may have changed it."""
    name = checkpoint.default_prompt
    return "" if name is None else tasks.get(canonical_task(name), "")
