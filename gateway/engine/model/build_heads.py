"""Build the heads of a checkpoint, which compute its outputs from the token states."""

from __future__ import annotations

import torch

from gateway.engine.checkpoint.classifier import HEADS
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import load_config
from gateway.engine.model.colbert import TokenVectorHead
from gateway.engine.model.encoder import Heads
from gateway.engine.model.heads import DenseHead, MultiVectorHead, ScoreHead, SparseHead
from gateway.engine.model.load_tokenizer import Tokenizers
from gateway.engine.model.splade import QueryTable, SpladeHead


def build_heads(checkpoint: Checkpoint, device_name: str, dtype: str, tokenizers: Tokenizers) -> Heads:
    """Return the heads of a checkpoint on a device.

    Args:
        device_name: torch device, such as ``cpu`` or ``cuda:0``.
        dtype: name of the torch dtype for products with the whole vocabulary; everything else is in float32.

    Raises:
        LoadError: the checkpoint is corrupt or incomplete, or contradicts its configuration.
    """
    device, width = torch.device(device_name), checkpoint.hidden_width
    if checkpoint.splade is not None:
        return Heads(None, sparse=SpladeHead(checkpoint, checkpoint.splade, getattr(torch, dtype)).to(device))
    if checkpoint.colbert is not None:
        head = TokenVectorHead(checkpoint, checkpoint.colbert, tokenizers.skipped_ids)
        return Heads(None, multivector=head.to(device))
    classifier, sparse, multivector = checkpoint.classifier, checkpoint.sparse_head, checkpoint.multivector_head
    dense: DenseHead | ScoreHead = DenseHead(checkpoint) if classifier is None else ScoreHead(checkpoint, classifier)
    return Heads(
        dense=dense.to(device),
        sparse=None if sparse is None else SparseHead(sparse, width, tokenizers.special_ids).to(device),
        multivector=None if multivector is None else MultiVectorHead(multivector, width).to(device),
        unread_id=_unread_id(checkpoint),
    )


def _unread_id(checkpoint: Checkpoint) -> int | None:
    """Return the token id that a decoder's head skips at the end of a text.

    The head reads the state of the last token that is not padding, and recognizes padding only by its id
    (``transformers.modeling_layers.GenericForSequenceClassification``). Many decoders pad with the token that ends a text.
    The head then reads the state of the token before it.
    """
    classifier = checkpoint.classifier
    if classifier is None or checkpoint.pooling is not Pooling.LAST or classifier.architecture not in HEADS:
        return None
    id_: int | None = load_config(checkpoint.transformer).pad_token_id
    return id_


def build_query_table(checkpoint: Checkpoint, max_tokens: int) -> QueryTable | None:
    """Return the table of fixed weights for queries, if the checkpoint has one.

    Args:
        max_tokens: the longest query.

    Raises:
        LoadError: the table cannot be read, or does not belong to the model.
    """
    splade = checkpoint.splade
    if splade is None or splade.queries is None or splade.table is None:
        return None
    return QueryTable(checkpoint, splade.queries, splade.table, max_tokens)
