"""Decode the token ids that some clients send in place of texts.

LangChain's ``OpenAIEmbeddings`` sends ids of OpenAI's ``cl100k_base`` vocabulary by default. They are decoded back to
the text they came from; they are never taken for ids of the served model, which would give a plausible wrong vector.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.errors import BadInput

if TYPE_CHECKING:
    from tiktoken import Encoding

# Name of the vocabulary in tiktoken's cache: the sha1 of the address that tiktoken would download it from.
_CACHED_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# More than any model takes. One id can stand for a hundred characters, so that a body of 16 MB would become a text of 340.
_MAX_IDS = 100_000
_ADVICE = "send texts; with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False"


class TokenIdDecoder:
    """Decodes ``cl100k_base`` token ids, if the vocabulary is at hand.

    Args:
        cache_dir: tiktoken's cache folder; ``None`` for ``TIKTOKEN_CACHE_DIR`` or tiktoken's own default.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._cache_dir = cache_dir

    def decode(self, ids: Sequence[int], where: str) -> str:
        """Return the text that ``ids`` stand for.

        Raises:
            BadInput: the vocabulary is not at hand, or an id is outside of it; says what to do instead.
        """
        if len(ids) > _MAX_IDS:
            raise BadInput(f"{where} holds {len(ids)} token ids, the limit is {_MAX_IDS}: send texts", param="input")
        encoding = _load(self._cache_dir)
        if encoding is None:
            raise BadInput(
                f"{where} holds token ids, and the cl100k_base vocabulary that they belong to is not at hand: {_ADVICE}",
                param="input",
            )
        try:
            return encoding.decode(list(ids))
        except (KeyError, OverflowError):
            raise BadInput(
                f"{where} holds token ids that are not in the cl100k_base vocabulary (0 to {encoding.max_token_value}): "
                f"{_ADVICE}",
                param="input",
            ) from None


@cache
def _load(cache_dir: Path | None) -> Encoding | None:
    """Load the vocabulary from tiktoken's cache; never from the network, where tiktoken would look for it."""
    if find_spec("tiktoken") is None:
        return None
    folder = cache_dir or Path(
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or Path(tempfile.gettempdir()) / "data-gym-cache"
    )
    vocabulary = folder / _CACHED_NAME
    # A damaged file would be deleted and downloaded.
    if not vocabulary.is_file() or hashlib.sha256(vocabulary.read_bytes()).hexdigest() != _SHA256:
        return None
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # tiktoken takes it from nowhere else
    import tiktoken

    return tiktoken.get_encoding("cl100k_base")
