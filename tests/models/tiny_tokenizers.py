"""Tokenizers of the kinds that published models have, each with a vocabulary of a few sentences."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Represent the query for retrieving evidence documents: ",
    "Represent the document for retrieval: ",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query Query:",
    "Berlin is the capital of Germany; it has 3.85 million inhabitants.",
    "Embeddings map a text to a vector, and near vectors mean near texts!",
    "Grüße aus Köln: 東京 is far away.",
)
MAX_TOKENS = 64


def unigram_tokenizer(
    cls: str | None = "<s>", sep: str = "</s>", pad: str = "<pad>", unk: str = "<unk>"
) -> PreTrainedTokenizerFast:
    """Return an XLM-RoBERTa-like tokenizer: Unigram over text whose spaces are written as `▁`; without ``cls`` T5's."""
    pieces = sorted({f"▁{word}" for sentence in SENTENCES for word in sentence.split()} | set("".join(SENTENCES)))
    special = [cls or "<extra>", pad, sep, unk]
    vocab = [(piece, 0.0) for piece in special] + [("▁", -4.0)]
    vocab += [(piece, -2.0 - 0.01 * i) for i, piece in enumerate(piece for piece in pieces if piece != " ")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, cls, sep, pad, unk)


def sentencepiece_tokenizer(
    cls: str, sep: str, pad: str = "<pad>", *, starts_with_space: bool
) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Gemma, Llama 2 and Mistral have it: BPE over `▁`, bytes for unknown characters."""
    prepend = [normalizers.Prepend("▁")] if starts_with_space else []
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    special = [pad, sep, cls, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate([*special, *model["vocab"]])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = learned.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(tokenizer, cls, sep, pad, "<unk>")


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
