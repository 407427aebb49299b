"""Read what a checkpoint says about itself: sizes, pooling, normalisation, prompts, length, adapters, further heads.

The layout is sentence-transformers': ``modules.json`` lists the modules, ``sentence_bert_config.json`` the length,
``1_Pooling/config.json`` the pooling, ``config_sentence_transformers.json`` the prompts. A folder without
``modules.json`` is a plain transformers checkpoint, for which sentence-transformers' own default applies: mean pooling
and no normalisation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from gateway.embedding import Output, canonical_task
from gateway.engine.classifier import Classifier, read_classifier
from gateway.engine.flash_layout import is_flash_layout
from gateway.engine.json_files import Json, read_json, read_object, require_string
from gateway.engine.sizes import Sizes, read_config
from gateway.engine.sources import file_sha256
from gateway.errors import LoadError

MODEL_TYPES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "gte",
    "qwen3",
    "jina_embeddings_v3",
)
"""``model_type`` of the architectures that are served: those whose forward gives one state a token."""

POSITION_OFFSET = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}
"""First position id of the architectures that count from behind the padding id; the others count from 0."""

# Positions that the table has and a text cannot use. Jina v3 kept the size of XLM-RoBERTa's table, without its offset.
_UNUSED_POSITIONS = {**POSITION_OFFSET, "jina_embeddings_v3": 2}

_ADAPTER_TASKS = {
    "retrieval_query": "retrieval.query",
    "retrieval_passage": "retrieval.passage",
    "separation": "separation",
    "classification": "classification",
    "text_matching": "text-matching",
}
# What Jina's own `encode` puts before a text (custom_st.py of jinaai/jina-embeddings-v3).
_JINA_PROMPTS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
_SPARSE_HEAD = "sparse_linear.pt"
_MULTIVECTOR_HEAD = "colbert_linear.pt"


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
        width: dimensions of a dense vector; 1, the score, where there is a classifier.
        hidden_width: dimensions of a token's state.
        max_tokens: longest text, special tokens included: what sentence-transformers cuts at.
        position_limit: longest text that the architecture can take at all.
        dense_layers: folders of the linear layers behind the pooling, in order.
        prompts: instruction of each task, as named by the checkpoint.
        default_prompt: name of the prompt for texts without a task, if the checkpoint names one.
        adapters: folder of each task's adapter.
        sparse_head: weights of the layer that gives each token its weight, if there is one.
        multivector_head: weights of the layer that gives each token its vector, if there is one.
        classifier: the head that scores a pair of texts, if the model is a cross-encoder.
        is_flash: whether the files have Jina's layout, which ``gateway.engine.flash_layout`` reads.
        weights: files that hold the transformer's weights.
        fingerprint: hex sha256 over all weights files, the tokenizer, the pooling and lower-casing, the scaling of the
            adapters, the activations of the dense layers and the settings of the classifier.
    """

    folder: Path
    model_type: str
    width: int
    hidden_width: int
    num_layers: int
    num_heads: int
    intermediate_width: int
    max_tokens: int
    position_limit: int
    pooling: Pooling
    is_normalised: bool
    is_lower_cased: bool
    dense_layers: tuple[Path, ...]
    prompts: Mapping[str, str]
    default_prompt: str | None
    adapters: Mapping[str, Path]
    sparse_head: Path | None
    multivector_head: Path | None
    classifier: Classifier | None
    is_flash: bool
    weights: tuple[Path, ...]
    fingerprint: str

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the checkpoint can give for a text."""
        heads = ((Output.SPARSE, self.sparse_head), (Output.MULTIVECTOR, self.multivector_head))
        return (Output.DENSE, *(output for output, head in heads if head is not None))

    @property
    def all_weights(self) -> tuple[Path, ...]:
        """Every file with weights: the transformer's, the adapters', and those of the layers behind it."""
        heads = (head for head in (self.sparse_head, self.multivector_head) if head is not None)
        folders = (*self.adapters.values(), *self.dense_layers)
        return (*self.weights, *(file for folder in folders for file in _weights_files(folder)), *heads)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the description of the checkpoint in ``folder``.

    Raises:
        LoadError: a file is missing or malformed, or the model is of a kind that is not served.
    """
    config = read_config(folder)
    model_type = require_string(config, "model_type", folder)
    if model_type not in MODEL_TYPES:
        raise LoadError(f"{folder}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    classifier = read_classifier(folder, config)
    modules = _read_modules(folder) if classifier is None else _Modules()
    transformer = _read_transformer(folder / modules.transformer, is_embedder=classifier is None)
    sizes = Sizes.read(folder)
    position_limit = sizes.num_positions - _UNUSED_POSITIONS.get(model_type, 0)
    is_jina = model_type == "jina_embeddings_v3"
    if classifier is not None:
        pooling = Pooling(classifier.pooling)
    else:
        pooling = Pooling.MEAN if modules.pooling is None else _read_pooling(folder / modules.pooling)
    is_lower_cased = transformer.get("do_lower_case") is True
    prompts_file = folder / "config_sentence_transformers.json"
    prompts, default_prompt = _read_prompts(prompts_file) if classifier is None else ({}, None)
    adapters = _find_adapters(folder)
    weights = _weights_files(folder)
    sparse_head, multivector_head = (_existing(folder / name) for name in (_SPARSE_HEAD, _MULTIVECTOR_HEAD))
    dense_layers = tuple(folder / path for path in modules.dense)
    checkpoint = Checkpoint(
        folder=folder,
        model_type=model_type,
        width=1 if classifier else _read_dense_width(dense_layers[-1]) if dense_layers else sizes.width,
        hidden_width=sizes.width,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        intermediate_width=sizes.intermediate_width,
        max_tokens=_max_tokens(folder, transformer, position_limit),
        position_limit=position_limit,
        pooling=pooling,
        is_normalised=modules.is_normalised or is_jina,
        is_lower_cased=is_lower_cased,
        dense_layers=dense_layers,
        prompts=_jina_prompts(adapters, prompts) if is_jina else prompts,
        default_prompt=default_prompt,
        adapters=adapters,
        sparse_head=sparse_head,
        multivector_head=multivector_head,
        classifier=classifier,
        is_flash=is_flash_layout(read_object(folder / "config.json")),
        weights=weights,
        fingerprint="",
    )
    return _with_fingerprint(checkpoint)


# ---------------------------------------------------------------------------------------------------------- modules


@dataclass(frozen=True, slots=True)
class _Modules:
    """The folder of each of sentence-transformers' modules, relative to the checkpoint."""

    transformer: str = ""
    pooling: str | None = None
    dense: tuple[str, ...] = ()
    is_normalised: bool = False


def _read_modules(folder: Path) -> _Modules:
    path = folder / "modules.json"
    if not path.exists():
        return _Modules()
    rows = read_json(path)
    if not isinstance(rows, list):
        raise LoadError(f"{path}: must hold a list, got {type(rows).__name__}")
    for row in rows:
        if not isinstance(row, dict):
            raise LoadError(f"{path}: each entry must be an object, got {row!r}")
    # The classes moved between releases of sentence-transformers; the last part of the name has stayed.
    named = [
        (require_string(row, "type", path).rsplit(".", 1)[-1], require_string(row, "path", path))
        for row in rows
        if isinstance(row, dict)
    ]
    kinds = [kind for kind, _path in named]
    # One transformer, one pooling, any linear layers, at the end perhaps a normalisation.
    expected = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * kinds.count("Normalize")]
    if not kinds or kinds != expected[: len(kinds)] or kinds.count("Normalize") > 1:
        raise LoadError(
            f"{path}: the modules {', '.join(kinds) or 'none'} are not supported; supported: Transformer, Pooling, then "
            "optionally Dense layers, then optionally Normalize"
        )
    return _Modules(
        transformer=named[0][1],
        pooling=named[1][1] if len(named) > 1 else None,
        dense=tuple(path for kind, path in named if kind == "Dense"),
        is_normalised="Normalize" in kinds,
    )


def _read_pooling(folder: Path) -> Pooling:
    path = folder / "config.json"
    config = read_object(path)
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


def _read_dense_width(folder: Path) -> int:
    width = read_object(folder / "config.json").get("out_features")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise LoadError(f"{folder}/config.json: out_features must be a positive integer, got {width!r}")
    return width


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the instruction of each prompt, and the name of the default one."""
    config = read_object(path, optional=True)
    prompts = config.get("prompts")
    texts = {str(name): str(text) for name, text in prompts.items()} if isinstance(prompts, dict) else {}
    default = config.get("default_prompt_name")
    if default is not None and default not in list(texts):
        raise LoadError(
            f"{path}: default_prompt_name is {default!r}, but the prompts are: {', '.join(texts) or 'none'}"
        )
    return texts, default if isinstance(default, str) else None


def _jina_prompts(adapters: Mapping[str, Path], prompts: Mapping[str, str]) -> dict[str, str]:
    """Return the instructions of Jina's tasks: the checkpoint's own where it names a task that has an adapter.

    sentence-transformers writes an empty ``query`` and ``document`` into every checkpoint that names no prompts: they
    say nothing.
    """
    own = {task: _JINA_PROMPTS.get(task, "") for task in adapters}
    named = {name: text for name, text in prompts.items() if canonical_task(name) in own}
    return {**own, **{name: text for name, text in named.items() if text or name in own}}


def _find_adapters(folder: Path) -> dict[str, Path]:
    """Return the folder of each task's adapter; the folder's name says the task."""
    return {
        task: folder / name for name, task in _ADAPTER_TASKS.items() if (folder / name / "adapter_config.json").exists()
    }


# ----------------------------------------------------------------------------------------------------------- length


def _read_transformer(folder: Path, *, is_embedder: bool) -> dict[str, Json]:
    """Return the length and lower-casing; the first releases of sentence-transformers named the file for the model."""
    for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta"):
        path = folder / f"sentence_{name}_config.json"
        config = read_object(path, optional=True)
        if config:
            if is_embedder:
                _require_plain(config, path)
            return config
    return {}


def _require_plain(config: Mapping[str, Json], path: Path) -> None:
    """Refuse what makes sentence-transformers call the tokenizer or the model in a way of its own.

    Raises:
        LoadError: names the setting.
    """
    match config.get("modality_config"):
        case {"text": {"method_output_name": str(name)}} if name != "last_hidden_state":
            raise LoadError(f"{path}: method_output_name {name!r} is not supported, only 'last_hidden_state'")
    for key in ("processing_kwargs", "query_prefix", "document_prefix"):
        if config.get(key):
            raise LoadError(f"{path}: {key} is not supported")


def _max_tokens(folder: Path, transformer: Mapping[str, Json], position_limit: int) -> int:
    """Return the length that the sentence-transformers file names, else the tokenizer's; at most the positions."""
    tokenizer = read_object(folder / "tokenizer_config.json", optional=True)
    for limit in (transformer.get("max_seq_length"), tokenizer.get("model_max_length")):
        if isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1:
            return int(min(limit, position_limit))
    return position_limit


# ------------------------------------------------------------------------------------------------------------ files


def _weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with a model's weights: safetensors if there are any, else ``pytorch_model*.bin``."""
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


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _with_fingerprint(checkpoint: Checkpoint) -> Checkpoint:
    folder = checkpoint.folder
    parts = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in (*checkpoint.all_weights, *_tokenizer_files(folder))
    }
    parts |= {"pooling": checkpoint.pooling.value, "lower_case": str(checkpoint.is_lower_cased)}
    if checkpoint.classifier is not None:
        parts["classifier"] = checkpoint.classifier.settings
    for layer in checkpoint.dense_layers:  # what the weights do not say
        parts[f"activation of {layer.name}"] = str(read_object(layer / "config.json").get("activation_function"))
    for task, adapter in checkpoint.adapters.items():
        config = read_object(adapter / "adapter_config.json")
        parts[f"scaling of {task}"] = str([config.get(key) for key in ("r", "lora_alpha", "use_rslora")])
    return replace(checkpoint, fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())
