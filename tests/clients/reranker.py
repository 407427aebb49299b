"""A tiny cross-encoder with the layout of BGE's rerankers and random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from tests.models.checkpoints import MAX_TOKENS, SIZES, unigram_tokenizer


def save_reranker(folder: Path) -> None:
    """Write the checkpoint into a folder."""
    tokenizer = unigram_tokenizer()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    torch.manual_seed(20)
    config = XLMRobertaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS + 2,
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
