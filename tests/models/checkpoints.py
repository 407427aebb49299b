"""Makers of tiny checkpoints with the layout of the real ones and random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Represent the query for retrieving evidence documents: ",
    "Represent the document for retrieval: ",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query Query:",
    "Berlin is the capital of Germany; it has 3.85 million inhabitants.",
    "Embeddings map a text to a vector, and near vectors mean near texts!",
    "Grüße aus Köln: 東京 is far away.",
)
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
MAX_TOKENS = 64
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


# -------------------------------------------------------------------------------------------------------- tokenizers


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Return an XLM-RoBERTa-like tokenizer: Unigram over text whose spaces are written as `▁`."""
    pieces = sorted({f"▁{word}" for sentence in SENTENCES for word in sentence.split()} | set("".join(SENTENCES)))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(piece, 0.0) for piece in special] + [("▁", -4.0)]
    vocab += [(piece, -2.0 - 0.01 * i) for i, piece in enumerate(piece for piece in pieces if piece != " ")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def wordpiece_tokenizer(cls: str = "[CLS]", sep: str = "[SEP]", pad: str = "[PAD]") -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [pad, cls, sep, "[UNK]"] if pad == "[PAD]" else [cls, pad, sep, "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrap(tokenizer, cls, sep, pad, "[UNK]")


def bpe_tokenizer(cls: str | None = "<s>", sep: str = "</s>", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Return a RoBERTa-like tokenizer over bytes; without ``cls`` a Qwen-like one, which only puts ``sep`` behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (cls, pad, sep, "<unk>") if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrap(tokenizer, cls, sep, pad, "<unk>")


def _wrap(tokenizer: Tokenizer, cls: str | None, sep: str, pad: str, unk: str) -> PreTrainedTokenizerFast:
    names = [name for name in (cls, sep) if name is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}" if cls is not None else f"$A {sep}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        bos_token=cls,
        sep_token=sep,
        eos_token=sep,
        pad_token=pad,
        unk_token=unk,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


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
    model = AutoModel.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():  # what is always 0 or 1 at first would hide mistakes
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


@dataclass(frozen=True, slots=True)
class Family:
    """How a checkpoint of an architecture is made."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pooling: str
    changes: Mapping[str, object] = field(default_factory=dict)
    activation: nn.Module | None = None
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


NO_OFFSET = {"max_position_embeddings": MAX_TOKENS}
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
}
