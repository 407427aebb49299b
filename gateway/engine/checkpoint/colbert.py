"""Recognize a multi-vector model (ColBERT), and describe its steps from a text to a vector for each token.

sentence-transformers' ``MultiVectorEncoder`` reads three layouts (``multi_vector_encoder/model.py``). The first is its own.
PyLate's has its settings in ``config_sentence_transformers.json``. Stanford's ``HF_ColBERT`` has its settings in
``artifact.metadata``, and its projection among the transformer's weights.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gateway.engine.checkpoint.classifier import architecture
from gateway.engine.checkpoint.files import weights_files
from gateway.engine.checkpoint.headers import read_shapes
from gateway.engine.checkpoint.json_files import Json, read_flag, read_object
from gateway.engine.checkpoint.modules import (
    DenseLayer,
    ModuleRow,
    list_rows,
    read_token_dense,
    require_known,
)
from gateway.engine.checkpoint.transformer import as_length
from gateway.errors import LoadError

_CONFIG = "config_sentence_transformers.json"
_SUPPORTED = "supported: Transformer, then Dense layers over tokens, then optionally MultiVectorMask and Normalize"
_QUERY, _DOCUMENT = "query", "document"
# Keys of PyLate's configuration. Any one of them identifies the layout.
_PYLATE_KEYS = {"query_prefix", "document_prefix", "attend_to_expansion_tokens", "skiplist_words", "do_query_expansion"}
_EXPANSION_KEYS = {"strategy", "attend", "token", "length"}
_MASK_KEYS = ("skiplist_words", "skiplist_tasks", "keep_only_token_ids")
# ColBERT's default lengths and markers (sentence-transformers and PyLate have the same).
_QUERY_LENGTH = 32
_MARKERS = {_QUERY: "[unused0]", _DOCUMENT: "[unused1]"}
STANFORD_CLASS = "HF_ColBERT"
STANFORD_PROJECTION = "linear"
"""Name of the projection's tensors among the transformer's weights, without ``.weight``."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """The mask tokens that are appended to a query; each gets a vector.

    Attributes:
        length: number of tokens of a query, mask tokens included.
        is_exact: a query always has exactly this length, and a longer one is cut; otherwise a longer query gets no mask
            tokens.
        is_attended: other tokens attend to the mask tokens.
        token: the token to append, if it is neither the tokenizer's mask token nor its replacement, the end of a text.
    """

    length: int
    is_exact: bool = True
    is_attended: bool = False
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Colbert:
    """The steps from the states of a text's tokens to its vectors.

    Attributes:
        transformer: folder of the transformer and its tokenizer, relative to the checkpoint.
        width: dimensions of a token's vector.
        layers: the linear layers over each token's state, in order, by their folder.
        has_projection: the only layer is among the transformer's weights (:data:`STANFORD_PROJECTION`).
        is_normalized: whether each vector has L2 norm 1.
        prompts: the text before a query and a document; it begins with the marker.
        markers: tokens that must stay whole where a prompt has them.
        query_length, document_length: the longest query and document, if the files name them.
        expansion: the mask tokens that are appended to a query, if there are any.
        skipped: words whose tokens get no vector.
        skips: the texts to which ``skipped`` applies: queries, documents, or both.
        is_mean: the score of a pair is the mean over the query's vectors; otherwise their sum.
    """

    transformer: str
    width: int
    layers: Mapping[str, DenseLayer] = field(default_factory=dict)
    has_projection: bool = False
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    markers: Sequence[str] = ()
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skipped: Sequence[str] = ()
    skips: Sequence[str] = (_DOCUMENT,)
    is_mean: bool = False

    @property
    def settings(self) -> str:
        """The settings that determine vectors, and are not in a weights file or a prompt."""
        expansion = None if self.expansion is None else asdict(self.expansion)
        lengths = self.query_length, self.document_length
        return str((self.is_normalized, self.markers, lengths, expansion, self.skipped, self.skips))

    def longest_document(self, longest: int) -> int:
        """Return the length at which documents are cut, for a model that takes texts of up to ``longest`` tokens."""
        return self.document_length or longest

    def longest_query(self, longest: int) -> int:
        """Return the length at which queries are cut, mask tokens included."""
        if self.expansion is None:
            return self.query_length or longest
        return (
            self.expansion.length
            if self.expansion.is_exact
            else max(self.query_length or longest, self.expansion.length)
        )


def read_colbert(folder: Path) -> Colbert | None:
    """Return the description of a multi-vector checkpoint; ``None`` for another kind of model.

    Raises:
        LoadError: the checkpoint is a multi-vector model of a form that is not supported.
    """
    path = folder / "modules.json"
    config = read_object(folder / _CONFIG, optional=True)
    rows = list_rows(folder)
    if rows is None:
        is_stanford = architecture(read_object(folder / "config.json", optional=True)) == STANFORD_CLASS
        return _read_stanford(folder, config) if is_stanford else None
    is_pylate = config.get("model_type") == "ColBERT" or any(row.type.startswith("pylate.") for row in rows)
    is_pylate = is_pylate or ("model_type" not in config and bool(_PYLATE_KEYS & set(config)))
    if not is_pylate and config.get("model_type") != "MultiVectorEncoder":
        return None
    kinds = [row.kind for row in rows]
    dense = [row for row in rows if row.kind == "Dense"]
    tail = kinds[1 + len(dense) :]
    allowed = ([],) if is_pylate else ([], ["Normalize"], ["MultiVectorMask"], ["MultiVectorMask", "Normalize"])
    is_tail = tail in allowed or (not is_pylate and tail == ["Normalize", "MultiVectorMask"])
    foreign = [row.type for row in rows if not row.type.startswith(("sentence_transformers.", "pylate."))]
    if kinds[: 1 + len(dense)] != ["Transformer", *["Dense"] * len(dense)] or not is_tail or not dense or foreign:
        raise LoadError(
            f"{path}: a multi-vector model (ColBERT) of the modules {', '.join(foreign or kinds)} is not supported; "
            f"{_SUPPORTED}"
        )
    return _read_pylate(folder, config, rows, dense) if is_pylate else _read_native(folder, config, rows, dense)


def _layers(folder: Path, dense: Sequence[ModuleRow]) -> dict[str, DenseLayer]:
    return {row.folder: read_token_dense(folder / row.folder) for row in dense}


def _is_mean(config: Mapping[str, Json]) -> bool:
    return str(config.get("similarity_fn_name") or "").lower() == "meanmaxsim"


def _own_prompts(config: Mapping[str, Json], path: Path) -> dict[str, str]:
    """Return the named prompts; for documents, the first of three names counts, as in sentence-transformers."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(text is None or isinstance(text, str) for text in prompts.values()):
        raise LoadError(f"{path}: prompts must be an object of texts by name, got {prompts!r}")
    texts = {name: str(text or "") for name, text in prompts.items()}
    document = next((texts[name] for name in (_DOCUMENT, "passage", "corpus") if name in texts), "")
    return {_QUERY: texts.get(_QUERY, ""), _DOCUMENT: document}


# ---------------------------------------------------------------------------------------- sentence-transformers' own


def _read_native(
    folder: Path, config: Mapping[str, Json], rows: Sequence[ModuleRow], dense: Sequence[ModuleRow]
) -> Colbert:
    places = {row.kind: folder / row.folder / "config.json" for row in rows}
    layers = _layers(folder, dense)
    if "Normalize" in places:
        normalize = read_object(places["Normalize"], optional=True)
        names = {normalize.get(f"module_{end}_name") for end in ("input", "output")} - {None}
        if names != {"token_embeddings"}:
            raise LoadError(f"{places['Normalize']}: must normalize token_embeddings, got {normalize!r}")
    mask = places.get("MultiVectorMask")
    skipped, skips = ((), (_DOCUMENT,)) if mask is None else _read_mask(mask)
    where = folder / rows[0].folder / "sentence_bert_config.json"
    transformer = read_object(where, optional=True)
    expansion = _read_expansion(transformer.get("query_expansion"), where)
    if expansion is not None and mask is None:
        raise LoadError(f"{where}: query_expansion without a MultiVectorMask, which gives its tokens vectors")
    return Colbert(
        transformer=rows[0].folder,
        width=list(layers.values())[-1].width,
        layers=layers,
        is_normalized="Normalize" in places,
        prompts=_own_prompts(config, folder / _CONFIG),
        query_length=_length(transformer, "query_length", where),
        document_length=_length(transformer, "document_length", where),
        expansion=expansion,
        skipped=skipped,
        skips=skips,
        is_mean=_is_mean(config),
    )


def _read_mask(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words whose tokens get no vector, and the texts to which that applies."""
    config = read_object(path)
    require_known(config, _MASK_KEYS, path)
    if config.get("keep_only_token_ids"):
        raise LoadError(f"{path}: keep_only_token_ids, which is for images as documents, is not supported")
    tasks = config.get("skiplist_tasks", [_DOCUMENT])
    skips = _words(tasks if isinstance(tasks, list) else [tasks], path, "skiplist_tasks")
    if not set(skips) <= {_QUERY, _DOCUMENT}:
        raise LoadError(f"{path}: skiplist_tasks must be of {_QUERY} and {_DOCUMENT}, got {skips!r}")
    return _words(config.get("skiplist_words") or [], path, "skiplist_words"), skips


def _words(value: Json, path: Path, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise LoadError(f"{path}: {key} must be a list of words, got {value!r}")
    return tuple(str(word) for word in value)


def _read_expansion(value: Json, path: Path) -> Expansion | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - _EXPANSION_KEYS or value.get("strategy") not in ("fixed", "min"):
        raise LoadError(
            f"{path}: query_expansion must be an object of {', '.join(sorted(_EXPANSION_KEYS))}, got {value!r}"
        )
    token = value.get("token")
    length = _length(value, "length", path)
    if (
        length is None
        or not (token is None or isinstance(token, str))
        or not isinstance(value.get("attend", False), bool)
    ):
        raise LoadError(f"{path}: query_expansion must have a length, and a text as token if any, got {value!r}")
    return Expansion(length, value["strategy"] == "fixed", bool(value.get("attend", False)), token)


def _length(config: Mapping[str, Json], key: str, path: Path) -> int | None:
    value = config.get(key)
    length = as_length(value)
    if value is not None and length is None:
        raise LoadError(f"{path}: {key} must be a positive number of tokens, got {value!r}")
    return length


# -------------------------------------------------------------------------------------------------------- PyLate's


def _read_pylate(
    folder: Path, config: Mapping[str, Json], rows: Sequence[ModuleRow], dense: Sequence[ModuleRow]
) -> Colbert:
    path = folder / _CONFIG
    layers = _layers(folder, dense)
    prompts = _own_prompts(config, path)
    markers = {name: config.get(f"{name}_prefix") or "" for name in (_QUERY, _DOCUMENT)}
    for name, marker in markers.items():
        if not isinstance(marker, str):
            raise LoadError(f"{path}: {name}_prefix must be a text, got {marker!r}")
        prompts[name] = marker + prompts[name].removeprefix(marker)
    query_length = _length(config, "query_length", path)
    expansion = None
    if "query_expansion" in config:
        expansion = _read_expansion(config["query_expansion"], path)
    # Null is not false here, alone of all flags.
    elif config.get("do_query_expansion") is None or read_flag(config, "do_query_expansion", path, default=True):
        older = read_flag(config, "attend_to_mask_tokens", path, default=False)
        attends = read_flag(config, "attend_to_expansion_tokens", path, default=older)
        expansion = Expansion(query_length or _QUERY_LENGTH, is_attended=attends)
        query_length = None
    words = config.get("skiplist_words")
    return Colbert(
        transformer=rows[0].folder,
        width=list(layers.values())[-1].width,
        layers=layers,
        prompts=prompts,
        markers=tuple(str(marker) for marker in markers.values() if marker),
        query_length=query_length,
        document_length=_length(config, "document_length", path),
        expansion=expansion,
        skipped=tuple(string.punctuation) if words is None else _words(words, path, "skiplist_words"),
        is_mean=_is_mean(config),
    )


# ------------------------------------------------------------------------------------------------------ Stanford's


def _read_stanford(folder: Path, config: Mapping[str, Json]) -> Colbert:
    path = folder / "artifact.metadata"
    if not path.exists():
        raise LoadError(f"{path}: no such file, and it defines the lengths and markers of queries and documents")
    metadata = read_object(path)
    shape = read_shapes(weights_files(folder)).get(f"{STANFORD_PROJECTION}.weight")
    if shape is None or len(shape) != 2:
        raise LoadError(f"{folder}: {STANFORD_CLASS} without its projection, the tensor {STANFORD_PROJECTION}.weight")
    prompts = _own_prompts(config, folder / _CONFIG)
    named = {_QUERY: metadata.get("query_token_id"), _DOCUMENT: metadata.get("doc_token_id")}
    markers = {name: f"{token or _MARKERS[name]} " for name, token in named.items()}
    return Colbert(
        transformer="",
        width=shape[0],
        has_projection=True,
        prompts={name: prompts[name] or marker for name, marker in markers.items()},
        markers=tuple(markers.values()),
        document_length=_length(metadata, "doc_maxlen", path),
        expansion=Expansion(
            _length(metadata, "query_maxlen", path) or _QUERY_LENGTH,
            is_attended=read_flag(metadata, "attend_to_mask_tokens", path, default=False),
        ),
        skipped=tuple(string.punctuation) if read_flag(metadata, "mask_punctuation", path, default=True) else (),
    )
