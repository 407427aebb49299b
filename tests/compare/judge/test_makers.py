"""Models of one maker are found by their names, and others are not."""

from __future__ import annotations

import pytest

from gateway.compare.judge.makers import makers_of, relatives


@pytest.mark.parametrize(
    ("name", "makers"),
    [
        ("gpt-4o-2024-08-06", {"OpenAI"}),
        ("text-embedding-3-small", {"OpenAI"}),
        ("openai/gpt-oss-120b", {"OpenAI"}),
        ("google/embeddinggemma-300m", {"Google"}),
        ("gemini-3-pro", {"Google"}),
        ("Qwen/Qwen3-Embedding-0.6B", {"Alibaba"}),
        ("jinaai/jina-embeddings-v5-text-small-retrieval", {"Alibaba", "Jina AI"}),
        ("BAAI/bge-multilingual-gemma2", {"BAAI", "Google"}),
        ("intfloat/e5-mistral-7b-instruct", {"Microsoft", "Mistral AI"}),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", {"Alibaba"}),
        ("meta-llama/Llama-3.3-70B-Instruct", {"Meta"}),
        ("claude-sonnet-5", {"Anthropic"}),
        ("sentence-transformers/all-MiniLM-L6-v2", set()),
        ("my-model", set()),
        ("emphasis-v2", set()),  # not Phi
    ],
)
def test_makers(name: str, makers: set[str]) -> None:
    assert makers_of(name) == makers


def test_relatives_are_the_arms_with_a_maker_of_the_judge() -> None:
    sources = {"a": "search Qwen/Qwen3-Embedding-4B", "b": "bge-m3 BAAI/bge-m3"}
    assert relatives("qwen-max", sources) == {"a": "Alibaba"}
    assert relatives("mistral-large", sources) == {}
