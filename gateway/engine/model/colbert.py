"""ColBERT: a vector for each token, with mask tokens after a query and no vectors for a document's punctuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.nn import functional

from gateway.engine.checkpoint.colbert import STANFORD_PROJECTION, Colbert, Expansion
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.weights import read_tensors
from gateway.engine.model.heads import Dense, TokenHead, linear_of, reading, require_inputs, token_ids
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.states import TokenStates
from gateway.engine.model.tokenizer import Steps, Tokenizer
from gateway.errors import LoadError
from gateway.types import MultiVector, Truncate

_QUERY = "retrieval.query"


def keep_markers_whole(tokenizer: Any, colbert: Colbert) -> None:
    """Keep the tokenizer from splitting the markers of queries and documents.

    The rule is sentence-transformers' (``multi_vector_encoder/model.py``): a marker, or its first word, becomes a special
    token if the vocabulary has it.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint, which is changed.
    """
    added, vocab = set(tokenizer.added_tokens_encoder), tokenizer.get_vocab()
    for marker in colbert.markers:
        words = [word for word in (marker, *marker.split(None, 1)[:1]) if word in added or word in vocab]
        if words and tokenizer.tokenize(words[0]) != [words[0]]:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [AddedToken(words[0], normalized=False, special=True)]}
            )


class QueryTokenizer(Tokenizer):
    """A tokenizer of queries, which appends mask tokens to each query.

    Args:
        mask_id: id of the mask token.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, expansion: Expansion, mask_id: int) -> None:
        super().__init__(tokenizer, max_tokens)
        self._expansion = expansion
        self._mask_id = mask_id
        self.largest_id = max(self.largest_id, mask_id)

    def read(
        self,
        texts: Sequence[str],
        instruction: str,
        truncate: Truncate,
        first_index: int = 0,
        name: str = "input",
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        rows = yield from super().read(texts, instruction, truncate, first_index, name, max_text_tokens)
        return [self._expanded(row) for row in rows]

    def _expanded(self, row: Tokens) -> Tokens:
        num_masks = min(self._expansion.length, self.max_tokens) - len(row.ids)
        if num_masks <= 0:
            return row
        num_attended = None if self._expansion.is_attended else len(row.ids)
        return replace(row, ids=[*row.ids, *[self._mask_id] * num_masks], num_attended=num_attended)


def query_tokenizer(tokenizer: Any, colbert: Colbert, max_tokens: int) -> Tokenizer:
    """Return the tokenizer of queries.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.

    Raises:
        LoadError: no token exists to append to a query.
    """
    expansion, fast = colbert.expansion, tokenizer.backend_tokenizer
    if expansion is None:
        return Tokenizer(fast, max_tokens)
    mask_id = tokenizer.eos_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
    if expansion.token is not None:
        mask_id = tokenizer.get_vocab().get(expansion.token)
    if mask_id is None:
        raise LoadError(f"no token to append to a query: the tokenizer has no {expansion.token or 'mask token'}")
    return QueryTokenizer(fast, max_tokens, expansion, int(mask_id))


def find_skipped_ids(tokenizer: Any, colbert: Colbert) -> frozenset[int]:
    """Return the ids of the tokens that get no vector; a word that is not a token is ignored.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
    """
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in colbert.skipped}
    return frozenset(
        id_
        for word, id_ in ids.items()
        if id_ is not None and (id_ != tokenizer.unk_token_id or word == tokenizer.unk_token)
    )


class TokenVectorHead(TokenHead[MultiVector]):
    """Linear layers over each token's state, and L2 normalization if the checkpoint has it; all in float32.

    Args:
        skipped: ids of the tokens that get no vector.

    Raises:
        LoadError: the checkpoint's weights do not match its description.
    """

    def __init__(self, checkpoint: Checkpoint, colbert: Colbert, skipped: frozenset[int]) -> None:
        super().__init__()
        self._is_normalized = colbert.is_normalized
        self._skips = frozenset({"query": True, "document": False}[side] for side in colbert.skips)
        self._skipped = np.array(sorted(skipped), np.int64)
        self.layers = nn.Sequential()
        width = checkpoint.hidden_width
        for name, config in colbert.layers.items():
            layer = Dense(checkpoint.folder / name, config, width)
            self.layers.append(layer)
            width = layer.out_features
        if colbert.has_projection:
            with reading(checkpoint.folder, "the projection"):
                name = f"{STANFORD_PROJECTION}.weight"
                projection = linear_of(read_tensors(checkpoint.weights, {name}), STANFORD_PROJECTION)
            require_inputs(checkpoint.folder, projection, width)
            self.layers.append(projection)
        self.requires_grad_(False)

    def compute(self, states: TokenStates) -> torch.Tensor:
        vectors: torch.Tensor = self.layers(states.flat.float())
        return functional.normalize(vectors, dim=-1) if self._is_normalized else vectors

    def read(
        self, numbers: npt.NDArray[np.float32], lengths: Sequence[int], items: Sequence[Item], rows: Sequence[int]
    ) -> list[MultiVector]:
        is_kept = np.ones(len(numbers), bool)
        if len(self._skipped):
            skips = np.array([(items[row].task == _QUERY) in self._skips for row in rows])
            is_kept = ~(np.repeat(skips, lengths) & np.isin(token_ids(items, rows), self._skipped))
        places = [slice(end - n, end) for end, n in zip(accumulate(lengths), lengths, strict=True)]
        return [numbers[place][is_kept[place]] for place in places]
