"""Jina v3 and BGE-M3 at full size with random weights: as fast as the real ones, and nothing to download."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel, JinaEmbeddingsV3Config, PreTrainedConfig, PreTrainedModel, XLMRobertaConfig

from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.model.adapters import AdapterMask, install_adapters
from gateway.engine.model.choose import has_attention_kernel
from gateway.engine.model.heads import MultiVectorHead, SparseHead
from gateway.engine.model.in_flight import start_copy
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.runtimes.packed import PackedRuntime
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.engine.model.runtimes.tuning import tune
from gateway.engine.model.states import TokenStates

NUM_TASKS = 5
RANK, ALPHA = 4, 1

# What sentence-transformers takes by default.
_BATCH_TEXTS = 32
# A batch of 32 of the longest texts does not fit most cards; and is not used in practice.
_MOST_PADDED_TOKENS = 65_536

T = TypeVar("T")
Rows = Sequence[Sequence[int]]
Adapter = Mapping[str, torch.Tensor]
"""The tensors of a LoRA adapter by PEFT's names."""


def jina_v3_config(*, is_tiny: bool) -> PreTrainedConfig:
    """Return transformers' defaults, which are the released model's; or the same in small."""
    if not is_tiny:
        return JinaEmbeddingsV3Config()
    return JinaEmbeddingsV3Config(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )


def bge_m3_config(*, is_tiny: bool) -> PreTrainedConfig:
    """Return the shape of XLM-RoBERTa-large with 8,194 positions; or the same in small."""
    small = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    large = {"vocab_size": 250_002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes: dict[str, Any] = small if is_tiny else large
    return XLMRobertaConfig(
        **sizes,
        intermediate_size=64 if is_tiny else 4096,
        max_position_embeddings=8194,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-5,
    )


def build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights, the same each time."""
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModel.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config),  # the model changes it, and so its attention
            dtype=dtype,
            attn_implementation="sdpa",
        )
    made.pooler = None  # no embedding uses it
    model: PreTrainedModel = made.eval().requires_grad_(False)
    return model


def linear_params(model: nn.Module) -> int:
    """Return the weights that every token is multiplied with."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def flops(config: PreTrainedConfig, num_weights: int, rows: Rows) -> float:
    """Return the operations that the texts need: two a weight and token, and attention's two products."""
    width, depth = int(config.hidden_size), int(config.num_hidden_layers)
    lengths = [len(row) for row in rows]
    attention = 4 * width * depth * sum(n * n for n in lengths)
    return 2.0 * num_weights * sum(lengths) + attention


# ---------------------------------------------------------------------------------------------------------- adapters


def make_adapters(model: nn.Module) -> list[Adapter]:
    """Make an adapter for each task, on every linear layer and embedding table that has one in Jina v3."""
    generator = torch.Generator().manual_seed(1)
    return [_make_adapter(model, generator) for _ in range(NUM_TASKS)]


def _make_adapter(model: nn.Module, generator: torch.Generator) -> Adapter:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            tensors[f"{name}.lora_A.weight"] = random(RANK, layer.in_features)
            tensors[f"{name}.lora_B.weight"] = random(layer.out_features, RANK)
        elif isinstance(layer, nn.Embedding):
            tensors[f"{name}.lora_embedding_A"] = random(RANK, layer.num_embeddings)
            tensors[f"{name}.lora_embedding_B"] = random(layer.embedding_dim, RANK)
    return tensors


def save_adapters(adapters: Sequence[Adapter], folder: Path) -> list[Path]:
    """Write adapters as PEFT does, and return their folders."""
    folders = [folder / f"task-{i}" for i in range(len(adapters))]
    for path, adapter in zip(folders, adapters, strict=True):
        path.mkdir()
        save_file(
            {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}, path / "adapter_model.safetensors"
        )
        targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return folders


def add_adapters(model: PreTrainedModel) -> AdapterMask:
    """Give a model on the CPU an adapter for each task."""
    with tempfile.TemporaryDirectory() as folder:
        return install_adapters(model, save_adapters(make_adapters(model), Path(folder)))


def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to the weights: one task, without extra arithmetic."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            change = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        elif isinstance(layer, nn.Embedding):
            change = (adapter[f"{name}.lora_embedding_B"] @ adapter[f"{name}.lora_embedding_A"]).t()
        else:
            continue
        layer.weight += (change * (ALPHA / RANK)).to(layer.weight)


# ---------------------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True, slots=True)
class RuntimeEncoder:
    """The gateway's own runtime and heads, given batches of bounded size."""

    runtime: Runtime
    max_batch_tokens: int
    sparse: SparseHead
    multivector: MultiVectorHead

    def encode(self, rows: Rows, adapters: Sequence[int]) -> torch.Tensor:
        """Return the mean-pooled vectors, ``(n, width)`` float32 on the CPU."""
        return torch.cat(list(_one_ahead(self._begin(rows, adapters, part) for part in self._batches(rows))))

    def _begin(self, rows: Rows, adapters: Sequence[int], part: slice) -> Callable[[], torch.Tensor]:
        """Launch a batch, and return a function that returns its vectors when the device is done."""
        lengths = [len(row) for row in rows[part]]
        places: list[int] = []
        copies = []
        for group in self.runtime.groups(lengths, adapters[part]):
            texts = [part.start + i for i in group]
            states = self._states([rows[i] for i in texts], [adapters[i] for i in texts])
            copies.append(start_copy(states.pool(Pooling.MEAN).float()))
            places += list(group)
        order = np.argsort(places)
        done = _mark(self.device)
        return lambda: torch.from_numpy(np.concatenate([copy() for copy in copies if done()])[order])

    def read(self, rows: Rows, outputs: Sequence[str]) -> int:
        """Compute the dense vectors and other outputs of texts without a task; return how many numbers those have."""
        return sum(_one_ahead(self._begin_outputs(rows[part], outputs) for part in self._batches(rows)))

    def _begin_outputs(self, rows: Rows, outputs: Sequence[str]) -> Callable[[], int]:
        states = self._states(rows, [-1] * len(rows))
        vectors = start_copy(states.pool(Pooling.CLS))
        items = [Item(Tokens(list(row))) for row in rows]
        everywhere = range(len(items))
        sparse = self.sparse.begin(states, items, everywhere) if "sparse" in outputs else list
        multivector = self.multivector.begin(states, items, everywhere) if "multivector" in outputs else list
        done = _mark(self.device)

        def read() -> int:
            done()
            weights = sum(len(one.values) for one in sparse())
            return vectors().size + weights + sum(one.size for one in multivector())

        return read

    @property
    def device(self) -> torch.device:
        return next(self.sparse.parameters()).device

    def _states(self, rows: Rows, adapters: Sequence[int]) -> TokenStates:
        return self.runtime.forward(self.runtime.prepare(rows, adapters))

    def _batches(self, rows: Rows) -> Iterator[slice]:
        first = 0
        for count in batch_counts([len(row) for row in rows], self.max_batch_tokens):
            yield slice(first, first + count)
            first += count


def _one_ahead(launches: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the result of each launch, after the launch that follows it: as a computing thread of the gateway works."""
    running = next(launches, None)
    while running is not None:
        following = next(launches, None)
        yield running()
        running = following


def _mark(device: torch.device) -> Callable[[], bool]:
    """Return a function that waits for everything that was launched on a device so far."""
    if device.type != "cuda":
        return lambda: True
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> bool:
        event.synchronize()
        return True

    return wait


def gateway_encoder(
    model: PreTrainedModel, adapter_folders: Sequence[Path], max_batch_tokens: int, *, merges: bool = False
) -> RuntimeEncoder:
    """Put a model into the runtime that the gateway would choose for it, with adapters if there are any, and heads.

    Args:
        merges: make weights for each adapter.
    """
    mask = None
    if adapter_folders:
        mask = install_adapters(model, adapter_folders)
        mask.to(model.device)
        nn.Module.to(model, model.device)  # the adapters are made on the CPU
    dtype = str(model.dtype).removeprefix("torch.")
    runtime: Runtime = PaddedRuntime(model, mask)
    # On a CPU the packed runtime has a path for tests.
    if model.device.type == "cpu" or has_attention_kernel(str(model.device), dtype):
        runtime = packed = PackedRuntime(model, mask)
        if merges:
            packed.merge()
        if model.device.type == "cuda":
            tune(packed, captures=True)
    width = int(model.config.hidden_size)
    with tempfile.TemporaryDirectory() as folder:
        for name, num_out in (("sparse", 1), ("multivector", width)):
            torch.save(nn.Linear(width, num_out).state_dict(), Path(folder) / name)
        sparse = SparseHead(Path(folder) / "sparse", width, frozenset({0, 1, 2, 3}))
        multivector = MultiVectorHead(Path(folder) / "multivector", width)
    return RuntimeEncoder(runtime, max_batch_tokens, sparse.to(model.device), multivector.to(model.device))


@dataclass(frozen=True, slots=True)
class PaddedEncoder:
    """What sentence-transformers does: sort by length, batches of 32, pad, and mask.

    Attributes:
        max_batch_tokens: fill batches up to so many tokens, instead of 32 texts.
    """

    model: PreTrainedModel
    max_batch_tokens: int | None = None

    def encode(self, rows: Rows, adapters: Sequence[int] = ()) -> torch.Tensor:
        """Return the mean-pooled vectors, ``(n, width)`` float32 on the CPU."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = torch.empty(len(rows), self.model.config.hidden_size)
        first = 0
        while first < len(order):
            longest = len(rows[order[first]])
            count = min(_BATCH_TEXTS, max(1, _MOST_PADDED_TOKENS // longest))
            if self.max_batch_tokens is not None:
                count = max(1, self.max_batch_tokens // longest)
            part = order[first : first + count]
            vectors[part] = self._encode_batch([rows[i] for i in part])
            first += len(part)
        return vectors

    def _encode_batch(self, rows: Rows) -> torch.Tensor:
        device = self.model.device
        longest = max(len(row) for row in rows)
        pad_id = self.model.config.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows]).to(device)
        mask = (torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]).long().to(device)
        states: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return ((states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1)[:, None]).cpu()


def batch_counts(lengths: Sequence[int], max_batch_tokens: int) -> list[int]:
    """Return how many texts go into each batch, in order, if a batch has at most this many tokens."""
    counts: list[int] = []
    total = 0
    for length in lengths:
        if counts and total + length <= max_batch_tokens:
            counts[-1] += 1
            total += length
        else:
            counts.append(1)
            total = length
    return counts


def mixed_lengths(num_tokens: int, longest: int) -> list[int]:
    """Return lengths as texts have them, most short and a few very long: log-normal, 60 tokens in the middle."""
    source = random.Random(0)  # noqa: S311
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(max(4, min(longest, round(source.lognormvariate(math.log(60), 1.2)))))
    return lengths


def min_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the smallest cosine between rows of the same place."""
    return float(functional.cosine_similarity(ours, theirs).min())
