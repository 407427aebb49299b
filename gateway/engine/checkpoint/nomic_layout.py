"""Nomic's published configuration in transformers' terms. Does not import torch.

`nomic-ai/nomic-embed-text-v1` and related models were published with their own code, and with its names for the sizes.
transformers has the same model, but silently replaces unknown names with its defaults. The mixture of experts,
`nomic-ai/nomic-embed-text-v2-moe`, has the same names. Its layers are in `gateway.engine.model.nomic_moe`.
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
# The values that the model assumes regardless of the configuration; a missing key is fine. A `rotary_scaling_factor`
# would make positions depend on the longest text of a batch (dynamic NTK).
_EXPECTED: Mapping[str, tuple[Json, ...]] = {
    "causal": (False, None),
    "norm_mlp": (False, None),
    "parallel_block": (False, None),
    "prenorm": (False, None),
    "rotary_emb_fraction": (1, None),
    "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "use_rms_norm": (False, None),
}
_DENSE: Mapping[str, tuple[Json, ...]] = {
    "activation_function": ("swiglu",),
    "mlp_fc1_bias": (False, None),
    "mlp_fc2_bias": (False, None),
    "num_experts": (0, None),
    "moe_every_n_layers": (0, -1, None),
    "qkv_proj_bias": (False, None),
}
_MIXTURE: Mapping[str, tuple[Json, ...]] = {
    "activation_function": ("gelu",),
    "expert_choice_router": (False, None),
    "ffn_div": (1, None),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "moe_normalize_expert_weights": (False, None),
    "num_shared_experts": (0, None),
    "qkv_proj_bias": (True,),
}


def is_nomic_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has Nomic's names."""
    return config.get("model_type") == "nomic_bert" and "n_embd" in config


def is_nomic_mixture(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has Nomic's names, for a mixture of experts."""
    return is_nomic_layout(config) and bool(config.get("num_experts"))


def as_nomic_bert(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the same model in transformers' words.

    Positions are rotary: ``n_positions`` (8,192 as published) is the publisher's promise, not the size of a table. Up to
    that limit, positions are computed as in the published code without its ``rotary_scaling_factor``.

    Raises:
        LoadError: the model differs from transformers'.
    """
    return _translate(config, folder, {**_EXPECTED, **_DENSE})


def as_nomic_mixture(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of a mixture of experts in transformers' words, with the keys for its experts.

    Raises:
        LoadError: the model differs from the published one, or its numbers of experts make no sense.
    """
    path = folder / "config.json"
    numbers = [config.get(key) for key in ("num_experts", "moe_top_k", "moe_every_n_layers")]
    experts, chosen, every = (value if type(value) is int else 0 for value in numbers)
    if not 1 <= chosen <= experts or every < 2:
        raise LoadError(
            f"{path}: num_experts, moe_top_k and moe_every_n_layers must be integers, the second at most the first, and "
            f"the last at least 2; got {', '.join(map(repr, numbers))}"
        )
    return _translate(config, folder, {**_EXPECTED, **_MIXTURE})


def _translate(config: Mapping[str, Json], folder: Path, expected: Mapping[str, tuple[Json, ...]]) -> dict[str, Json]:
    wrong = [
        f"{key} {config[key]!r}" for key, allowed in expected.items() if key in config and config[key] not in allowed
    ]
    if wrong:
        raise LoadError(f"{folder}/config.json: nomic_bert with {', '.join(wrong)} is not supported")
    kept = {key: value for key, value in config.items() if key not in _NAMES}
    sizes = {new: config[old] for old, new in _NAMES.items() if config.get(old) is not None}
    theta = config.get("rotary_emb_base")
    rope: dict[str, Json] = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {**kept, **sizes, **rope}
