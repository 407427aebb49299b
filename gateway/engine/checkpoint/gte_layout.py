"""GTE as it was published (`model_type: new`), read as transformers' own `gte`. Does not import torch.

`Alibaba-NLP/gte-multilingual-base`, `gte-large-en-v1.5`, `gte-base-en-v1.5` and their descendants, such as
`NovaSearch/stella_en_400M_v5`, were published with their own code (`Alibaba-NLP/new-impl`: `NewConfig`, `NewModel`).
transformers' `GteModel` is the same model, and takes the published tensors under their names. It does not know the scaling
of the rotary positions, which this module translates to a scaling that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from gateway.engine.checkpoint.classifier import own_class
from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

_CLASS = "NewModel"
# NewConfig's defaults for the keys that a file omits; transformers has other defaults.
_DEFAULTS: Mapping[str, Json] = {
    "vocab_size": 30528,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
# The values that transformers' model assumes; a missing key is fine. The other keys of NewConfig change how the model is
# computed, not its result: `unpad_inputs`, `use_memory_efficient_attention`, and `logn_attention_clip1` without the scale.
_EXPECTED: Mapping[str, Json] = {
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
}


def is_gte_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has this layout."""
    return config.get("model_type") == "new"


def as_gte(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the same model in transformers' words.

    Raises:
        LoadError: the model differs from transformers'.
    """
    path = folder / "config.json"
    name = own_class(config, "AutoModel")
    if name not in (None, _CLASS):
        raise LoadError(f"{path}: model_type 'new' with the code of {name} is not supported, only with {_CLASS}")
    wrong = [f"{key} {config[key]!r}" for key, value in _EXPECTED.items() if config.get(key, value) != value]
    if wrong:
        raise LoadError(f"{path}: model_type 'new' with {', '.join(wrong)} is not supported")
    own = {**_DEFAULTS, **config}
    rope = _rope_parameters(own, path)
    dropped = {*_EXPECTED, "rope_theta", "rope_scaling"}
    kept = {key: value for key, value in own.items() if key not in dropped}
    return {**kept, "model_type": "gte", "rope_parameters": rope}


def _rope_parameters(config: Mapping[str, Json], path: Path) -> dict[str, Json]:
    """Return the rotary positions: frequencies ``theta ** (-2 i / d)`` for pair i of the d numbers of a head.

    The published scaling ``ntk`` multiplies theta by the factor ``f``, and divides every frequency by ``f ** (2 / d)``
    (``NTKScalingRotaryEmbedding`` in the published code, after Su, https://kexue.fm/archives/9706). It is fixed, the same
    for texts of every length. transformers' ``linear`` divides every frequency by its own factor, so the two together are a
    ``linear`` scaling with the larger theta.

    Raises:
        LoadError: the scaling is of another kind, or makes no sense.
    """
    theta, scaling = config["rope_theta"], config["rope_scaling"]
    if not _is_number(theta):
        raise LoadError(f"{path}: rope_theta must be a number, got {theta!r}")
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    if not isinstance(scaling, dict):
        raise LoadError(f"{path}: rope_scaling must be an object, got {scaling!r}")
    kind, factor = scaling.get("type") or scaling.get("rope_type"), scaling.get("factor")
    if kind != "ntk" or scaling.get("mixed_b") is not None or not _is_number(factor) or factor < 1:
        raise LoadError(
            f"{path}: rope_scaling {scaling} is not supported; supported: type 'ntk' with a factor of at least 1, and no "
            "mixed_b"
        )
    width, num_heads = config["hidden_size"], config["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(num_heads, int) or not 0 < num_heads <= width:
        raise LoadError(f"{path}: hidden_size {width!r} and num_attention_heads {num_heads!r} do not fit each other")
    divisor = float(factor ** (2 / (width // num_heads)))
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": divisor}


def _is_number(value: Json) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
