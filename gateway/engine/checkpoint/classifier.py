"""Recognize a checkpoint that scores or classifies texts, and describe its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from gateway.engine.checkpoint.json_files import Json
from gateway.engine.checkpoint.modules import Pooling
from gateway.errors import LoadError
from gateway.types import LabelFunction

# transformers' number of labels if a configuration does not state it.
_DEFAULT_LABELS = 2
_DEFAULT_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a head.

    Attributes:
        tensors: name of its tensors, without ``.weight``.
        folder: folder of the module that holds them; ``None`` for the transformer's own weights.
    """

    tensors: str
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer normalization of a head; see :class:`Linear`."""

    tensors: str
    eps: float = _DEFAULT_NORM_EPS
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation of a head, by transformers' name."""

    name: str


@dataclass(frozen=True, slots=True)
class TokenLogit:
    """The logit of one token as the next token, minus that of another token, as in sentence-transformers' ``LogitScore``.

    Attributes:
        table: the matrix with a row for each token: ``lm_head``, or ``embed_tokens`` if the two share their weights.
        negative: ``None`` for the logit alone.
    """

    table: str
    positive: int
    negative: int | None


Layer: TypeAlias = Linear | Norm | Activation | TokenLogit


@dataclass(frozen=True, slots=True)
class Classifier:
    """The head of a model that scores or classifies: layers over the pooled token states.

    Attributes:
        architecture: transformers' class of the whole model.
        pooling: the pooling of the token states into the input of the first layer.
        layers: the layers in order; the last linear layer gives a number for each label.
        labels: names of the labels; a model with one label is a reranker.
        function: the function from the numbers to scores.
        has_segments: whether the model takes segment ids, which mark the tokens of the pair's second text.
        is_late: apply the layers to each token's state, and pool their outputs.
    """

    architecture: str
    pooling: Pooling
    layers: tuple[Layer, ...]
    labels: tuple[str, ...] = ("LABEL_0",)
    function: LabelFunction = LabelFunction.SIGMOID
    has_segments: bool = False
    is_late: bool = False

    @property
    def is_reranker(self) -> bool:
        return len(self.labels) == 1

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors among the transformer's weights that belong to the head."""
        layers = [layer for layer in self.layers if isinstance(layer, Linear | Norm) and layer.folder is None]
        return frozenset(f"{layer.tensors}.{part}" for layer in layers for part in ("weight", "bias"))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the modules with layers of the head."""
        layers = (layer for layer in self.layers if isinstance(layer, Linear | Norm))
        return tuple(layer.folder for layer in layers if layer.folder is not None)

    @property
    def settings(self) -> str:
        """The settings that determine a score and are not in a weights file, except the pooling."""
        parts = [layer.tensors if isinstance(layer, Linear | Norm) else str(layer) for layer in self.layers]
        eps = [str(layer.eps) for layer in self.layers if isinstance(layer, Norm)]
        return ", ".join([self.architecture, *parts, *eps, *(["late"] if self.is_late else []), *self.labels])


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of one of transformers' classes."""

    layers: tuple[Layer, ...]
    pooling: Pooling = Pooling.CLS


def _dense(dense: str, activation: str, output: str) -> tuple[Layer, ...]:
    return Linear(dense), Activation(activation), Linear(output)


# Classes with BERT's pooler, then classes with RoBERTa's classification head, then the others, each by the rules of its
# class for sequence classification. The decoders below have transformers' generic head.
_ENCODER_HEADS = {
    "Bert": _Head(_dense("bert.pooler.dense", "tanh", "classifier")),
    "Albert": _Head(_dense("albert.pooler", "tanh", "classifier")),
    "Gte": _Head(_dense("gte.pooler.dense", "tanh", "classifier")),
    "NomicBert": _Head(_dense("nomic_bert.pooler.dense", "tanh", "classifier")),
    "New": _Head(_dense("new.pooler.dense", "tanh", "classifier")),  # GTE as it was published
    "Roberta": _Head(_dense("classifier.dense", "tanh", "classifier.out_proj")),
    "XLMRoberta": _Head(_dense("classifier.dense", "tanh", "classifier.out_proj")),
    "JinaEmbeddingsV3": _Head(_dense("classifier.dense", "tanh", "classifier.out_proj")),
    "Camembert": _Head(_dense("classifier.dense", "tanh", "classifier.out_proj")),
    "MPNet": _Head(_dense("classifier.dense", "tanh", "classifier.out_proj")),
    "Electra": _Head(_dense("classifier.dense", "gelu", "classifier.out_proj")),
    "DistilBert": _Head(_dense("pre_classifier", "relu", "classifier")),
    "DebertaV2": _Head(_dense("pooler.dense", "gelu", "classifier")),
    "ModernBert": _Head((Linear("head.dense"), Activation("gelu"), Norm("head.norm"), Linear("classifier"))),
    "EuroBert": _Head(_dense("dense", "gelu", "classifier")),
}
# The number of segment types if the configuration does not state it, for the models that take segments.
_SEGMENTS = {
    "bert": 2,
    "albert": 2,
    "electra": 2,
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
    "nomic_bert": 2,
    "gte": 1,
    "deberta-v2": 0,
}
_DECODERS = ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma2", "Gemma3Text")
_CLASS = "ForSequenceClassification"
HEADS = {name + _CLASS: head for name, head in _ENCODER_HEADS.items()} | {
    name + _CLASS: _Head((Linear("score"),), pooling=Pooling.LAST) for name in _DECODERS
}
"""The known heads, by transformers' class; some depend on the configuration."""

# Code of a checkpoint that computes the same as transformers' class.
_SAME_CODE = {"NewForSequenceClassification", "GteForSequenceClassification"}
# Activations of sentence-transformers' `CrossEncoder`, as functions of labels.
_FUNCTIONS = {"Sigmoid": LabelFunction.SIGMOID, "Softmax": LabelFunction.SOFTMAX}


def read_classifier(
    folder: Path, config: Mapping[str, Json], sentence_config: Mapping[str, Json] | None = None
) -> Classifier | None:
    """Return the head of a checkpoint that scores or classifies; ``None`` if its class is not known.

    Args:
        config: the content of ``config.json``, in transformers' words.
        sentence_config: the content of ``config_sentence_transformers.json``.

    Raises:
        LoadError: the model has its own code, or labels or settings that make no sense.
    """
    name = architecture(config)
    head = HEADS.get(name or "")
    if name is None or head is None:
        return None
    own = own_class(config, "AutoModelForSequenceClassification")
    if own is not None and own not in _SAME_CODE:
        raise LoadError(
            f"{folder}: {name} has its own code (auto_map), and may score in another way than transformers'"
        )
    labels = read_labels(config, folder / "config.json")
    plain = Classifier(
        architecture=name,
        pooling=head.pooling,
        layers=head.layers,
        labels=labels,
        function=read_function(config, sentence_config or {}, len(labels), folder),
        has_segments=takes_segments(config),
    )
    return _configured(plain, config, folder / "config.json")


def takes_segments(config: Mapping[str, Json]) -> bool:
    """Return whether a model distinguishes the texts of a pair by segment ids."""
    return config.get("type_vocab_size", _SEGMENTS.get(str(config.get("model_type")), 0)) not in (0, 1) and (
        config.get("model_type") in _SEGMENTS
    )


def architecture(config: Mapping[str, Json]) -> str | None:
    """Return transformers' class of the whole model; ``None`` if the configuration names no class."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    return name if isinstance(name, str) and name else None


def own_class(config: Mapping[str, Json], auto_class: str) -> str | None:
    """Return the name of the checkpoint's own class for one of transformers' ``Auto`` classes."""
    classes = config.get("auto_map")
    value = classes.get(auto_class) if isinstance(classes, dict) else None
    if isinstance(value, list):  # a tokenizer has two: slow and fast
        value = next((name for name in value if name), None)
    return value.rpartition(".")[2] if isinstance(value, str) else None


def _configured(classifier: Classifier, config: Mapping[str, Json], path: Path) -> Classifier:
    """Return the head with the settings that some classes define for it.

    Raises:
        LoadError: a setting is not supported.
    """
    layers, pooling = classifier.layers, config.get("classifier_pooling")
    match classifier.architecture.removesuffix(_CLASS):
        case "ModernBert":
            eps = config.get("norm_eps", _DEFAULT_NORM_EPS)
            if not isinstance(eps, int | float):
                raise LoadError(f"{path}: norm_eps must be a number, got {eps!r}")
            activation = Activation(str(config.get("classifier_activation", "gelu")))
            layers = (layers[0], activation, Norm("head.norm", float(eps)), layers[3])
            pooling = pooling or "cls"
            known = {"cls": Pooling.CLS, "mean": Pooling.MEAN}
        case "EuroBert":
            pooling = pooling or "late"
            known = {"bos": Pooling.CLS, "mean": Pooling.MEAN, "late": Pooling.MEAN}
        case "DebertaV2":
            layers = (layers[0], Activation(str(config.get("pooler_hidden_act", "gelu"))), layers[2])
            return replace(classifier, layers=layers)
        case _:
            return classifier
    if not isinstance(pooling, str) or pooling not in known:
        raise LoadError(f"{path}: classifier_pooling {pooling!r} is not supported; supported: {', '.join(known)}")
    return replace(classifier, layers=layers, pooling=known[pooling], is_late=pooling == "late")


def read_labels(config: Mapping[str, Json], path: Path) -> tuple[str, ...]:
    """Return the names of the labels, in order of their numbers; transformers' default names if the file has no names.

    Raises:
        LoadError: the labels are not numbered from 0, or their counts contradict each other.
    """
    names, count = config.get("id2label"), config.get("num_labels")
    if names is None or names == {}:
        count = _DEFAULT_LABELS if count is None else count
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise LoadError(f"{path}: num_labels must be a positive integer, got {count!r}")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise LoadError(f"{path}: id2label must have a name for each number from 0 on, got {names!r}")
    if count is not None and count != len(names):
        raise LoadError(f"{path}: num_labels is {count!r}, but id2label has {len(names)} names")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def read_function(
    config: Mapping[str, Json], sentence_config: Mapping[str, Json], num_labels: int, folder: Path
) -> LabelFunction:
    """Return the function from the head's numbers to scores, as in transformers and ``CrossEncoder``.

    Raises:
        LoadError: the function is not supported.
    """
    own = config.get("sentence_transformers")
    path = sentence_config.get("activation_fn") or (own.get("activation_fn") if isinstance(own, dict) else None)
    path = path or config.get("sbert_ce_default_activation_function")
    if isinstance(path, str) and path.startswith("torch."):  # any other value is code, which CrossEncoder ignores
        name = path.rpartition(".")[2]
        if name not in ("Identity", *_FUNCTIONS) or (name == "Softmax" and num_labels == 1):
            raise LoadError(
                f"{folder}: the activation_fn {path!r} of its scores is not supported; supported: Identity, Sigmoid, and "
                "Softmax of several labels"
            )
        if num_labels > 1 and name in _FUNCTIONS:
            return _FUNCTIONS[name]
    match config.get("problem_type"):
        case None | "single_label_classification" | "multi_label_classification" | "regression" if num_labels == 1:
            return LabelFunction.SIGMOID  # as `CrossEncoder`, whatever the model was trained for
        case None | "single_label_classification":
            return LabelFunction.SOFTMAX
        case "multi_label_classification":
            return LabelFunction.SIGMOID
        case "regression":
            return LabelFunction.NONE
        case other:
            raise LoadError(f"{folder}/config.json: problem_type {other!r} is not supported")
