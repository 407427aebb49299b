"""Makers of tiny checkpoints with the layout of the real ones and random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from tests.models.family_layouts import NO_OFFSET, PUBLISHED, Family
from tests.models.tiny_tokenizers import MAX_TOKENS, SENTENCES, bpe_tokenizer, unigram_tokenizer, wordpiece_tokenizer

__all__ = [
    "FAMILIES",
    "JINA_TASKS",
    "MAX_TOKENS",
    "SENTENCES",
    "SIZES",
    "TEXTS",
    "Family",
    "bpe_tokenizer",
    "linear_head",
    "make_transformer",
    "save_adapters",
    "unigram_tokenizer",
    "wordpiece_tokenizer",
]

TEXTS = (
    "fox",
    "",
    "Berlin is the capital of Germany.",
    "  near   vectors mean\tnear texts  ",
    "The quick brown fox jumps over the lazy dog, again and again. Embeddings map a text to a vector!",
    "Grüße aus Köln: 東京 \U0001f98a",
    "a query",
    "near vectors " * 60,  # over the longest text of every model here
    "again and again " * 9,
)
JINA_TASKS = {
    "retrieval_query": "retrieval.query",
    "retrieval_passage": "retrieval.passage",
    "separation": "separation",
    "classification": "classification",
    "text_matching": "text-matching",
}

# transformers' encoders are nearly blind to what surrounds a token with their usual first weights: larger ones are not.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.25,
}


# ------------------------------------------------------------------------------------------------------- checkpoints


def make_transformer(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, **changes: object) -> None:
    """Write a transformer with random weights, and its tokenizer."""
    torch.manual_seed(17)
    config = AutoConfig.for_model(
        model_type,
        **{
            **SIZES,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": MAX_TOKENS + 2,
            **changes,
        },
    )
    model = T5EncoderModel(config) if model_type == "t5" else AutoModel.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():  # a weight that is always 0 or 1 at first would hide mistakes
        if weight.ndim == 1:
            nn.init.normal_(weight, float("norm" in name.lower() and name.endswith("weight")), 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapters(folder: Path, names: Iterable[str], **changes: object) -> None:
    """Let PEFT write an adapter with random weights for each name."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"]
    config = {"r": 4, "lora_alpha": 1, "lora_dropout": 0.0, **changes}
    config.setdefault("target_modules", [*modules, "word_embeddings", "token_type_embeddings"])
    model: PeftModel | None = None
    for name in names:
        lora = LoraConfig(**config)
        if model is None:
            model = get_peft_model(AutoModel.from_pretrained(folder), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    assert model is not None
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)


def linear_head(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    layer = nn.Linear(num_in, num_out)
    nn.init.normal_(layer.weight, std=0.3)
    return {name: tensor.half() for name, tensor in layer.state_dict().items()}


FAMILIES = {
    "bert": Family(wordpiece_tokenizer, "mean", NO_OFFSET),
    "roberta": Family(bpe_tokenizer, "mean"),
    "xlm-roberta": Family(unigram_tokenizer, "mean", prompts={"query": "query: ", "passage": "passage: "}),
    "camembert": Family(unigram_tokenizer, "max"),
    "mpnet": Family(lambda: wordpiece_tokenizer("<s>", "</s>", "<pad>"), "mean"),
    "distilbert": Family(wordpiece_tokenizer, "mean", NO_OFFSET, activation=nn.Tanh(), is_normalized=False),
    "electra": Family(wordpiece_tokenizer, "cls", {**NO_OFFSET, "embedding_size": 32}),
    "modernbert": Family(
        lambda: bpe_tokenizer("[CLS]", "[SEP]", "[PAD]"),
        "mean",
        {**NO_OFFSET, "local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 0, "sep_token_id": 2},
    ),
    "nomic_bert": Family(
        wordpiece_tokenizer,
        "mean",
        NO_OFFSET,
        is_normalized=False,
        prompts={"query": "search_query: ", "document": "search_document: ", "clustering": "clustering: "},
    ),
    "gte": Family(unigram_tokenizer, "cls", NO_OFFSET, activation=nn.Identity()),
    "qwen3": Family(
        lambda: bpe_tokenizer(None, "<|endoftext|>", "<|pad|>"),
        "lasttoken",
        {**NO_OFFSET, "num_key_value_heads": 2, "head_dim": 16},
        prompts={
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "document": "",
        },
    ),
    **PUBLISHED,
}
