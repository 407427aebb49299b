"""Read how sentence-transformers calls the tokenizer and the transformer: ``sentence_bert_config.json``.

A setting that changes a vector is read or refused; others are ignored. See :mod:`gateway.engine.checkpoint.modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json, read_flag, read_object
from gateway.engine.checkpoint.modules import require_known
from gateway.engine.checkpoint.pair_template import has_chat_template
from gateway.errors import LoadError

# The arguments that sentence-transformers passes to transformers, by their names before release 5.4.
_OLD_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# The arguments that do not change vectors, and the length, which is read. The registry decides which code may run.
_HARMLESS_ANYWHERE = {"trust_remote_code", "revision", "code_revision"}
_HARMLESS_MEMORY = {"torch_dtype", "dtype", "attn_implementation", "use_memory_efficient_attention", "unpad_inputs"}
_HARMLESS_ARGUMENTS = {
    "model_kwargs": {"add_pooling_layer", "device_map", "use_safetensors", *_HARMLESS_MEMORY, *_HARMLESS_ANYWHERE},
    "processor_kwargs": {"model_max_length", "use_fast", "padding_side", *_HARMLESS_ANYWHERE},
    "config_kwargs": {"use_cache", *_HARMLESS_MEMORY, *_HARMLESS_ANYWHERE},
}
# sentence-transformers' name of a transformer's output in each of its tasks, and transformers' name of it.
_TASKS = {
    "feature-extraction": ("token_embeddings", "last_hidden_state"),
    "sequence-classification": ("scores", "logits"),
    "text-generation": ("causal_logits", "logits"),
    "fill-mask": ("token_embeddings", "logits"),
}
# Settings for queries and documents in a multi-vector model.
_SIDES = ("query_length", "document_length", "query_expansion")
_HARMLESS_KEYS = {"max_seq_length", "do_lower_case", "modality_config", "unpad_inputs", "backend", "cache_dir"}


@dataclass(frozen=True, slots=True)
class TransformerSettings:
    """How sentence-transformers calls the tokenizer.

    Attributes:
        max_tokens: the longest text according to the file, if it states a length.
    """

    max_tokens: int | None
    is_lower_cased: bool


def read_transformer(
    folder: Path, task: str, *, has_sides: bool = False, has_template: bool = False
) -> TransformerSettings:
    """Read the length and lower-casing. Early releases of sentence-transformers named the file after the model.

    Args:
        task: transformers' name for the use of the model: one of :data:`_TASKS`.
        has_sides: queries and documents have separate lengths, which are read elsewhere.
        has_template: the chat template is read elsewhere, as the template of a text, or of a query and a document.

    Raises:
        LoadError: the file asks for a treatment of texts that is not supported.
    """
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"):
        path = folder / f"sentence_{name}_config.json"
        config = read_object(path, optional=True)
        if config:
            config = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
            if has_sides:
                config = {key: value for key, value in config.items() if key not in _SIDES}
            _require_template(config, path, has_template=has_template)
            if has_template:
                config.pop("processing_kwargs", None)
            _require_plain(config, path, task)
            arguments = config.get("processor_kwargs")
            given = arguments.get("model_max_length") if isinstance(arguments, dict) else None
            length = as_length(given) or as_length(config.get("max_seq_length"))
            _require_one_length(config, length, path)
            return TransformerSettings(length, read_flag(config, "do_lower_case", path, default=False))
    return TransformerSettings(None, is_lower_cased=False)


def as_length(value: Json) -> int | None:
    """Return a number of tokens from a checkpoint's file; ``None`` for a value that is not one."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 1:
        return None
    return int(min(value, 2**62))


def _require_plain(config: Mapping[str, Json], path: Path, task: str) -> None:
    """Refuse settings that change how sentence-transformers calls the tokenizer or the model.

    Raises:
        LoadError: names the setting.
    """
    output, state = _TASKS[task]
    match config.get("modality_config"):
        case {"text": {"method_output_name": str(name)}} if name != state:
            raise LoadError(f"{path}: method_output_name {name!r} is not supported, only {state!r}")
        case {"text": {"method": str(name)}} if name != "forward":
            raise LoadError(f"{path}: method {name!r} is not supported, only 'forward'")
    for key, expected in (("transformer_task", task), ("module_output_name", output)):
        if config.get(key) not in (None, expected):
            raise LoadError(f"{path}: {key} {config[key]!r} is not supported, only {expected!r}")
    for key, harmless in _HARMLESS_ARGUMENTS.items():
        arguments = config.get(key)
        strange = [name for name in arguments if name not in harmless] if isinstance(arguments, dict) else []
        if strange:
            raise LoadError(f"{path}: {key}: {', '.join(strange)} is not supported")
    known = {*_HARMLESS_KEYS, *_HARMLESS_ARGUMENTS, "transformer_task", "module_output_name"}
    known |= {"query_length", "document_length"}  # checked together with the length
    require_known({key: value for key, value in config.items() if value not in (None, {}, [])}, known, path)


def _require_template(config: Mapping[str, Json], path: Path, *, has_template: bool) -> None:
    """Refuse a chat template around texts that is not read.

    sentence-transformers puts each text into the template if the model may be given messages, and saves that it may for
    every language model whose tokenizer has one.
    """
    modalities, processing = config.get("modality_config"), config.get("processing_kwargs")
    if isinstance(modalities, dict) and "message" in modalities and not has_template:
        absent = "" if has_chat_template(path.parent) else ". There is no chat template here"
        raise LoadError(
            f"{path}: modality_config has 'message': each text is put into the chat template, which is supported only in an "
            f"embedder, and in a reranker whose template has a place for a query and a document{absent}"
        )
    if has_template and isinstance(processing, dict) and (other := sorted(processing.keys() - {"chat_template"})):
        raise LoadError(f"{path}: processing_kwargs: {', '.join(other)} is not supported")


def _require_one_length(config: Mapping[str, Json], length: int | None, path: Path) -> None:
    for key in ("query_length", "document_length"):
        if config.get(key) is not None and as_length(config[key]) != length:
            raise LoadError(
                f"{path}: {key} {config[key]!r} is not supported: queries and documents are cut at the same length"
                + (f", here {length}" if length else "")
            )
