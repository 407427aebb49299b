"""Makers of tiny cross-encoders, as transformers saves them: with one label rerankers, with several classifiers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import processors
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.models.checkpoints import FAMILIES, MAX_TOKENS, SIZES, Family, unigram_tokenizer

PAIRS = {
    "xlm-roberta": "{cls} $A {sep} {sep} $B {sep}",
    "bert": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "modernbert": "{cls} $A {sep} $B {sep}",
    "roberta": "{cls} $A {sep} {sep} $B {sep}",
    "camembert": "{cls} $A {sep} {sep} $B {sep}",
    "mpnet": "{cls} $A {sep} {sep} $B {sep}",
    "electra": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "distilbert": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "gte": "{cls} $A {sep} {sep} $B {sep}",
    "qwen3": "$A $B {sep}",
    "qwen2": "$A $B {sep}",
    "llama": "$A $B {sep}",
    "mistral": "$A $B {sep}",
    "gemma2": "$A $B {sep}",
    "gemma3_text": "$A $B {sep}",
    "nomic_bert": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "jina_embeddings_v3": "{cls} $A {sep} {sep} $B {sep}",
    "albert": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "deberta-v2": "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    "eurobert": "{cls} $A {sep} $B {sep}",
}
"""The template for pairs that the checkpoints of an architecture have."""
JINA = Family(unigram_tokenizer, "mean")
WITH_SEGMENTS = ("bert", "electra", "albert", "deberta-v2", "nomic_bert")


def with_pairs(tokenizer: PreTrainedTokenizerFast, model_type: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the template for pairs that the checkpoints of the architecture have."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}" if cls is not None else f"$A {sep}",
        pair=PAIRS[model_type].format(cls=cls, sep=sep),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in (cls, sep) if name is not None],
    )
    if model_type in WITH_SEGMENTS:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def make_cross_encoder(folder: Path, model_type: str, **changes: object) -> None:
    """Write a cross-encoder with random weights, by default with one label, and its tokenizer."""
    family = FAMILIES.get(model_type) or JINA
    tokenizer = with_pairs(family.tokenizer(), model_type)
    torch.manual_seed(11)
    sizes = {"type_vocab_size": 1} if PAIRS[model_type].count("{sep}") == 3 else {}
    config = AutoConfig.for_model(
        model_type,
        **{
            **SIZES,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": MAX_TOKENS + 2,
            "num_labels": 1,
            **sizes,
            **family.changes,
            **changes,
        },
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # a weight that is always 0 or 1 at first would hide mistakes
            nn.init.normal_(weight, float("norm" in name.lower() and name.endswith("weight")), 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
