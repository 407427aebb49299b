"""Recognize a SPLADE model: a masked language model whose logits become a weight for each token of the vocabulary.

sentence-transformers has three layouts. The first is ``Transformer`` and ``SpladePooling``. The second has these two on the
document side of a ``Router``, and gives queries fixed weights from a table (``SparseStaticEmbedding``). The third is a
folder without ``modules.json``. It looks like any masked language model, so the registry must declare it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.engine.checkpoint.classifier import architecture
from gateway.engine.checkpoint.json_files import Json, is_present, read_object
from gateway.engine.checkpoint.modules import ModuleRow, inside, list_rows, require_known
from gateway.errors import LoadError

_SUPPORTED = (
    "supported: Transformer, SpladePooling; or a Router whose query route is a SparseStaticEmbedding and whose document "
    "route is these two"
)
_DOCUMENTS = (["Transformer", "SpladePooling"], ["MLMTransformer", "SpladePooling"])
_POOLING_KEYS = ("pooling_strategy", "activation_function", "embedding_dimension", "word_embedding_dimension")
_TASKS = {"query": "retrieval.query", "document": "retrieval.passage"}
_ROUTER = "router_config.json"
_IDF = "idf.json"


@dataclass(frozen=True, slots=True)
class MaskedLmHead:
    """The layers over a token's state that give its logits: ``decoder(norm(activation(dense(state))))``.

    The rules are those of transformers' class for masked words, in the file ``modeling_….py`` of each architecture. If the
    decoder has no tensors, its weights are the word table.

    Attributes:
        dense: name of the first layer's tensors, without ``.weight``.
        norm: name of the layer normalization's tensors.
        decoder: name of the last layer's tensors.
        bias: name of the last layer's bias, if it is not part of that layer.
        activation_key: key of the activation in the configuration; ``None`` for GELU.
        eps_key: key of the normalization's epsilon; ``None`` for 1e-12.
    """

    dense: str
    norm: str
    decoder: str
    bias: str | None
    activation_key: str | None
    eps_key: str | None = "layer_norm_eps"


_ROBERTA = MaskedLmHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", None)
_BERT = "cls.predictions"
MASKED_LM_HEADS = {
    "bert": MaskedLmHead(
        f"{_BERT}.transform.dense", f"{_BERT}.transform.LayerNorm", f"{_BERT}.decoder", f"{_BERT}.bias", "hidden_act"
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
    "distilbert": MaskedLmHead("vocab_transform", "vocab_layer_norm", "vocab_projector", None, "activation", None),
    "electra": MaskedLmHead(
        "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head", None, None
    ),
    "modernbert": MaskedLmHead("head.dense", "head.norm", "decoder", None, "classifier_activation", "norm_eps"),
    "gte": MaskedLmHead("lm_head.dense", "lm_head.norm", "lm_head.decoder", None, None),
}
"""The known heads, by ``model_type``."""
PUBLISHED_GTE_HEAD = replace(MASKED_LM_HEADS["gte"], activation_key="hidden_act")
"""The head of GTE as it was published, with ``model_type: new`` and its own code."""


@dataclass(frozen=True, slots=True)
class Splade:
    """How the logits of a text's tokens become its sparse vector.

    The rules are sentence-transformers' (``sparse_encoder/modules/splade_pooling.py``, ``sparse_static_embedding.py``).

    Attributes:
        transformer: folder of the transformer and its tokenizer, relative to the checkpoint.
        is_sum: the activations of a text's tokens are added up; otherwise the largest counts.
        is_log_twice: the activation is ``log1p(log1p(relu(x)))``; otherwise ``log1p(relu(x))``.
        max_active: the number of largest weights to keep.
        queries: folder with the tokenizer of queries, and the table with a fixed weight for each token of the vocabulary,
            so queries need no transformer. ``None`` if queries are treated like documents.
        table: file with those weights: safetensors or a pickle of ``weight``, or JSON of weights by token.
        default_task: the task of a text without a task, if queries and documents differ.
    """

    transformer: str = ""
    is_sum: bool = False
    is_log_twice: bool = False
    max_active: int | None = None
    queries: Path | None = None
    table: Path | None = None
    default_task: str | None = None

    @property
    def settings(self) -> str:
        """The settings that determine a vector and are not in a weights file."""
        return f"{self.is_sum}, {self.is_log_twice}, {self.max_active}"


def read_splade(folder: Path, *, is_asked_for: bool) -> Splade | None:
    """Return how the checkpoint in ``folder`` makes sparse vectors; ``None`` for another kind of model.

    Args:
        is_asked_for: the registry says that the model gives only sparse vectors.

    Raises:
        LoadError: the checkpoint is a sparse encoder of a form that is not supported.
    """
    path = folder / "modules.json"
    max_active = _max_active(folder)
    rows = list_rows(folder)
    if rows is None:
        return _without_modules(folder, max_active) if is_asked_for else None
    kinds = [row.kind for row in rows]
    if kinds == ["Router"]:
        return _read_router(folder, rows[0].folder, max_active)
    if not any(kind.startswith(("Splade", "Sparse", "MLM")) for kind in kinds):
        return None
    if kinds not in _DOCUMENTS:
        raise LoadError(f"{path}: a sparse encoder of the modules {', '.join(kinds)} is not supported; {_SUPPORTED}")
    return _of(folder, rows, max_active)


def require_masked_lm(folder: Path, model_type: str) -> None:
    """Refuse a sparse encoder of an architecture whose head is not known.

    Raises:
        LoadError: the architecture is not supported; the message names the supported ones.
    """
    if model_type not in MASKED_LM_HEADS:
        raise LoadError(
            f"{folder}: a sparse encoder of model_type {model_type!r} is not supported; supported: "
            f"{', '.join(MASKED_LM_HEADS)}"
        )


def _without_modules(folder: Path, max_active: int | None) -> Splade | None:
    name = architecture(read_object(folder / "config.json", optional=True)) or ""
    if not name.endswith("ForMaskedLM"):
        return None
    if is_present(folder / _IDF):
        raise LoadError(
            f"{folder}: has weights for queries ({_IDF}) and no modules.json, which defines how its documents are weighted: "
            "use a revision with modules.json"
        )
    return Splade(max_active=max_active)


def _max_active(folder: Path) -> int | None:
    path = folder / "config_sentence_transformers.json"
    number = read_object(path, optional=True).get("max_active_dims")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise LoadError(f"{path}: max_active_dims must be a positive integer, got {number!r}")
    return number


def _of(
    folder: Path,
    rows: Sequence[ModuleRow],
    max_active: int | None,
    queries: Path | None = None,
    default_task: str | None = None,
) -> Splade:
    """Return the description of the two modules that read documents."""
    foreign = [row.type for row in rows if not row.type.startswith("sentence_transformers.")]
    where = folder / rows[0].folder / "sentence_bert_config.json"
    default = "fill-mask" if rows[0].kind == "MLMTransformer" else None
    task = read_object(where, optional=True).get("transformer_task", default)
    if foreign or task != "fill-mask":
        what = (
            f"the checkpoint's own code ({foreign[0]})" if foreign else f"the transformer_task {task!r} in {where.name}"
        )
        raise LoadError(f"{folder}: a sparse encoder with {what} is not supported; {_SUPPORTED}")
    path = folder / rows[1].folder / "config.json"
    config = read_object(path)
    require_known(config, _POOLING_KEYS, path)
    strategy = config.get("pooling_strategy", "max")
    activation = config.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise LoadError(
            f"{path}: pooling_strategy {strategy!r} with activation_function {activation!r} is not supported; supported: "
            "max or sum, with relu or log1p_relu"
        )
    return Splade(
        transformer=rows[0].folder,
        is_sum=strategy == "sum",
        is_log_twice=activation == "log1p_relu",
        max_active=max_active,
        queries=queries,
        table=None if queries is None else _table(folder, queries),
        default_task=default_task,
    )


def _read_router(folder: Path, place: str, max_active: int | None) -> Splade | None:
    """Read a router; ``None`` if no route makes sparse vectors."""
    path = folder / place / _ROUTER
    config = read_object(path)
    types, structure, parameters = config.get("types"), config.get("structure"), config.get("parameters", {})
    if not isinstance(types, dict) or not isinstance(structure, dict) or not isinstance(parameters, dict):
        raise LoadError(f"{path}: must have the objects types, structure and parameters")
    routes = {name: _route(names, types, place, path) for name, names in structure.items()}
    kinds = {name: [row.kind for row in rows] for name, rows in routes.items()}
    if not any(kind.startswith(("Splade", "Sparse")) for route in kinds.values() for kind in route):
        return None
    if set(kinds) != set(_TASKS) or kinds["query"] != ["SparseStaticEmbedding"] or kinds["document"] not in _DOCUMENTS:
        found = "; ".join(f"{name}: {', '.join(route)}" for name, route in kinds.items())
        raise LoadError(f"{path}: a sparse encoder of the routes {found} is not supported; {_SUPPORTED}")
    default = parameters.get("default_route") or next(iter(kinds))
    if parameters.get("route_mappings") or default not in _TASKS:
        raise LoadError(
            f"{path}: route_mappings, and a default_route {default!r} other than query and document, are not supported"
        )
    queries = folder / routes["query"][0].folder
    return _of(folder, routes["document"], max_active, queries, _TASKS[str(default)])


def _route(names: Json, types: Mapping[str, Json], place: str, path: Path) -> list[ModuleRow]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name in types for name in names):
        raise LoadError(f"{path}: a route must list modules that are in types, got {names!r}")
    return [ModuleRow(str(types[str(name)]), inside(f"{place}/{name}".lstrip("/"), path)) for name in names]


def _table(folder: Path, queries: Path) -> Path:
    """Return the file with the fixed weights of queries."""
    path = queries / "config.json"
    config = read_object(path, optional=True)
    require_known(config, ("frozen", "path"), path)
    named = config.get("path")
    if isinstance(named, str) and named.endswith(".json"):
        places = [queries / inside(named, path), folder / inside(named, path), queries / _IDF, folder / _IDF]
    else:
        places = [queries / "model.safetensors", queries / "pytorch_model.bin"]
    table = next((place for place in places if place.exists()), None)
    if table is None:
        names = ", ".join(str(place.relative_to(folder)) for place in places)
        raise LoadError(f"{queries}: no weights of queries: none of {names}")
    return table
