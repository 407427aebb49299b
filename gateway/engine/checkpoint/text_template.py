"""Read the chat template around each text of an embedder that was made from a chat model. Does not import torch.

sentence-transformers (its file ``base/modules/transformer.py``) makes each text a message of the role ``user``, after a
message of the role ``system`` with the instruction, if there is one. When it saves a language model whose tokenizer has a
chat template, it notes that texts are put into that template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json, read_object
from gateway.engine.checkpoint.pair_template import (
    Renderer,
    is_structured,
    read_chat_template,
    read_options,
    special_tokens,
)
from gateway.errors import LoadError

# A placeholder that occurs in no template, and texts that a template might change.
_TEXT = "tExT-0815"
_PROBES = (" a  text\n", "<a> & 'b'", "")
# Values that sentence-transformers or transformers gives a template, and that change from call to call.
_CHANGING = re.compile(r"\{[{%][^}]*?\b(strftime_now|task)\b")
# Arguments for the tokens rather than for the template.
_OF_TOKENS = {"restore_suffix", "truncation", "max_length", "padding", "return_tensors", "return_dict", "tokenize"}


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A chat template, and the values that it is rendered with.

    Attributes:
        has_parts: a message's content is a list of parts.
    """

    folder: Path
    source: str
    variables: Mapping[str, Json]
    has_parts: bool

    @property
    def settings(self) -> str:
        """Everything that determines the text around a text."""
        return json.dumps([self.source, self.variables, self.has_parts], sort_keys=True)

    def around(self, instruction: str) -> tuple[str, str]:
        """Return the texts before and after a text.

        Raises:
            LoadError: the template changes the given texts, or refuses the messages.
        """
        render = Renderer(self.source, self.variables, is_structured=self.has_parts)
        system = [("system", instruction)] if instruction else []
        whole = render([*system, ("user", _TEXT)])
        if whole is None:
            raise LoadError(
                f"{self.folder}: its chat template refuses a message of the role 'user'"
                + (" after one of the role 'system', which sentence-transformers makes of a prompt" if system else "")
            )
        before, _, after = whole.partition(_TEXT)
        if any(render([*system, ("user", text)]) != f"{before}{text}{after}" for text in (_TEXT, *_PROBES)):
            raise LoadError(f"{self.folder}: its chat template changes the given texts, which is not supported")
        return before, after


def read_text_template(folder: Path) -> TextTemplate | None:
    """Return the chat template around the texts of the embedder in ``folder``; ``None`` if texts are not put into one.

    Raises:
        LoadError: the template is of a form that is not supported.
    """
    path = folder / "sentence_bert_config.json"
    sentence = read_object(path, optional=True)
    options = read_options(sentence, folder)
    if options is None:
        return None
    source = read_chat_template(folder)
    if source is None:
        raise LoadError(
            f"{path}: modality_config has 'message': each text is put into the chat template, and there is no chat template "
            "here"
        )
    if found := _CHANGING.search(source):
        raise LoadError(
            f"{folder}: its chat template depends on {found[1]}, so the vector of a text would change from call to call"
        )
    if strange := sorted(_OF_TOKENS & options.keys()):
        raise LoadError(f"{path}: processing_kwargs: chat_template: {', '.join(strange)} is not supported")
    config = read_object(folder / "tokenizer_config.json", optional=True)
    variables = {**special_tokens(config), **options}
    return TextTemplate(folder, source, variables, is_structured(sentence, source))
