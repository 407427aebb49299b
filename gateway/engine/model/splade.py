"""SPLADE: a weight for each token of the vocabulary, from a masked language model's logits or from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.nn import functional

from gateway.engine.checkpoint.headers import read_shapes
from gateway.engine.checkpoint.json_files import read_object
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import WORDS, load_config
from gateway.engine.checkpoint.splade import MASKED_LM_HEADS, PUBLISHED_GTE_HEAD, Splade
from gateway.engine.checkpoint.weights import read_tensors
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.heads import linear_of, norm_of, reading, require_inputs
from gateway.engine.model.items import Encoded, Item
from gateway.engine.model.states import TokenStates
from gateway.engine.model.tokenizer import Tokenizer
from gateway.errors import LoadError
from gateway.types import SparseVector

QUERY = "retrieval.query"
# The number of logits that are computed at once, 32 MiB in float32. A batch has tokens x vocabulary of them, up to
# gigabytes.
LOGITS_AT_ONCE = 2**23


class SpladeHead(nn.Module):
    """The head of transformers' ``…ForMaskedLM``, and sentence-transformers' ``SpladePooling`` over its logits.

    Args:
        dtype: dtype of the product with the word table, which takes nearly all of the time; the rest is in float32.

    Attributes:
        step: tokens whose logits are computed at once.

    Raises:
        LoadError: the checkpoint's weights hold no such head.
    """

    def __init__(self, checkpoint: Checkpoint, splade: Splade, dtype: torch.dtype) -> None:
        from transformers.activations import ACT2FN  # slow to import

        super().__init__()
        self.table: torch.Tensor
        self.bias: torch.Tensor | None
        self._splade = splade
        is_published_gte = checkpoint.layout is Layout.GTE
        names = PUBLISHED_GTE_HEAD if is_published_gte else MASKED_LM_HEADS[checkpoint.model_type]
        config: Any = load_config(checkpoint.transformer)
        with reading(checkpoint.folder, "the head of a masked language model"):
            words = next(name for name in read_shapes(checkpoint.weights) if WORDS.search(name))
            layers = (names.dense, names.norm, names.decoder)
            wanted = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {words, str(names.bias)}
            tensors = read_tensors(checkpoint.weights, wanted)
            self.dense = linear_of(tensors, names.dense)
            eps = 1e-12 if names.eps_key is None else float(getattr(config, names.eps_key))
            self.norm = norm_of(tensors, names.norm, eps)
            self.activation = ACT2FN["gelu" if names.activation_key is None else getattr(config, names.activation_key)]
            bias = tensors.get(f"{names.decoder}.bias", tensors.get(str(names.bias)))
            # As in transformers: the decoder's tensor in the file counts, regardless of the configuration.
            table = tensors.get(f"{names.decoder}.weight")
            if table is None and getattr(config, "tie_word_embeddings", True):
                table = tensors[words]
            if table is None:
                raise LoadError(f"{checkpoint.folder}: no {names.decoder}.weight, and tie_word_embeddings is false")
            self.register_buffer("table", table.to(dtype))
            self.register_buffer("bias", None if bias is None else bias.to(dtype))
        require_inputs(checkpoint.folder, self.dense, checkpoint.hidden_width)
        self.step = max(1, LOGITS_AT_ONCE // len(table))
        self.requires_grad_(False)

    def forward(self, states: TokenStates, items: Sequence[Item], rows: Sequence[int]) -> list[SparseVector]:
        """Return the weights of the texts at ``rows``; ``items`` are those of all texts."""
        texts = states.texts()
        return [self._sparse(weights) for weights in self._pooled([texts[row] for row in rows])]

    def begin(
        self, states: TokenStates, items: Sequence[Item], rows: Sequence[int]
    ) -> Callable[[], Sequence[SparseVector]]:
        """Compute the weights immediately: the number of those above 0 is known only when the device is done."""
        outputs = self.forward(states, items, rows)
        return lambda: outputs

    def _pooled(self, texts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield each text's weights, ``(vocabulary,)`` float32; only one text's weights are held at a time."""
        pooled: torch.Tensor | None = None
        for chunk in _chunks([len(text) for text in texts], self.step):
            logits = self.logits(torch.cat([texts[i][first:end] for i, first, end in chunk]))
            parts = torch.split(logits, [end - first for _i, first, end in chunk])
            for (i, first, end), part in zip(chunk, parts, strict=True):
                reduced = self._reduced(part)
                if first and pooled is not None:
                    reduced = pooled + reduced if self._splade.is_sum else torch.maximum(pooled, reduced)
                pooled = reduced
                if end == len(texts[i]):
                    yield pooled if self._splade.is_sum else self._activated(pooled)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``(n, vocabulary)`` logits of the states of ``n`` tokens."""
        hidden = self.norm(self.activation(self.dense(states.float())))
        return functional.linear(hidden.to(self.table.dtype), self.table, self.bias)

    def _reduced(self, logits: torch.Tensor) -> torch.Tensor:
        """Pool ``(t, vocabulary)`` logits over the tokens. A maximum is activated later: the order stays."""
        return self._activated(logits).sum(dim=0) if self._splade.is_sum else logits.amax(dim=0)

    def _activated(self, logits: torch.Tensor) -> torch.Tensor:
        activated = torch.relu(logits.float()).log1p()
        return activated.log1p() if self._splade.is_log_twice else activated

    def _sparse(self, weights: torch.Tensor) -> SparseVector:
        """Keep the weights above 0, and only the largest of them if there is a limit."""
        limit = self._splade.max_active
        if limit is not None and limit < len(weights):
            largest = weights.topk(limit)
            weights = torch.zeros_like(weights).index_put_((largest.indices,), largest.values)
        indices = torch.nonzero(~(weights <= 0)).squeeze(1)  # NaN stays, and is reported
        return SparseVector(indices.cpu().numpy(), weights[indices].cpu().numpy())


def _chunks(lengths: Sequence[int], step: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut texts into runs of at most ``step`` tokens; each run lists a text's index with its first and end token."""
    chunk: list[tuple[int, int, int]] = []
    room = step
    for i, length in enumerate(lengths):
        first = 0
        while first < length:
            end = min(length, first + room)
            chunk.append((i, first, end))
            room -= end - first
            first = end
            if not room:
                yield chunk
                chunk, room = [], step
    if chunk:
        yield chunk


# ------------------------------------------------------------------------------------------------- queries by a table


class QueryTable:
    """Fixed weights for queries: each token id has one weight, no matter how often it occurs in the query.

    The rule is sentence-transformers' (``sparse_encoder/modules/sparse_static_embedding.py``).

    Args:
        folder: folder of the query tokenizer.
        table: file with the weights.

    Raises:
        LoadError: the weights cannot be read, or do not fit the tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path, table: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer  # slow to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            fast: FastTokenizer = tokenizer.backend_tokenizer
            self.tokenizer = Tokenizer(fast, max_tokens, has_template=False)
        except Exception as error:  # transformers and tokenizers raise a bare Exception for a malformed file
            raise LoadError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
        with reading(table, "the weights of queries"):
            if table.suffix == ".json":
                weights = torch.zeros(len(tokenizer.get_vocab()))
                for token, weight in read_object(table).items():
                    weights[tokenizer.convert_tokens_to_ids(token)] = float(weight)  # type: ignore[arg-type]
            else:
                weights = read_tensors([table])["weight"].float()
        self._weights = weights.numpy()
        if self.tokenizer.largest_id >= len(weights) or len(weights) > checkpoint.vocab_size:
            raise LoadError(
                f"{table}: has {len(weights)} weights, for a tokenizer with ids up to {self.tokenizer.largest_id} and a "
                f"model with {checkpoint.vocab_size} tokens"
            )
        if not np.isfinite(self._weights).all():
            raise LoadError(f"{table}: holds weights that are not finite")

    def weigh(self, ids: Sequence[int]) -> SparseVector:
        """Return the weights of a query's tokens."""
        indices = np.unique(np.asarray(ids, np.int64))
        weights = self._weights[indices]
        return SparseVector(indices[weights != 0], weights[weights != 0])


class QueryTableEncoder(Encoder):
    """An encoder whose queries have fixed weights: only documents go through the transformer."""

    query_table: QueryTable

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        documents = [item for item in items if item.task != QUERY]
        encoded = iter(super().encode(documents) if documents else ())
        return [self._weighed(item) if item.task == QUERY else next(encoded) for item in items]

    def _weighed(self, item: Item) -> Encoded:
        return Encoded(np.zeros((1, self.width), np.float32), self.query_table.weigh(item.tokens.ids))
