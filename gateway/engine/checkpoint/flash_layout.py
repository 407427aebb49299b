"""Jina's layout of XLM-RoBERTa ("flash implementation"), read as transformers' own XLM-RoBERTa. Does not import torch.

`jinaai/jina-reranker-v2-base-multilingual` is published with its own code, which names the tensors as the flash-attn
package does, and keeps query, key and value in one tensor. With absolute positions, the mathematics is that of XLM-RoBERTa.
Under transformers' names, the weights give the same numbers, and no code of the checkpoint has to run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

_CONFIG_CLASS = "XLMRobertaFlashConfig"
# Settings that would make it a different model, with their required values.
_EXPECTED = {"position_embedding_type": "absolute", "hidden_act": "gelu"}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


class _Splittable(Protocol):
    def chunk(self: T, chunks: int) -> tuple[T, ...]: ...


T = TypeVar("T", bound=_Splittable)


def is_flash_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has this layout: Jina's class, and no ``model_type``."""
    classes = config.get("auto_map")
    name = classes.get("AutoConfig") if isinstance(classes, dict) else None
    return "model_type" not in config and isinstance(name, str) and name.endswith(f".{_CONFIG_CLASS}")


def as_xlm_roberta(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the same model in transformers' words.

    Raises:
        LoadError: the model is not XLM-RoBERTa: it has rotary positions, adapters, or another activation.
    """
    wrong = [
        f"{key} {config.get(key)!r} (not {value!r})" for key, value in _EXPECTED.items() if config.get(key) != value
    ]
    wrong += [f"{key} {config[key]!r}" for key in ("lora_adaptations", "emb_pooler") if config.get(key)]
    if wrong:
        same = ". Jina v3 is supported as jinaai/jina-embeddings-v3-hf, the same model in transformers' form"
        raise LoadError(
            f"{folder}/config.json: {_CONFIG_CLASS} with {', '.join(wrong)} is not supported"
            + (same if config.get("lora_adaptations") else "")
        )
    return {**{key: value for key, value in config.items() if key != "auto_map"}, "model_type": "xlm-roberta"}


def rename_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the transformer's tensors under transformers' names; those of heads, and unknown ones, keep theirs.

    Args:
        tensors: tensors by name; the attention tensor holds query, key and value along the first dimension.
    """
    return {
        new: tensor for name, given in tensors.items() for new, tensor in _rename(name.removeprefix("roberta."), given)
    }


def _rename(name: str, tensor: T) -> Iterator[tuple[str, T]]:
    kind = name.rpartition(".")[2]
    if name in ("emb_ln.weight", "emb_ln.bias"):
        yield f"embeddings.LayerNorm.{kind}", tensor
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    layer, part = f"encoder.layer.{match[1]}", match[2]
    if part == "mixer.Wqkv":
        for role, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            yield f"{layer}.attention.self.{role}.{kind}", piece
    else:
        yield f"{layer}.{_PARTS.get(part, part)}.{kind}", tensor
