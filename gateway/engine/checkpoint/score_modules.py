"""Read the heads of cross-encoders that sentence-transformers 6 saves as modules, and of LLMs that answer yes or no.

Three lists of modules end in scores. The first is a transformer alone, which is read by its class. The second is a
transformer with a pooling and layers (Ettin). The third is a language model with ``LogitScore``: the logit of one token
minus that of another (Qwen3-Reranker).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.engine.checkpoint.classifier import (
    Activation,
    Classifier,
    Layer,
    Linear,
    Norm,
    TokenLogit,
    architecture,
    read_function,
    read_labels,
    takes_segments,
)
from gateway.engine.checkpoint.json_files import Json, read_object
from gateway.engine.checkpoint.modules import Modules, Pooling, list_modules, read_dense, read_modules, read_pooling
from gateway.errors import LoadError

CAUSAL = "ForCausalLM"
# torch's activation classes, and transformers' names of the same functions.
_ACTIVATIONS = {"Identity": "linear", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}


@dataclass(frozen=True, slots=True)
class ScoreModules:
    """The description of a ``modules.json`` that ends in scores.

    Attributes:
        transformer: folder of the transformer, relative to the checkpoint.
        is_llm: whether the transformer predicts words.
    """

    transformer: str
    classifier: Classifier
    is_llm: bool


def read_score_modules(folder: Path) -> ScoreModules | None:
    """Return the head that ``modules.json`` describes; ``None`` without that file, and for any other list of modules.

    Raises:
        LoadError: a module has settings that are not supported.
    """
    rows = list_modules(folder)
    kinds = [kind for kind, _place in rows or ()]
    if not rows or kinds[0] != "Transformer":
        return None
    config = read_object(folder / rows[0][1] / "config.json", optional=True)
    if kinds == ["Transformer", "LogitScore"]:
        return ScoreModules(rows[0][1], _read_logit_score(folder / rows[1][1], config), is_llm=True)
    is_list = kinds[1:2] == ["Pooling"] and len(kinds) > 2 and set(kinds[2:]) <= {"Dense", "LayerNorm"}
    if not is_list or kinds[-1] != "Dense" or not _gives_scores(folder / rows[-1][1]):
        return None
    return ScoreModules(rows[0][1], _read_layers(folder, rows, config), is_llm=False)


def yes_no_head(folder: Path, config: Mapping[str, Json]) -> Classifier:
    """Return the head of an LLM that answers ``yes`` or ``no``, as ``CrossEncoder`` reads one without modules.

    Raises:
        LoadError: the vocabulary has no such tokens.
    """
    from tokenizers import Tokenizer  # slow to import

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception for a malformed file
        raise LoadError(f"{folder}/tokenizer.json: cannot be read: {error}") from error
    yes, no = (tokenizer.token_to_id(word) for word in ("yes", "no"))
    if yes is None or no is None:
        raise LoadError(f"{folder}: its vocabulary has no tokens 'yes' and 'no', whose logits are the score")
    return _logit_head(folder, config, yes, no)


def _read_logit_score(folder: Path, config: Mapping[str, Json]) -> Classifier:
    path = folder / "config.json"
    settings = read_object(path)
    unknown = sorted(settings.keys() - {"true_token_id", "false_token_id", "module_input_name"})
    if unknown or settings.get("module_input_name", "causal_logits") != "causal_logits":
        raise LoadError(f"{path}: {', '.join(unknown) or 'module_input_name'} is not supported")
    positive, negative = settings.get("true_token_id"), settings.get("false_token_id")
    if not isinstance(positive, int) or not isinstance(negative, int | None):
        raise LoadError(
            f"{path}: true_token_id and false_token_id must be ids of tokens, got {positive!r}, {negative!r}"
        )
    return _logit_head(folder.parent, config, positive, negative)


def _logit_head(folder: Path, config: Mapping[str, Json], positive: int, negative: int | None) -> Classifier:
    name = architecture(config) or ""
    size = config.get("vocab_size")
    if not name.endswith(CAUSAL):
        raise LoadError(f"{folder}: the class {name or 'of the model'} gives no logits of words, only a {CAUSAL} does")
    if config.get("final_logit_softcapping"):
        raise LoadError(f"{folder}: final_logit_softcapping is not supported in a model that reranks")
    if not isinstance(size, int) or not all(0 <= one < size for one in (positive, negative or 0)):
        raise LoadError(f"{folder}: the tokens {positive} and {negative} are not in a vocabulary of {size!r}")
    table = "embed_tokens" if config.get("tie_word_embeddings") is True else "lm_head"
    return Classifier(name, Pooling.LAST, (TokenLogit(table, positive, negative),))


def _gives_scores(folder: Path) -> bool:
    return read_object(folder / "config.json").get("module_output_name") == "scores"


def _read_layers(folder: Path, rows: list[tuple[str, str]], config: Mapping[str, Json]) -> Classifier:
    layers: list[Layer] = []
    width = 0
    for kind, place in rows[2:]:
        at = folder / place
        if kind == "LayerNorm":
            layers.append(Norm("norm", folder=at))
            continue
        dense = read_dense(at, gives_scores=place == rows[-1][1])
        if dense.activation not in _ACTIVATIONS:
            raise LoadError(
                f"{at}: activation {dense.activation} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            )
        layers += [Linear("linear", at), Activation(_ACTIVATIONS[dense.activation])]
        width = dense.width
    names = read_labels(config, folder / rows[0][1] / "config.json")
    labels = names if len(names) == width else tuple(f"LABEL_{i}" for i in range(width))
    sentence_config = read_object(folder / "config_sentence_transformers.json", optional=True)
    head = Classifier("CrossEncoder", read_pooling(folder / rows[1][1]), tuple(layers), labels)
    function = read_function(config, sentence_config, width, folder)
    return replace(head, function=function, has_segments=takes_segments(config))


def read_all_modules(folder: Path) -> tuple[Modules | None, ScoreModules | None]:
    """Return the modules that ``modules.json`` lists: those that make token states and vectors, and those with scores.

    Raises:
        LoadError: the file cannot be read, or lists modules that are not supported.
    """
    scores = read_score_modules(folder)
    return (read_modules(folder), None) if scores is None else (Modules(scores.transformer), scores)
