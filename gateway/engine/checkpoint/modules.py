"""Read sentence-transformers' files: the modules that make a vector, their settings, and the limit of a text's length.

A setting that changes a vector is read or refused; a setting that does not is ignored. The lists below name every key that
sentence-transformers 6.2 knows, so a key of a later release is refused until it has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from gateway.engine.checkpoint.json_files import Json, is_present, read_flag, read_json, read_object, require_string
from gateway.errors import LoadError

MULTI_VECTOR = "a multi-vector model (ColBERT): a vector for each token, of a form that is not supported"
SPARSE = "a sparse encoder (SPLADE) of a form that is not supported"
RERANKER = "a reranker of a kind that is not supported"

# The kind of model that a module implies.
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
    "Router": "a router with different modules for queries and documents, which is supported in sparse encoders alone",
    "Asym": "a router with different modules for queries and documents, which is supported in sparse encoders alone",
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


class Pooling(StrEnum):
    """The pooling of the states of a text's tokens into one vector."""

    MEAN = "mean"
    """Mean over all tokens, special tokens included."""
    CLS = "cls"
    """State of the first token."""
    MAX = "max"
    """Maximum over all tokens, for each dimension."""
    LAST = "lasttoken"
    """State of the last token."""


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """An entry of ``modules.json``: a class, and its folder relative to the checkpoint."""

    type: str
    folder: str

    @property
    def kind(self) -> str:
        """Name of the class without its module: classes have moved between releases, but kept their names."""
        return self.type.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Modules:
    """The folder of each of sentence-transformers' modules, relative to the checkpoint.

    Attributes:
        pooling: the folder of the pooling; ``None`` without one: the transformer's output is then not the vector of a text.
        own_code: the checkpoint's own classes, named instead of sentence-transformers'.
    """

    transformer: str = ""
    pooling: str | None = None
    dense: tuple[str, ...] = ()
    is_normalized: bool = False
    own_code: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A linear layer after the pooling or over each token, as its configuration describes it.

    Attributes:
        activation: torch's class of the activation after the layer, without its module.
        has_residual: the input is added to the output: directly, or through a layer without a bias if the widths differ.
    """

    width: int
    activation: str
    has_bias: bool
    has_residual: bool = False


def read_modules(folder: Path) -> Modules | None:
    """Return the modules that ``modules.json`` lists; ``None`` for a plain transformers checkpoint.

    Raises:
        LoadError: the file cannot be read, or lists modules that are not supported; the message names their kind of model.
    """
    path = folder / "modules.json"
    rows = list_rows(folder)
    if rows is None:
        return None
    types, folders, kinds = [row.type for row in rows], [row.folder for row in rows], [row.kind for row in rows]
    dense = [at for kind, at in zip(kinds, folders, strict=True) if kind == "Dense"]
    for kind, at in zip(kinds, folders, strict=True):
        if kind == "Normalize":
            _require_sentences(folder / at / "config.json")
    # One transformer, one pooling, any number of linear layers, and optionally a normalization.
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * kinds.count("Normalize")]
    if not kinds or kinds != expected[: len(kinds)] or kinds.count("Normalize") > 1:
        what = _describe_modules(kinds, types, [folder / at / "config.json" for at in dense])
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
    rows = list_rows(folder)
    return None if rows is None else [(row.kind, row.folder) for row in rows]


def list_rows(folder: Path) -> list[ModuleRow] | None:
    """Return the modules that have an effect, in order; ``None`` without ``modules.json``.

    Raises:
        LoadError: the file cannot be read.
    """
    path = folder / "modules.json"
    if not is_present(path):
        return None
    rows = read_json(path)
    if not isinstance(rows, list):
        raise LoadError(f"{path}: must hold a list, got {type(rows).__name__}")
    modules = []
    for row in rows:
        if not isinstance(row, dict):
            raise LoadError(f"{path}: each entry must be an object, got {row!r}")
        modules.append(ModuleRow(require_string(row, "type", path), inside(require_string(row, "path", path), path)))
    return [module for module in modules if module.type not in _IN_TRAINING]


def inside(place: str, path: Path) -> str:
    """Return the folder of a module, which must be inside the checkpoint."""
    parts = PurePosixPath(place)
    if parts.is_absolute() or ".." in parts.parts:
        raise LoadError(f"{path}: the path {place!r} leads out of the checkpoint's folder")
    return place


def _describe_modules(kinds: Sequence[str], types: Sequence[str], dense: Iterable[Path]) -> str:
    """Return the kind of model that a list of unsupported modules describes; empty if unknown."""
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
        LoadError: the pooling is not supported.
    """
    path = folder / "config.json"
    config = read_object(path)
    require_known(config, _POOLING_KEYS, path)
    if not read_flag(config, "include_prompt", path, default=True):
        raise LoadError(f"{path}: include_prompt: false is not supported: prompt tokens are always pooled")
    flags = {
        name: read_flag(config, f"pooling_mode_{flag}", path, default=False) for name, flag in _POOLING_FLAGS.items()
    }
    mode = config.get("pooling_mode")
    if mode is None:  # the format until sentence-transformers 5: one flag per mode
        mode = [name for name, is_set in flags.items() if is_set] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if not isinstance(mode, str) or mode not in set(Pooling):
        raise LoadError(f"{path}: pooling {mode!r} is not supported; supported: {', '.join(Pooling)}")
    return Pooling(mode)


def read_dense(folder: Path, *, gives_scores: bool = False) -> DenseLayer:
    """Read the configuration of a ``Dense`` module.

    Args:
        gives_scores: the module is the last one of a cross-encoder.

    Raises:
        LoadError: the module is more than a linear layer over the pooled vector.
    """
    path = folder / "config.json"
    config = read_object(path)
    if _output_of(config) == "scores" and not gives_scores:
        raise LoadError(f"{path}: gives scores: {RERANKER}")
    ends = ("input",) if gives_scores else ("input", "output")
    names = {str(config.get(f"module_{end}_name") or "sentence_embedding") for end in ends}
    if config.get("use_residual") or names != {"sentence_embedding"}:
        raise LoadError(f"{path}: only a plain layer behind the pooling is supported: no use_residual, no other names")
    return _dense_layer(config, path)


def read_token_dense(folder: Path) -> DenseLayer:
    """Read the configuration of a ``Dense`` module over each token of a multi-vector model, also PyLate's.

    Raises:
        LoadError: the module does not read and write token vectors.
    """
    path = folder / "config.json"
    config = read_object(path)
    if {str(config.get(f"module_{end}_name") or "token_embeddings") for end in ("input", "output")} != {
        "token_embeddings"
    }:
        raise LoadError(f"{path}: must read and write token_embeddings in a multi-vector model")
    return _dense_layer(config, path)


def _dense_layer(config: Mapping[str, Json], path: Path) -> DenseLayer:
    require_known(config, _DENSE_KEYS, path)
    width = config.get("out_features")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise LoadError(f"{path}: out_features must be a positive integer, got {width!r}")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(activation, str) or not activation.startswith("torch."):
        raise LoadError(f"{path}: activation_function must be a class of torch's, got {activation!r}")
    has_bias = read_flag(config, "bias", path, default=True)
    has_residual = read_flag(config, "use_residual", path, default=False)
    return DenseLayer(width, activation.rsplit(".", 1)[-1], has_bias, has_residual)


def require_known(config: Mapping[str, Json], known: Iterable[str], path: Path) -> None:
    """Refuse unknown keys of a configuration.

    Raises:
        LoadError: names them.
    """
    unknown = [key for key in config if key not in known]
    if unknown:
        raise LoadError(f"{path}: {', '.join(unknown)} is not supported: it might change the vectors")


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
        LoadError: the value is not a number of dimensions.
    """
    width = config.get("truncate_dim")
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
        raise LoadError(f"{path}: truncate_dim must be a positive integer, got {width!r}")
    return width
