"""What tells a cross-encoder's checkpoint, and what its classification head is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.engine.json_files import Json, read_json
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
        norm: the same of the layer normalisation, if there is one.
        output: the same of the last layer.
        activation: transformers' name of what is between dense and norm.
        norm_eps: the layer normalisation's epsilon.
        has_segments: whether the model can be told which tokens are of the pair's second text.
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
        """What determines a score and is in no weights file; the pooling aside."""
        return f"{self.architecture}, {self.activation}, {self.norm_eps}"


def read_classifier(folder: Path, config: Mapping[str, Json]) -> Classifier | None:
    """Return the head of a checkpoint that scores pairs; ``None`` for a model that embeds.

    Args:
        config: what ``config.json`` holds.

    Raises:
        LoadError: the model classifies into several labels.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in ARCHITECTURES or _has_pooling(folder / "modules.json"):
        return None
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", _DEFAULT_LABELS)
    if num_labels != 1:
        raise LoadError(
            f"{folder}: {name} with {num_labels} labels is not supported: a model that reranks has 1, the score of a pair"
        )
    if name != "ModernBertForSequenceClassification":
        return replace(ARCHITECTURES[name], has_segments=config.get("type_vocab_size", _DEFAULT_SEGMENTS) != 1)
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


def _has_pooling(modules: Path) -> bool:
    """Tell whether sentence-transformers' files make vectors of what transformers' class would classify."""
    rows = read_json(modules) if modules.exists() else None
    kinds = [str(row.get("type")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return any(kind.rsplit(".", 1)[-1] == "Pooling" for kind in kinds)
