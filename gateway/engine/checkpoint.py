"""Read what a checkpoint says about itself: sizes, pooling, normalisation, prompts, length.

The layout is sentence-transformers': ``modules.json`` lists the modules, ``sentence_bert_config.json`` the length,
``1_Pooling/config.json`` the pooling, ``config_sentence_transformers.json`` the prompts. A folder without
``modules.json`` is a plain transformers checkpoint, for which sentence-transformers' own default applies: mean pooling
and no normalisation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from gateway.engine.sources import file_sha256
from gateway.errors import LoadError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet")
"""``model_type`` of the architectures that are served: encoders whose forward gives one state a token."""

# Position ids of these start behind the padding id, which takes this many rows of the position table.
_POSITION_OFFSET = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}


class Pooling(StrEnum):
    """How the states of a text's tokens become one vector."""

    MEAN = "mean"
    """Mean over all tokens, special tokens included."""
    CLS = "cls"
    """State of the first token."""
    MAX = "max"
    """Maximum over all tokens, for each dimension."""
    LAST = "lasttoken"
    """State of the last token."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's own description.

    Attributes:
        width: dimensions of a token's state, and of the pooled vector.
        max_tokens: longest text, special tokens included: what sentence-transformers cuts at.
        position_limit: longest text that the architecture can take at all.
        prompts: instruction of each task, as named by the checkpoint.
        default_prompt: name of the prompt for texts without a task, if the checkpoint names one.
        weights: files that hold the weights.
        fingerprint: hex sha256 over the weights files, the tokenizer, the pooling and lower-casing.
    """

    folder: Path
    model_type: str
    width: int
    num_layers: int
    num_heads: int
    intermediate_width: int
    max_tokens: int
    position_limit: int
    pooling: Pooling
    is_normalised: bool
    is_lower_cased: bool
    prompts: Mapping[str, str]
    default_prompt: str | None
    weights: tuple[Path, ...]
    fingerprint: str


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the description of the checkpoint in ``folder``.

    Raises:
        LoadError: a file is missing or malformed, or the model is of a kind that is not served.
    """
    config = _read_object(folder / "config.json")
    model_type = _string(config, "model_type", folder)
    if model_type not in MODEL_TYPES:
        raise LoadError(f"{folder}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    modules = _read_modules(folder)
    pooling_folder = modules.get("Pooling")
    pooling = _read_pooling(folder / pooling_folder) if pooling_folder is not None else Pooling.MEAN
    transformer = _read_transformer(folder / modules.get("Transformer", ""))
    is_lower_cased = transformer.get("do_lower_case") is True
    positions = _integer(config, ("max_position_embeddings",), folder)
    position_limit = positions - _POSITION_OFFSET.get(model_type, 0)
    prompts, default_prompt = _read_prompts(folder / "config_sentence_transformers.json")
    weights = _weights_files(folder)
    return Checkpoint(
        folder=folder,
        model_type=model_type,
        width=_integer(config, ("hidden_size", "dim"), folder),
        num_layers=_integer(config, ("num_hidden_layers", "n_layers"), folder),
        num_heads=_integer(config, ("num_attention_heads", "n_heads"), folder),
        intermediate_width=_integer(config, ("intermediate_size", "hidden_dim"), folder),
        max_tokens=_max_tokens(folder, transformer, position_limit),
        position_limit=position_limit,
        pooling=pooling,
        is_normalised="Normalize" in modules,
        is_lower_cased=is_lower_cased,
        prompts=prompts,
        default_prompt=default_prompt,
        weights=weights,
        fingerprint=_fingerprint(folder, weights, pooling, is_lower_cased),
    )


def _read_modules(folder: Path) -> dict[str, str]:
    """Return the folder of each sentence-transformers module by its class name; empty for a plain checkpoint."""
    path = folder / "modules.json"
    if not path.exists():
        return {}
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise LoadError(f"{path}: must hold a list, got {type(rows).__name__}")
    modules: dict[str, str] = {}
    for row in rows:
        if not isinstance(row, dict):
            raise LoadError(f"{path}: each entry must be an object, got {row!r}")
        # The class moved between releases of sentence-transformers; its last part has stayed.
        modules[_string(row, "type", path).rsplit(".", 1)[-1]] = _string(row, "path", path)
    unsupported = set(modules) - {"Transformer", "Pooling", "Normalize"}
    if unsupported or "Transformer" not in modules:
        raise LoadError(
            f"{path}: modules {', '.join(sorted(unsupported or modules))} are not supported; "
            "supported: Transformer, then Pooling, then optionally Normalize"
        )
    return modules


def _read_pooling(folder: Path) -> Pooling:
    path = folder / "config.json"
    config = _read_object(path)
    if config.get("include_prompt") is False:
        raise LoadError(f"{path}: include_prompt: false is not supported: prompt tokens are always pooled")
    mode = config.get("pooling_mode")
    if mode is None:  # the form until sentence-transformers 5: one flag a mode
        names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
        names |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
        active = [name for name, flag in names.items() if config.get(f"pooling_mode_{flag}") is True]
        mode = [*active] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if not isinstance(mode, str) or mode not in set(Pooling):
        raise LoadError(f"{path}: pooling {mode!r} is not supported; supported: {', '.join(Pooling)}")
    return Pooling(mode)


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    config = _read_object(path, optional=True)
    prompts = config.get("prompts")
    texts = {str(name): str(text) for name, text in prompts.items()} if isinstance(prompts, dict) else {}
    default = config.get("default_prompt_name")
    if default is not None and default not in list(texts):
        raise LoadError(
            f"{path}: default_prompt_name is {default!r}, but the prompts are: {', '.join(texts) or 'none'}"
        )
    return texts, default if isinstance(default, str) else None


def _read_transformer(folder: Path) -> dict[str, Json]:
    """Return the length and lower-casing; the first releases of sentence-transformers named the file for the model."""
    for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta"):
        config = _read_object(folder / f"sentence_{name}_config.json", optional=True)
        if config:
            return config
    return {}


def _max_tokens(folder: Path, transformer: Mapping[str, Json], position_limit: int) -> int:
    """Return the length that the sentence-transformers file names, else the tokenizer's; at most the positions."""
    tokenizer = _read_object(folder / "tokenizer_config.json", optional=True)
    for limit in (transformer.get("max_seq_length"), tokenizer.get("model_max_length")):
        if isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1:
            return int(min(limit, position_limit))
    return position_limit


def _weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the model's weights: safetensors if there are any, else ``pytorch_model*.bin``."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return files
    raise LoadError(f"{folder}: no weights: neither *.safetensors nor pytorch_model*.bin")


def _tokenizer_files(folder: Path) -> list[Path]:
    """Return the files with the vocabulary; without one, transformers makes an empty tokenizer and says nothing."""
    for patterns in (["tokenizer.json"], ["vocab.*", "merges.txt", "*.model"]):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if files:
            return files
    raise LoadError(f"{folder}: no tokenizer: neither tokenizer.json nor vocab.* nor *.model")


def _fingerprint(folder: Path, weights: tuple[Path, ...], pooling: Pooling, is_lower_cased: bool) -> str:
    parts = {path.name: file_sha256(path) for path in (*weights, *_tokenizer_files(folder))}
    parts |= {"pooling": pooling.value, "lower_case": str(is_lower_cased)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Json:
    try:
        content: Json = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file; is this a checkpoint folder?") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not readable as JSON: {error}") from error
    return content


def _read_object(path: Path, *, optional: bool = False) -> dict[str, Json]:
    if optional and not path.exists():
        return {}
    content = _read_json(path)
    if not isinstance(content, dict):
        raise LoadError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _string(config: Mapping[str, Json], key: str, where: Path) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise LoadError(f"{where}: {key} must be a string, got {value!r}")
    return value


def _integer(config: Mapping[str, Json], keys: tuple[str, ...], where: Path) -> int:
    """Return the first of ``keys`` that is there: architectures name the same size differently."""
    value = next((config[key] for key in keys if key in config), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoadError(f"{where}/config.json: {keys[0]} must be a positive integer, got {value!r}")
    return value
