"""Makers of a checkpoint for each family, and the families that use the publisher's own configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.models.tiny_tokenizers import (
    MAX_TOKENS,
    bpe_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
)


@dataclass(frozen=True, slots=True)
class Family:
    """How a checkpoint of an architecture is made.

    Attributes:
        changes: sizes and settings of the transformer.
        activation: of a Dense layer behind the pooling, if there is one.
        dense: widths of Dense layers without bias and activation.
        published: keys of ``config.json`` as the publisher writes them, where transformers writes others.
        dropped: keys that transformers writes, and the publisher does not.
    """

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pooling: str
    changes: Mapping[str, object] = field(default_factory=dict)
    activation: nn.Module | None = None
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[int, ...] = ()
    published: Mapping[str, object] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def publish(folder: Path, family: Family) -> None:
    """Write ``config.json`` as the publisher of a model does."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in family.dropped}
    path.write_text(json.dumps({**config, **family.published}))


NO_OFFSET = {"max_position_embeddings": MAX_TOKENS}
ONE_WAY = {**NO_OFFSET, "num_key_value_heads": 2, "head_dim": 16}
ROPE = ("rope_parameters",)  # until transformers 5 it was `rope_theta` and `rope_scaling`
# Decoders that embed, and older encoders, each in the layout of the repository that is named.
PUBLISHED = {
    # google/embeddinggemma-300m
    "gemma3_text": Family(
        lambda: sentencepiece_tokenizer("<bos>", "<eos>", starts_with_space=False),
        "mean",
        {
            **ONE_WAY,
            "use_bidirectional_attention": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        prompts={
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "Clustering": "task: clustering | query: ",
            "Retrieval-query": "task: search result | query: ",
        },
        dense=(96, 64),
        published={
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "_sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "torch_dtype": "float32",
        },
        dropped=ROPE,
    ),
    # Alibaba-NLP/gte-Qwen2-1.5B-instruct
    "qwen2": Family(
        lambda: bpe_tokenizer(None, "<|endoftext|>", "<|pad|>"),
        "lasttoken",
        {**NO_OFFSET, "num_key_value_heads": 2, "is_causal": False},
        prompts={
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
        },
        published={
            "architectures": ["Qwen2ForCausalLM"],
            "auto_map": {
                "AutoModel": "modeling_qwen.Qwen2Model",
                "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM",
                "AutoModelForSequenceClassification": "modeling_qwen.Qwen2ForSequenceClassification",
            },
            "max_window_layers": 21,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
        },
        dropped=(*ROPE, "layer_types"),
    ),
    # intfloat/e5-mistral-7b-instruct
    "mistral": Family(
        lambda: sentencepiece_tokenizer("<s>", "</s>", starts_with_space=True),
        "lasttoken",
        {**ONE_WAY, "sliding_window": 16},
        prompts={
            "web_search_query": "Instruct: Given a web search query, retrieve relevant passages that answer it\nQuery: "
        },
        published={"rope_theta": 10000.0, "torch_dtype": "float32"},
        dropped=(*ROPE, "head_dim"),
    ),
    # sbintuitions/sarashina-embedding-v1-1b
    "llama": Family(
        unigram_tokenizer,
        "lasttoken",
        ONE_WAY,
        is_normalized=False,
        published={"rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False},
        dropped=ROPE,
    ),
    # BAAI/bge-multilingual-gemma2
    "gemma2": Family(
        lambda: sentencepiece_tokenizer("<bos>", "<eos>", starts_with_space=False),
        "lasttoken",
        {**ONE_WAY, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        prompts={"web_search_query": "<instruct>Given a web search query, retrieve relevant passages\n<query>"},
        published={"rope_theta": 10000.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh"},
        dropped=(*ROPE, "layer_types"),
    ),
    "lfm2": Family(
        lambda: bpe_tokenizer("<|startoftext|>", "<|im_end|>", "<|pad|>"),
        "lasttoken",
        {
            **NO_OFFSET,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 3,
            "block_multiple_of": 16,
        },
        published={"rope_theta": 1000000.0, "block_ff_dim": 96, "full_attn_idxs": [1], "theta": 1000000.0},
        dropped=(*ROPE, "intermediate_size", "layer_types"),
    ),
    # jinaai/jina-embeddings-v5-text-nano-retrieval
    "eurobert": Family(
        lambda: bpe_tokenizer("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"),
        "lasttoken",
        ONE_WAY,
        prompts={"query": "Query: ", "document": "Document: "},
        published={
            "auto_map": {
                "AutoConfig": "configuration_eurobert.EuroBertConfig",
                "AutoModel": "modeling_eurobert.EuroBertModel",
                "AutoModelForMaskedLM": "modeling_eurobert.EuroBertForMaskedLM",
            },
            "rope_theta": 250000,
            "rope_scaling": None,
            "clf_pooling": "late",
        },
        dropped=ROPE,
    ),
    # sentence-transformers/paraphrase-albert-small-v2
    "albert": Family(
        lambda: unigram_tokenizer("[CLS]", "[SEP]", "<pad>"),
        "mean",
        {**NO_OFFSET, "embedding_size": 32, "inner_group_num": 1, "num_hidden_groups": 1},
        is_normalized=False,
        published={"gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0, "down_scale_factor": 1},
    ),
    # as microsoft/deberta-v3-base, with sentence-transformers' pooling
    "deberta-v2": Family(
        lambda: unigram_tokenizer("[CLS]", "[SEP]", "[PAD]", "[UNK]"),
        "mean",
        {
            **NO_OFFSET,
            "relative_attention": True,
            "position_buckets": 16,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        is_normalized=False,
        published={"pos_att_type": "p2c|c2p"},
    ),
    # sentence-transformers/gtr-t5-base
    "t5": Family(
        lambda: unigram_tokenizer(None, "</s>", "<pad>"),
        "mean",
        {"d_kv": 16, "d_ff": 96, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
        dense=(48,),
        published={
            "n_positions": 512,
            "output_past": True,
            "architectures": ["T5EncoderModel"],
            "task_specific_params": {"summarization": {"prefix": "summarize: "}},
        },
        dropped=("intermediate_size", "max_position_embeddings", "initializer_range"),
    ),
}
