"""Read the prompt template of an LLM reranker: the texts before, between and after a query and a document.

A chat template with the roles ``query`` and ``document`` defines them, as sentence-transformers 6 writes and reads it (its
file base/modality.py). Qwen's earlier models have a chat template with ordinary roles. Their template for pairs is in the
code on their model cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from gateway.config.files import open_regular
from gateway.engine.checkpoint.json_files import Json, is_present, read_object
from gateway.errors import LoadError

QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# Repositories whose model cards show Qwen's template.
_QWEN3_RERANKER = re.compile(r"(?:Qwen/Qwen3-Reranker-[\w.]+|tomaarsen/Qwen3-Reranker-[\w.]+-seq-cls)")
_QWEN3_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {}\n<Query>: '
)
_QWEN3_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# Placeholders that occur in no template.
_QUERY, _DOCUMENT = "qUeRy-4711", "dOcUmEnT-0815"
# Probes for a template that changes its inputs (white space at the ends, HTML characters), and so the tokens.
_PROBES = ((" a  query\n", "\n<a> document "), ("", ""))


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The texts around a query and a document."""

    before: str
    between: str
    after: str


def qwen3_template(instruction: str | None) -> PairTemplate:
    """Return Qwen3-Reranker's template, as on its model card."""
    return PairTemplate(_QWEN3_BEFORE.format(instruction or QWEN3_INSTRUCTION), "\n<Document>: ", _QWEN3_AFTER)


def is_qwen3_reranker(source: str) -> bool:
    """Return whether a source is a repository whose model card shows Qwen's template."""
    return _QWEN3_RERANKER.fullmatch(source) is not None


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer in ``folder`` has a chat template of any kind."""
    return read_chat_template(folder) is not None


def read_pair_template(folder: Path, instruction: str | None, *, is_declared: bool) -> PairTemplate | None:
    """Return the template for pairs of the checkpoint in ``folder``; ``None`` if it has no template for pairs.

    Args:
        instruction: the content of a message with the role ``system``; ``None`` for no such message.
        is_declared: the checkpoint says that the model is a reranker; otherwise a template that accepts any role does not
            count.

    Raises:
        LoadError: the template is for pairs, but its form is not supported.
    """
    config = read_object(folder / "tokenizer_config.json", optional=True)
    template = read_chat_template(folder)
    if template is None:
        return None
    sentence = read_object(folder / "sentence_bert_config.json", optional=True)
    options = read_options(sentence, folder)
    if sentence and options is None:  # sentence-transformers would not use the chat template either
        return None
    variables = {**special_tokens(config), **(options or {})}
    render = Renderer(template, variables, is_structured=is_structured(sentence, template))
    whole = render(_messages(instruction, _QUERY, _DOCUMENT))
    if whole is None or whole.count(_QUERY) != 1 or whole.count(_DOCUMENT) != 1:
        return None
    other = render(_messages(instruction, _QUERY, _DOCUMENT, roles=("one-role", "other-role")))
    if not is_declared and other is not None and _QUERY in other and _DOCUMENT in other:
        return None  # it accepts any role: the template of an ordinary LLM
    where = f"{folder}: its chat template for pairs"
    before, _, rest = whole.partition(_QUERY)
    between, _, after = rest.partition(_DOCUMENT)
    if _DOCUMENT in before:
        raise LoadError(f"{where} puts the document before the query, which is not supported")
    if instruction and instruction not in whole:
        raise LoadError(f"{where} has no place for an instruction (a message of the role 'system')")
    for query, document in _PROBES:
        if render(_messages(instruction, query, document)) != f"{before}{query}{between}{document}{after}":
            raise LoadError(f"{where} changes the given texts, which is not supported")
    return PairTemplate(before, between, after)


def read_chat_template(folder: Path) -> str | None:
    """Return the tokenizer's chat template, if it has one.

    Raises:
        LoadError: it cannot be read.
    """
    file = folder / "chat_template.jinja"
    if is_present(file):
        try:
            with TextIOWrapper(open_regular(file), encoding="utf-8") as text:
                return text.read()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"{file}: cannot be read: {error}") from error
    template = read_object(folder / "tokenizer_config.json", optional=True).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _messages(
    instruction: str | None, query: str, document: str, roles: Sequence[str] = ("query", "document")
) -> list[tuple[str, str]]:
    system = [("system", instruction)] if instruction else []
    return [*system, *zip(roles, (query, document), strict=True)]


def read_options(sentence: Mapping[str, Json], folder: Path) -> dict[str, Json] | None:
    """Return the arguments of the chat template; ``None`` if the checkpoint's modules do not use it."""
    modalities = sentence.get("modality_config")
    if not isinstance(modalities, dict) or "message" not in modalities:
        return None
    processing = sentence.get("processing_kwargs")
    options = processing.get("chat_template") if isinstance(processing, dict) else None
    if not isinstance(options, dict | None):
        raise LoadError(f"{folder}/sentence_bert_config.json: chat_template must be an object, got {options!r}")
    return dict(options or {})


def is_structured(sentence: Mapping[str, Json], template: str) -> bool:
    """Return whether a message's content is a list of parts, by sentence-transformers' rule."""
    match sentence.get("modality_config"):
        case {"message": {"format": "structured"}}:
            return True
        case {"message": {"format": "flat"}}:
            return False
    return "content[0]" in template or "content['" in template


def special_tokens(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the special tokens of a ``tokenizer_config.json``, which templates know by their names."""
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in special.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


class Renderer:
    """Renders messages with a chat template, as transformers' tokenizers do."""

    def __init__(self, template: str, variables: Mapping[str, Json], *, is_structured: bool) -> None:
        self._template = template
        self._variables = variables
        self._is_structured = is_structured

    def __call__(self, messages: Sequence[tuple[str, str]]) -> str | None:
        """Return the text of messages, each a role and its content; ``None`` if the template refuses them."""
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

        render: Any = render_jinja_template  # its declared return type is wrong
        content = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._is_structured else text}
            for role, text in messages
        ]
        try:
            texts, _masks = render([content], chat_template=self._template, **self._variables)
        except Exception:  # a template may raise any error for unknown roles
            return None
        return str(texts[0])
