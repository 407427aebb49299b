"""Tokenize pairs and documents in one go, which the gateway does step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.engine.model.items import Tokens
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.tokenizer import Tokenizer, at_once
from gateway.types import Truncate


def tokenize_pairs(
    tokenizer: Tokenizer, query: str, texts: Sequence[str], truncate: Truncate, **options: Any
) -> list[Tokens]:
    assert isinstance(tokenizer, PairTokenizer)
    return at_once(tokenizer.read_pairs(at_once(tokenizer.read_query(query)), texts, truncate, **options))


def tokenize_chunks(tokenizer: Tokenizer, chunks: Sequence[str], instruction: str) -> Tokens:
    return at_once(tokenizer.read_chunks(chunks, instruction))
