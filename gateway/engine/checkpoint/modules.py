"""Read sentence-transformers' files: the modules that make a vector, their settings, and how long a text may be.

What changes a vector is read or refused; what does not is passed over. The lists below name every key that
sentence-transformers 6.2 knows, so that a key of a later release is refused until it has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from gateway.engine.checkpoint.json_files import Json, read_json, read_object, require_string
from gateway.errors import LoadError

MULTI_VECTOR = "a multi-vector model (ColBERT): a vector for each token, which is not supported"
SPARSE = "a sparse encoder (SPLADE), which is not supported"
RERANKER = "a reranker of a kind that is not supported"

# What a module says about the model that it is part of.
_KINDS = {
    "MultiVectorMask": MULTI_VECTOR,
    "TokenPooling": MULTI_VECTOR,
    "SpladePooling": SPARSE,
    "MLMTransformer": SPARSE,
    "SparseAutoEncoder": SPARSE,
    "SparseStaticEmbedding": SPARSE,
    "LogitScore": RERANKER,
    "StaticEmbedding": "static embeddings with further modules behind them, which are not supported",
    "WordEmbeddings": "word embeddings without a transformer, which is not supported",
    "BoW": "a bag of words without a transformer, which is not supported",
    "CLIPModel": "a model of images and texts (CLIP), which is not supported",
    "Router": "a router with different modules for queries and documents, which is not supported",
    "Asym": "a router with different modules for queries and documents, which is not supported",
}
# sentence-transformers' class of the whole model, in `config_sentence_transformers.json`.
_MODEL_TYPES = {
    "SparseEncoder": SPARSE,
    "CrossEncoder": RERANKER,
    "MultiVectorEncoder": MULTI_VECTOR,
    "ColBERT": MULTI_VECTOR,  # PyLate's
}
# Modules that have an effect only in training.
_IN_TRAINING = {
    "sentence_transformers.models.Dropout",
    "sentence_transformers.sentence_transformer.modules.dropout.Dropout",
    "sentence_transformers.sentence_transformer.modules.Dropout",
}
_POOLING_FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
_POOLING_KEYS = {"embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt"} | {
    f"pooling_mode_{flag}" for flag in _POOLING_FLAGS.values()
}
_DENSE_KEYS = {
    "in_features",
    "out_features",
    "bias",
    "activation_function",
    "module_input_name",
    "module_output_name",
    "use_residual",
}
# The arguments that sentence-transformers puts into calls of transformers, by their names before release 5.4.
_OLD_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# Those of them that leave vectors as they are; and the length, which is read. What code may run is the registry's to say.
_HARMLESS_ANYWHERE = {"trust_remote_code", "revision", "code_revision"}
_HARMLESS_MEMORY = {"torch_dtype", "dtype", "attn_implementation", "use_memory_efficient_attention", "unpad_inputs"}
_HARMLESS_ARGUMENTS = {
    "model_kwargs": {"add_pooling_layer", "device_map", "use_safetensors", *_HARMLESS_MEMORY, *_HARMLESS_ANYWHERE},
    "processor_kwargs": {"model_max_length", "use_fast", "padding_side", *_HARMLESS_ANYWHERE},
    "config_kwargs": {"use_cache", *_HARMLESS_MEMORY, *_HARMLESS_ANYWHERE},
}
_HARMLESS_KEYS = {"max_seq_length", "do_lower_case", "modality_config", "unpad_inputs", "backend", "cache_dir"}


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
class Modules:
    """The folder of each of sentence-transformers' modules, relative to the checkpoint.

    Attributes:
        pooling: ``None`` without a pooling: the transformer's output is then not the vector of a text.
        own_code: the checkpoint's own classes, named instead of sentence-transformers'.
    """

    transformer: str = ""
    pooling: str | None = None
    dense: tuple[str, ...] = ()
    is_normalized: bool = False
    own_code: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A linear layer behind the pooling, as its configuration describes it.

    Attributes:
        activation: torch's class of the activation behind it, without its module.
    """

    width: int
    activation: str
    has_bias: bool


def read_modules(folder: Path) -> Modules | None:
    """Return the modules that ``modules.json`` lists; ``None`` for a plain transformers checkpoint.

    Raises:
        LoadError: it cannot be read, or lists modules that are not supported; names the kind of model that they make.
    """
    path = folder / "modules.json"
    rows = _list_classes(path)
    if rows is None:
        return None
    types, folders = [type_ for type_, _place in rows], [place for _type, place in rows]
    kinds = [_kind(type_) for type_ in types]
    dense = [at for kind, at in zip(kinds, folders, strict=True) if kind == "Dense"]
    for kind, at in zip(kinds, folders, strict=True):
        if kind == "Normalize":
            _require_sentences(folder / at / "config.json")
    # One transformer, one pooling, any linear layers, at the end perhaps a normalization.
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * kinds.count("Normalize")]
    if not kinds or kinds != expected[: len(kinds)] or kinds.count("Normalize") > 1:
        what = _what_modules_make(kinds, types, [folder / at / "config.json" for at in dense])
        raise LoadError(
            f"{path}: the modules {', '.join(kinds) or 'none'} are not supported{what and f': {what}'}; supported: "
            "Transformer, Pooling, then optionally Dense layers, then optionally Normalize"
        )
    return Modules(
        transformer=folders[0],
        pooling=folders[1] if len(folders) > 1 else None,
        dense=tuple(dense),
        is_normalized="Normalize" in kinds,
        own_code=tuple(type_ for type_ in types if not type_.startswith("sentence_transformers.")),
    )


def list_modules(folder: Path) -> list[tuple[str, str]] | None:
    """Return the kind and the folder of each module, in order; ``None`` without ``modules.json``.

    Raises:
        LoadError: the file cannot be read.
    """
    rows = _list_classes(folder / "modules.json")
    return None if rows is None else [(_kind(type_), place) for type_, place in rows]


def _list_classes(path: Path) -> list[tuple[str, str]] | None:
    """Return the class and the folder of each module that has an effect; ``None`` if there is no such file."""
    if not path.exists():
        return None
    rows = read_json(path)
    if not isinstance(rows, list):
        raise LoadError(f"{path}: must hold a list, got {type(rows).__name__}")
    modules = []
    for row in rows:
        if not isinstance(row, dict):
            raise LoadError(f"{path}: each entry must be an object, got {row!r}")
        modules.append((require_string(row, "type", path), _inside(require_string(row, "path", path), path)))
    return [(type_, place) for type_, place in modules if type_ not in _IN_TRAINING]


def _kind(type_: str) -> str:
    """Return the name of a class without its module: classes moved between releases, and kept their names."""
    return type_.rsplit(".", 1)[-1]


def _inside(place: str, path: Path) -> str:
    """Return the folder of a module, which must be part of the checkpoint."""
    parts = PurePosixPath(place)
    if parts.is_absolute() or ".." in parts.parts:
        raise LoadError(f"{path}: the path {place!r} leads out of the checkpoint's folder")
    return place


def _what_modules_make(kinds: Sequence[str], types: Sequence[str], dense: Iterable[Path]) -> str:
    """Return the kind of model that a list of unsupported modules makes; empty if it is not known."""
    known = [_KINDS[kind] for kind in kinds if kind in _KINDS]
    if known:
        return known[0]
    if any(type_.startswith("pylate.") for type_ in types):
        return MULTI_VECTOR
    outputs = [_output_of(read_object(path, optional=True)) for path in dense]
    if "scores" in outputs:
        return RERANKER
    if "token_embeddings" in outputs or ("Dense" in kinds and "Pooling" not in kinds):
        return MULTI_VECTOR
    return ""


def _output_of(config: Mapping[str, Json]) -> str:
    return str(config.get("module_output_name") or config.get("module_input_name") or "sentence_embedding")


def _require_sentences(path: Path) -> None:
    """Refuse a normalization of token vectors."""
    config = read_object(path, optional=True)
    names = [config.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")]
    if names != ["sentence_embedding"] * 2:
        raise LoadError(f"{path}: normalizes {names[0]!r}, not the vector of a text: {MULTI_VECTOR}")


def read_pooling(folder: Path) -> Pooling:
    """Read the configuration of a ``Pooling`` module.

    Raises:
        LoadError: it pools in a way that is not supported.
    """
    path = folder / "config.json"
    config = read_object(path)
    _require_known(config, _POOLING_KEYS, path)
    if config.get("include_prompt") is False:
        raise LoadError(f"{path}: include_prompt: false is not supported: prompt tokens are always pooled")
    flags = {f"pooling_mode_{flag}" for flag in _POOLING_FLAGS.values()}
    if odd := [key for key in flags if not isinstance(config.get(key, False), bool)]:
        raise LoadError(f"{path}: {odd[0]} must be true or false, got {config[odd[0]]!r}")
    mode = config.get("pooling_mode")
    if mode is None:  # the form until sentence-transformers 5: one flag per mode
        active = [name for name, flag in _POOLING_FLAGS.items() if config.get(f"pooling_mode_{flag}") is True]
        mode = [*active] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if not isinstance(mode, str) or mode not in set(Pooling):
        raise LoadError(f"{path}: pooling {mode!r} is not supported; supported: {', '.join(Pooling)}")
    return Pooling(mode)


def read_dense(folder: Path, *, gives_scores: bool = False) -> DenseLayer:
    """Read the configuration of a ``Dense`` module.

    Args:
        gives_scores: it is the last one of a cross-encoder.

    Raises:
        LoadError: it is more than a linear layer over the pooled vector.
    """
    path = folder / "config.json"
    config = read_object(path)
    _require_known(config, _DENSE_KEYS, path)
    if _output_of(config) == "scores" and not gives_scores:
        raise LoadError(f"{path}: gives scores: {RERANKER}")
    ends = ("input",) if gives_scores else ("input", "output")
    names = {str(config.get(f"module_{end}_name") or "sentence_embedding") for end in ends}
    if config.get("use_residual") or names != {"sentence_embedding"}:
        raise LoadError(f"{path}: only a plain layer behind the pooling is supported: no use_residual, no other names")
    width = config.get("out_features")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise LoadError(f"{path}: out_features must be a positive integer, got {width!r}")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(activation, str) or not activation.startswith("torch."):
        raise LoadError(f"{path}: activation_function must be a class of torch's, got {activation!r}")
    return DenseLayer(width, activation.rsplit(".", 1)[-1], config.get("bias") is not False)


# ------------------------------------------------------------------------------------------------------- transformer


@dataclass(frozen=True, slots=True)
class TransformerSettings:
    """How sentence-transformers calls the tokenizer.

    Attributes:
        max_tokens: longest text that the file names, if it names one.
    """

    max_tokens: int | None
    is_lower_cased: bool


def read_transformer(folder: Path, *, is_embedder: bool, is_llm: bool = False) -> TransformerSettings:
    """Read the length and lower-casing; the first releases of sentence-transformers named the file for the model.

    Raises:
        LoadError: the file asks for another treatment of texts.
    """
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"):
        path = folder / f"sentence_{name}_config.json"
        config = read_object(path, optional=True)
        if config:
            config = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
            _require_plain(config, path, is_embedder=is_embedder, is_llm=is_llm)
            arguments = config.get("processor_kwargs")
            given = arguments.get("model_max_length") if isinstance(arguments, dict) else None
            length = as_length(given) or as_length(config.get("max_seq_length"))
            _require_one_length(config, length, path)
            return TransformerSettings(length, config.get("do_lower_case") is True)
    return TransformerSettings(None, is_lower_cased=False)


def as_length(value: Json) -> int | None:
    """Return a number of tokens from a checkpoint's file; ``None`` for a value that is not one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(min(value, 2**62)) if is_number and value >= 1 else None  # type: ignore[type-var,operator,arg-type]


def _require_plain(config: Mapping[str, Json], path: Path, *, is_embedder: bool, is_llm: bool) -> None:
    """Refuse settings with which sentence-transformers would call the tokenizer or the model differently.

    Raises:
        LoadError: names the setting.
    """
    task, output = ("feature-extraction", "token_embeddings") if is_embedder else ("sequence-classification", "scores")
    if is_llm:
        task, output = "text-generation", "causal_logits"
    state = "last_hidden_state" if is_embedder else "logits"
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
    known |= {"query_length", "document_length"}  # looked at with the length
    if not is_embedder:
        match config.get("processing_kwargs"):
            case dict(options) if not options.keys() - {"chat_template", "text"} and options.get("text") in (
                None,
                {},
                {"logits_to_keep": 1},
            ):
                known.add("processing_kwargs")
    _require_known({key: value for key, value in config.items() if value not in (None, {}, [])}, known, path)


def _require_one_length(config: Mapping[str, Json], length: int | None, path: Path) -> None:
    for key in ("query_length", "document_length"):
        if config.get(key) is not None and as_length(config[key]) != length:
            raise LoadError(
                f"{path}: {key} {config[key]!r} is not supported: queries and documents are cut at the same length"
                + (f", here {length}" if length else "")
            )


def _require_known(config: Mapping[str, Json], known: Iterable[str], path: Path) -> None:
    unknown = [key for key in config if key not in known]
    if unknown:
        raise LoadError(
            f"{path}: {', '.join(unknown)} is not supported: it is not known whether it changes the vectors"
        )


# ------------------------------------------------------------------------------------------------- the model as a whole


def require_sentence_transformer(config: Mapping[str, Json], path: Path) -> None:
    """Refuse a model that is not an embedder by its ``config_sentence_transformers.json``.

    Raises:
        LoadError: names its kind of model.
    """
    what = _MODEL_TYPES.get(str(config.get("model_type")))
    if what is not None:
        raise LoadError(f"{path}: model_type {config['model_type']!r}: {what}")


def read_truncated_width(config: Mapping[str, Json], path: Path) -> int | None:
    """Return the dimensions to which ``config_sentence_transformers.json`` cuts every vector, if it does.

    Raises:
        LoadError: it does not give a number of dimensions.
    """
    width = config.get("truncate_dim")
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
        raise LoadError(f"{path}: truncate_dim must be a positive integer, got {width!r}")
    return width
