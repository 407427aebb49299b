"""Recognize a cross-encoder's checkpoint, and describe its classification head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

# transformers' numbers of labels and segments where a configuration says nothing.
_DEFAULT_LABELS = 2
_DEFAULT_SEGMENTS = 2
_DEFAULT_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Classifier:
    """The head of a cross-encoder with one label: ``output(norm(activation(dense(pooled state))))``.

    The rules are transformers': ``XLMRobertaClassificationHead``, ``BertPooler`` with a linear layer behind it, and
    ``ModernBertPredictionHead`` with one behind it.

    Attributes:
        architecture: transformers' class of the whole model.
        pooling: ``cls`` or ``mean``: what the head reads off the token states.
        dense: name of the first layer's tensors, without ``.weight``.
        norm: the same of the layer normalization, if there is one.
        output: the same of the last layer.
        activation: transformers' name of the activation between dense and norm.
        norm_eps: the layer normalization's epsilon.
        has_segments: whether the model takes segment ids, which mark the tokens of the pair's second text.
    """

    architecture: str
    pooling: str
    dense: str
    norm: str | None
    output: str
    activation: str
    norm_eps: float = _DEFAULT_NORM_EPS
    has_segments: bool = False

    @property
    def settings(self) -> str:
        """The settings that determine a score and are not in a weights file, except the pooling."""
        return f"{self.architecture}, {self.activation}, {self.norm_eps}"


def read_classifier(folder: Path, config: Mapping[str, Json]) -> Classifier | None:
    """Return the head of a checkpoint that scores pairs; ``None`` if its class is not known.

    Args:
        config: the content of ``config.json``, in transformers' words.

    Raises:
        LoadError: the model classifies into several labels, or with its own code.
    """
    name = architecture(config)
    if name not in ARCHITECTURES:
        return None
    if own_class(config, "AutoModelForSequenceClassification") is not None:
        raise LoadError(
            f"{folder}: {name} has its own code (auto_map), and may score in another way than transformers'"
        )
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", _DEFAULT_LABELS)
    if num_labels != 1:
        raise LoadError(
            f"{folder}: {name} with {num_labels} labels is not supported: a model that reranks has 1, the score of a pair"
        )
    if name != "ModernBertForSequenceClassification":
        return replace(ARCHITECTURES[name], has_segments=config.get("type_vocab_size", _DEFAULT_SEGMENTS) not in (0, 1))
    pooling, eps = config.get("classifier_pooling", "cls"), config.get("norm_eps", _DEFAULT_NORM_EPS)
    if pooling not in ("cls", "mean") or not isinstance(eps, int | float):
        raise LoadError(f"{folder}/config.json: classifier_pooling {pooling!r} or norm_eps {eps!r} is not supported")
    activation = str(config.get("classifier_activation", "gelu"))
    return replace(ARCHITECTURES[name], pooling=str(pooling), activation=activation, norm_eps=float(eps))


ARCHITECTURES = {
    one.architecture: one
    for one in (
        Classifier(
            "XLMRobertaForSequenceClassification", "cls", "classifier.dense", None, "classifier.out_proj", "tanh"
        ),
        Classifier("BertForSequenceClassification", "cls", "bert.pooler.dense", None, "classifier", "tanh"),
        Classifier("ModernBertForSequenceClassification", "cls", "head.dense", "head.norm", "classifier", "gelu"),
    )
}
"""The heads that are known, by transformers' class; ModernBERT's differs with its configuration."""


def architecture(config: Mapping[str, Json]) -> str | None:
    """Return transformers' class of the whole model; ``None`` where the configuration names none."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    return name if isinstance(name, str) and name else None


def own_class(config: Mapping[str, Json], auto_class: str) -> str | None:
    """Return the name of the checkpoint's own class for one of transformers' ``Auto`` classes."""
    classes = config.get("auto_map")
    value = classes.get(auto_class) if isinstance(classes, dict) else None
    if isinstance(value, list):  # a tokenizer's, slow and fast
        value = next((name for name in value if name), None)
    return value.rpartition(".")[2] if isinstance(value, str) else None
