"""Nomic's published configuration in transformers' words. No torch.

`nomic-ai/nomic-embed-text-v1` and its kin were published with their own code, and with its names for the sizes.
transformers has the same model, but ignores names that it does not know and takes its defaults instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
# The values with which transformers' model computes, whatever the configuration says; an absent key agrees.
_EXPECTED: Mapping[str, tuple[Json, ...]] = {
    "activation_function": ("swiglu",),
    "causal": (False, None),
    "mlp_fc1_bias": (False, None),
    "mlp_fc2_bias": (False, None),
    "num_experts": (0, None),
    "moe_every_n_layers": (0, -1, None),
    "parallel_block": (False, None),
    "prenorm": (False, None),
    "qkv_proj_bias": (False, None),
    "rotary_emb_fraction": (1, None),
    "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "use_rms_norm": (False, None),
}


def is_nomic_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has Nomic's names."""
    return config.get("model_type") == "nomic_bert" and "n_embd" in config


def as_nomic_bert(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the same model in transformers' words.

    Positions are rotary: ``n_positions``, 8,192 as published, is a promise of the publisher's and not the size of a
    table. Up to there they are computed as the published code does without its ``rotary_scaling_factor``.

    Raises:
        LoadError: the model differs from transformers' (a mixture of experts, for example).
    """
    wrong = [
        f"{key} {config[key]!r}" for key, allowed in _EXPECTED.items() if key in config and config[key] not in allowed
    ]
    if wrong:
        raise LoadError(f"{folder}/config.json: nomic_bert with {', '.join(wrong)} is not supported")
    kept = {key: value for key, value in config.items() if key not in _NAMES}
    sizes = {new: config[old] for old, new in _NAMES.items() if config.get(old) is not None}
    theta = config.get("rotary_emb_base")
    rope: dict[str, Json] = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {**kept, **sizes, **rope}
