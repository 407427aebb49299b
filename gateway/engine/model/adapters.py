"""Low-rank adapters of all tasks at once, chosen per token.

A checkpoint such as Jina v3 has one LoRA adapter (Hu et al., 2021) for each task: next to a weight W, a pair A (r, in) and
B (out, r), and ``y = x W' + s (x A') B'``. Here the pairs of all k tasks are stacked into A (k r, in) and B (out, k r).
A mask (tokens, k r) keeps the r columns of each token's task between the two products::

    y = x W' + ((x A') * mask) B'

So a batch with any mix of tasks is one forward, at the cost of 2 k r more columns (20 in addition to 1,024 in Jina v3). A
mask of zeros gives the model without an adapter. PEFT computes the same with a loop over the tasks of a batch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from gateway.errors import LoadError

_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# Options of PEFT that compute something other than the formula above.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "layers_to_transform",
)
# Initializations that also change the base weights, which then differ from the checkpoint's.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterMask(nn.Module):
    """The mask of the running forward, shared by all adapted layers; only one forward may run at a time.

    The packed forward (:mod:`.runtimes.network`) takes its adapters as an argument instead.

    Args:
        ranks: rank of each adapter, in the order of their indices.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.value = torch.empty(0)
        table = torch.zeros(len(ranks) + 1, sum(ranks))  # the last row, which -1 selects, means no adapter
        for index, part in enumerate(self.parts()):
            table[index, part] = 1
        self.table = nn.Buffer(table, persistent=False)

    def rows(self, adapters: Sequence[int]) -> torch.Tensor:
        """Return the mask of each adapter index, ``(b, sum of ranks)``; -1 means no adapter."""
        return self.table[torch.tensor(adapters, device=self.table.device)]

    def parts(self) -> list[slice]:
        """Return the position of each adapter among the stacked ranks."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]


class AdaptedLinear(nn.Module):
    """A linear layer with the stacked adapters of all tasks."""

    def __init__(self, base: nn.Linear, mask: AdapterMask, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(down.to(base.weight.dtype), requires_grad=False)
        self.up = nn.Parameter(up.to(base.weight.dtype), requires_grad=False)
        self._mask = [mask]  # in a list, so that it is not a submodule of each layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = functional.linear(x, self.down) * self._mask[0].value
        return functional.linear(x, self.weight, self.bias) + functional.linear(low, self.up)


class AdaptedEmbedding(nn.Module):
    """An embedding table with the stacked adapters of all tasks: row ``id`` is ``W[id] + (A[id] * mask) B'``."""

    def __init__(self, base: nn.Embedding, mask: AdapterMask, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.weight = base.weight
        self.down = nn.Parameter(down.t().contiguous().to(base.weight.dtype), requires_grad=False)
        self.up = nn.Parameter(up.to(base.weight.dtype), requires_grad=False)
        self._mask = [mask]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        low = functional.embedding(ids, self.down) * self._mask[0].value
        return functional.embedding(ids, self.weight) + functional.linear(low, self.up)


@dataclass(frozen=True, slots=True)
class _Adapter:
    rank: int
    scaling: float
    tensors: Mapping[str, torch.Tensor]


def install_adapters(model: nn.Module, folders: Sequence[Path]) -> AdapterMask:
    """Replace the adapted layers of ``model`` with layers that hold the adapters of all ``folders``.

    Returns:
        The mask to set before each forward; an adapter's index is the position of its folder.

    Raises:
        LoadError: a folder holds no LoRA adapter of this model.
    """
    adapters = [_read(folder) for folder in folders]
    mask = AdapterMask([adapter.rank for adapter in adapters])
    names = sorted({_layer(key) for adapter in adapters for key in adapter.tensors})
    for name in names:
        try:
            parent_name, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            base = getattr(parent, leaf)
        except AttributeError as error:
            if name.startswith("pooler."):  # not part of an embedding
                continue
            raise LoadError(f"{folders[0].parent}: an adapter is for {name}, which the model does not have") from error
        match base:
            case nn.Embedding():
                setattr(parent, leaf, AdaptedEmbedding(base, mask, *_stack(adapters, name, base, is_table=True)))
            case nn.Linear():
                setattr(parent, leaf, AdaptedLinear(base, mask, *_stack(adapters, name, base, is_table=False)))
            case _:
                raise LoadError(f"{folders[0].parent}: an adapter is for {name}, which is a {type(base).__name__}")
    return mask


def _read(folder: Path) -> _Adapter:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LoadError(f"{folder}: not a LoRA adapter that can be read: {error}") from error
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights")).lower() in _CHANGE_THE_BASE:
        unsupported.append("init_lora_weights")
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("peft_type") != "LORA" or unsupported:
        raise LoadError(
            f"{folder}: only plain LoRA adapters are supported, not {unsupported or config.get('peft_type')}"
        )
    strange = sorted(key for key in tensors if not key.endswith(_SUFFIXES))
    if strange:
        raise LoadError(f"{folder}: holds {strange[0]}, which is not part of a plain LoRA adapter")
    tensors = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    if unused := sorted(key for key in tensors if not _is_target(_layer(key), config.get("target_modules"))):
        raise LoadError(
            f"{folder}: holds {unused[0]}, which the adapter's target_modules do not name, so that PEFT would leave it out: "
            f"{config.get('target_modules')!r}"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Adapter(rank, scaling, tensors)


def _is_target(layer: str, targets: object) -> bool:
    """Return whether PEFT adapts a layer: by the end of its name, or by a pattern for the whole name."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, layer) is not None
    return isinstance(targets, list) and any(layer == target or layer.endswith(f".{target}") for target in targets)


def _layer(key: str) -> str:
    return key.partition(".lora_")[0]


def _stack(
    adapters: Sequence[_Adapter], name: str, base: nn.Linear | nn.Embedding, *, is_table: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack the adapters of one layer: A ``(sum of ranks, in)``, B ``(out, sum of ranks)`` with the scaling in it.

    An adapter without this layer leaves zeros, which change nothing.
    """
    num_out, num_in = base.weight.shape[::-1] if is_table else base.weight.shape
    downs, ups = [], []
    for adapter in adapters:
        down_key, up_key = (
            (f"{name}.lora_embedding_A", f"{name}.lora_embedding_B")
            if is_table
            else (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        )
        down, up = adapter.tensors.get(down_key), adapter.tensors.get(up_key)
        if down is None and up is None:
            down, up = torch.zeros(adapter.rank, num_in), torch.zeros(num_out, adapter.rank)
        if down is None or up is None:
            raise LoadError(f"{name}: an adapter has only one of {down_key} and {up_key}")
        if down.shape != (adapter.rank, num_in) or up.shape != (num_out, adapter.rank):
            raise LoadError(
                f"{name}: an adapter of shapes {tuple(down.shape)}, {tuple(up.shape)} does not fit a layer of "
                f"{num_in} inputs and {num_out} outputs"
            )
        downs.append(down.float())
        ups.append(up.float() * adapter.scaling)
    return torch.cat(downs), torch.cat(ups, dim=1)
