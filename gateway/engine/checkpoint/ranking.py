"""Recognize a checkpoint that scores or classifies, and how it reads a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.engine.checkpoint.classifier import Classifier, architecture, own_class, read_classifier
from gateway.engine.checkpoint.json_files import Json, read_object
from gateway.engine.checkpoint.modules import Pooling, read_truncated_width, require_sentence_transformer
from gateway.engine.checkpoint.pair_template import (
    PairTemplate,
    has_chat_template,
    is_qwen3_reranker,
    qwen3_template,
    read_pair_template,
)
from gateway.engine.checkpoint.prompts import Prompts, read_prompts
from gateway.engine.checkpoint.score_modules import CAUSAL, ScoreModules, yes_no_head
from gateway.errors import LoadError


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a model scores, if it does.

    Attributes:
        template: the texts around the query and the text of a pair, if the model reads them as one text.
        is_llm: whether the model predicts words, and its score is the logit of one word.
        is_pooled: whether sentence-transformers' modules read the states of the transformer's tokens.
    """

    classifier: Classifier | None = None
    template: PairTemplate | None = None
    is_llm: bool = False
    is_pooled: bool = True


def read_ranking(
    folder: Path,
    root: Path,
    config: Mapping[str, Json],
    scores: ScoreModules | None,
    *,
    is_embedder: bool,
    is_plain: bool,
    source: str,
    instruction: str | None,
) -> Ranking:
    """Return how a checkpoint scores.

    Args:
        root: the folder of the transformer.
        config: the content of its ``config.json``, in transformers' words.
        is_embedder: the checkpoint's modules describe an embedder.
        is_plain: the checkpoint has no modules.
        source, instruction: see :func:`gateway.engine.checkpoint.read.read_checkpoint`.

    Raises:
        LoadError: the way of scoring is not supported.
    """
    if is_embedder:
        ranking = Ranking()
    else:
        ranking = _read(folder, root, config, scores, is_plain=is_plain, source=source, instruction=instruction)
    if instruction is not None and ranking.template is None:
        raise LoadError(
            f"{folder}: `instruction` is only for models that read a query and a text in a template, and this model does not"
            + ("; for a model that embeds, use `prompts`" if ranking.classifier is None else "")
        )
    return ranking


def _read(
    folder: Path,
    root: Path,
    config: Mapping[str, Json],
    scores: ScoreModules | None,
    *,
    is_plain: bool,
    source: str,
    instruction: str | None,
) -> Ranking:
    path = folder / "config_sentence_transformers.json"
    sentence_config = read_object(path, optional=True)
    prompts = read_prompts(sentence_config, path)
    prompt = prompts.texts.get(prompts.default or "") or None
    chosen = prompt if instruction is None else instruction
    if scores is not None:
        template = read_pair_template(root, chosen, is_declared=True) if scores.is_llm else None
        found = Ranking(scores.classifier, template, scores.is_llm, is_pooled=not scores.is_llm)
    else:
        classifier = read_classifier(folder, config, sentence_config)
        is_causal = is_plain and (architecture(config) or "").endswith(CAUSAL)
        template = None
        if is_causal or (classifier is not None and classifier.pooling is Pooling.LAST):
            template = read_pair_template(root, chosen, is_declared=not is_plain)
            if template is None and (instruction is not None or is_qwen3_reranker(source)):
                _require_qwen3(folder, config)
                template = qwen3_template(instruction)
        if is_causal and template is not None:
            if own_class(config, "AutoModelForCausalLM") is not None:
                raise LoadError(f"{folder}: it has its own code (auto_map), and may score in another way")
            return Ranking(yes_no_head(root, config), template, is_llm=True, is_pooled=False)
        if classifier is None:
            return Ranking()
        if template is None and is_plain and classifier.pooling is Pooling.LAST and has_chat_template(root):
            raise LoadError(
                f"{folder}: its chat template has no place for a query and a document, and without a template the scores of "
                "an LLM are almost random. For a model that was trained from Qwen3-Reranker, set `instruction`"
            )
        found = Ranking(classifier, template, is_pooled=False)
    if prompt is not None and found.template is None:
        raise LoadError(
            f"{path}: default_prompt_name {prompts.default!r} is not supported: a model that scores has no prompts here"
        )
    return found


def read_sentence_config(folder: Path, *, scores: bool, is_by_token: bool = False) -> tuple[Prompts, int | None]:
    """Return the prompts, and the number of dimensions to which vectors are cut.

    Args:
        scores: the model scores, and so has neither.
        is_by_token: the model makes no vector of a whole text that could be cut.

    Raises:
        LoadError: ``config_sentence_transformers.json`` describes another kind of model.
    """
    if scores:
        return Prompts(), None
    path = folder / "config_sentence_transformers.json"
    config = read_object(path, optional=True)
    if is_by_token:
        return read_prompts(config, path), None
    require_sentence_transformer(config, path)
    return read_prompts(config, path), read_truncated_width(config, path)


def _require_qwen3(folder: Path, config: Mapping[str, Json]) -> None:
    if config.get("model_type") != "qwen3":
        raise LoadError(
            f"{folder}: its chat template has no place for a query and a document, and Qwen3-Reranker's template is for "
            f"model_type 'qwen3', not {config.get('model_type')!r}"
        )
