"""Load one model of the registry: find it, read it, check that it fits, build its encoder, warm it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from gateway import golden as golden_vectors
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.accumulation import keep_sums_in_float32
from gateway.engine.batcher import Limits
from gateway.engine.card_metrics import show_cards
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.read import Checkpoint, read_checkpoint
from gateway.engine.checkpoint.sources import locate, verify_sha256
from gateway.engine.devices import CpuThreads, choose_cpu_threads
from gateway.engine.faults import on_card
from gateway.engine.features import read_features
from gateway.engine.infinity import Engine, engine_args
from gateway.engine.memory import MemoryPlan, plan_memory
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item, Tokens
from gateway.engine.output_check import check_outputs
from gateway.engine.placement import place, place_reference, require_room_on
from gateway.engine.reranking import choose_weights
from gateway.errors import LoadError
from gateway.precision import Ranges
from gateway.tasks import RETRIEVAL, canonical_task
from gateway.types import LabelFunction, ModelInfo, ModelKind, Output, Truncate

# The longest text of the warm-up.
_WARM_UP_TOKENS = 2048
# The longest text that is compared with the reference.
_REFERENCE_TOKENS = 2048
# Texts and their tokens in the batches that warm up a computing thread on a card.
_CARD_SHAPES = ((1, 4), (1, 16), (4, 16), (8, 32), (16, 64), (64, 64), (256, 64))
# The limit for reading the weights, copying them to a card and checking them there; a slow network drive takes minutes.
_BUILD_LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All facts about a model before its weights are read: its requested features and its placement."""

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
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The first of the devices, which are all of one kind."""
        return self.devices[0]

    @property
    def kind(self) -> ModelKind:
        classifier = self.checkpoint.classifier
        if classifier is None:
            return ModelKind.EMBED
        return ModelKind.RERANK if classifier.is_reranker else ModelKind.CLASSIFY

    @property
    def max_query_tokens(self) -> int:
        """The longest query in tokens, where queries and documents are treated differently."""
        return min(self.checkpoint.max_query_tokens, self.entry.max_tokens or self.checkpoint.position_limit)

    @property
    def has_states(self) -> bool:
        """Whether a text's tokens have states, from which its vector is made."""
        return self.kind is ModelKind.EMBED and self.checkpoint.static is None and self.checkpoint.width > 0

    @property
    def can_chunk_late(self) -> bool:
        """Whether a text's vector is the mean of its tokens' states, of which each chunk has its own."""
        is_mean = self.checkpoint.pooling is Pooling.MEAN and Output.DENSE in self.outputs
        return self.has_states and is_mean and self.checkpoint.text_template is None

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
            can_chunk_late=self.can_chunk_late,
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
            max_query_tokens=self.max_query_tokens if self.checkpoint.has_sides else None,
            kind=self.kind,
            labels=() if classifier is None else classifier.labels,
            label_function=LabelFunction.NONE if classifier is None else classifier.function,
            ranges=self.ranges,
            notes=self.notes,
        )

    def as_loaded(self, engine: Engine) -> LoadPlan:
        """Return the plan with the model's actual runtime: torch may have replaced OpenVINO or packing."""
        runtime = engine.encoders[0].runtime
        memory = plan_memory(
            self.checkpoint, self.dtype, runtime.name, self.max_tokens, self.max_batch_tokens, self.device
        )
        memory = replace(memory, weights_bytes=memory.weights_bytes + runtime.extra_bytes)
        return replace(self, runtime=runtime.name, memory=memory)

    def build_options(self, device: str, threads: CpuThreads, compiled_folder: Path | None = None) -> BuildOptions:
        """Return the options for building the encoder of one replica."""
        return BuildOptions(
            device=device,
            dtype=self.dtype,
            runtime=self.entry.runtime,
            merges_adapters=self.entry.merge_adapters,
            accumulates_in_float16=self.entry.fp16_accumulation,
            max_tokens=self.max_tokens,
            threads=threads,
            tasks=self.tasks,
            instruction=self.instruction,
            trust_remote_code=self.entry.trust_remote_code,
            compiled_folder=compiled_folder,
            max_query_tokens=self.max_query_tokens,
        )


def plan_load(entry: ModelEntry, *, may_download: bool = True, compiled_folder: Path | None = None) -> LoadPlan:
    """Find and read a model's checkpoint, and decide how it runs; no weights are loaded.

    Args:
        compiled_folder: where an earlier start may have kept what it has read; ``None`` keeps nothing.

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
        compiled_folder=compiled_folder,
    )
    features = read_features(entry, checkpoint)
    placement = place(entry, checkpoint, features.max_tokens)
    return LoadPlan(
        entry=entry,
        checkpoint=checkpoint,
        outputs=features.outputs,
        devices=placement.devices,
        dtype=placement.dtype,
        runtime=placement.runtime,
        max_tokens=features.max_tokens,
        max_batch_tokens=placement.max_batch_tokens,
        dimensions=features.dimensions,
        tasks=features.tasks,
        instruction=features.instruction,
        ranges=features.ranges,
        memory=placement.memory,
        notes=placement.notes,
    )


def require_room(plan: LoadPlan) -> None:
    """Refuse a model that does not fit into the memory that is free now.

    Raises:
        TooLittleMemory: a device has too little memory.
    """
    require_room_on(plan.devices, plan.memory)


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
    require_golden(plan)
    golden = None
    if checks_golden and plan.entry.golden is not None:
        vectors = golden_vectors.read(Path(plan.entry.golden), plan.checkpoint.fingerprint, plan.tasks)
        golden = golden_vectors.GoldenCheck(plan.entry.id, vectors, golden_vectors.MIN_COSINE[plan.dtype])
    require_room(plan)
    if plan.device != "cpu":
        keep_sums_in_float32()
        show_cards()
    encoders: list[Encoder] = []
    warm_ups: list[Sequence[list[Item]]] = []
    for device in plan.devices:
        options = plan.build_options(device, threads, settings.compiled_folder)
        built = on_card(device, _BUILD_LIMIT_S, partial(build_encoders, plan.checkpoint, options))
        for encoder in built:
            encoder.device = device
        for encoder in built:
            _prepare(encoder, plan, golden, settings.forward_timeout_s)
        encoders += built
        warm_ups += [() if device == "cpu" else _card_batches(encoder, plan) for encoder in built]
    limits = Limits(plan.max_batch_tokens, settings.max_queue_texts, settings.max_queue_tokens)
    args = engine_args(
        plan.entry.id,
        plan.checkpoint.folder,
        plan.device,
        plan.dtype,
        revision=plan.entry.revision,
        trust_remote_code=plan.entry.trust_remote_code,
    )
    return Engine(args, encoders, limits, golden, warm_ups)


def load_reference(plan: LoadPlan) -> Encoder:
    """Load a model as the reference for its vectors: torch, float32, padded.

    It is on the model's first device, or on the CPU if that device has too little memory left for float32.

    Raises:
        TooLittleMemory: the CPU has too little memory as well.
        LoadError: the weights are corrupt.
    """
    device = place_reference(plan.checkpoint, plan.device, min(plan.max_tokens, _REFERENCE_TOKENS))
    options = plan.build_options(device, choose_cpu_threads(0, "torch"))
    options = replace(options, dtype="float32", runtime="reference", accumulates_in_float16=False)
    [encoder] = build_encoders(plan.checkpoint, options)
    return encoder


def require_golden(plan: LoadPlan) -> None:
    """Refuse float16 accumulation for other dtypes, or without golden vectors that check it."""
    if plan.entry.fp16_accumulation and (plan.dtype != "float16" or plan.entry.golden is None):
        raise LoadError(
            f"fp16_accumulation needs dtype float16 (this is {plan.dtype}) and golden vectors to check it (golden: "
            f"{plan.entry.golden or 'is not set'})"
        )


def _prepare(encoder: Encoder, plan: LoadPlan, golden: golden_vectors.GoldenCheck | None, limit_s: float) -> None:
    """Warm an encoder up, and compare its vectors with the golden vectors.

    Args:
        limit_s: the time limit for each of the two on a card.
    """
    on_card(encoder.device, limit_s, partial(_warm_up, encoder, plan))
    if golden is not None:
        on_card(encoder.device, limit_s, partial(golden.check, encoder.embed))


def _warm_up(encoder: Encoder, plan: LoadPlan) -> None:
    """Run a minimal and a large batch once, so that no request pays for first-time allocations.

    A text of 32,768 tokens would take a large model minutes on a CPU.
    """
    longest = min(plan.max_tokens, _WARM_UP_TOKENS)
    texts = ["warm up", *["warm up " * longest] * max(1, plan.max_batch_tokens // longest)]
    outputs = frozenset(plan.outputs)
    for task in RETRIEVAL if plan.checkpoint.has_sides else (plan.info.default_task,):
        if plan.checkpoint.static is None:
            rows = encoder.tokenize(texts, task, Truncate.END)
            tokens = [row if len(row.ids) <= longest else replace(row, ids=row.ids[:longest]) for row in rows]
        else:  # its tokenizer may not know the words above
            tokens = [Tokens(list(range(plan.checkpoint.vocab_size)))] * 2
        for batch in (tokens[:1], tokens[1:]):
            try:
                encoded = encoder.encode([Item(row, task, outputs) for row in batch])
            except Exception as error:  # a configuration that makes no sense can make a model raise anything
                reason = f"{type(error).__name__}: {error}"
                raise LoadError(f"{plan.checkpoint.folder}: the model cannot be run: {reason}") from error
            for row, result in zip(batch, encoded, strict=True):
                check_outputs(result, len(row.ids), plan.checkpoint, plan.outputs, plan.dtype)


def _card_batches(encoder: Encoder, plan: LoadPlan) -> list[list[Item]]:
    """Return batches of several sizes, for the computing thread to run before its first request.

    cuBLAS keeps its handle and its workspace per thread, chooses a kernel by the number of rows, and loads each kernel on
    first use. Without a warm-up, a request would wait tens of milliseconds for that.
    """
    [long] = encoder.tokenize(["warm up " * _WARM_UP_TOKENS], plan.info.default_task, Truncate.END)
    outputs = frozenset(plan.outputs)
    batches = []
    for num_texts, length in _CARD_SHAPES:
        row = replace(long, ids=long.ids[:length])
        if num_texts * length <= plan.max_batch_tokens:
            batches.append([Item(row, plan.info.default_task, outputs)] * num_texts)
    return batches
