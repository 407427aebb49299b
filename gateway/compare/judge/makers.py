"""Families of models: a judge prefers the results of related models."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Parts of names, by maker; a model derived from another has both makers.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "OpenAI": ("openai", "gpt", "o1", "o3", "o4", "text-embedding-3", "text-embedding-ada"),
    "Google": ("google", "gemini", "gemma", "embeddinggemma", "gecko", "gtr", "labse", "palm"),
    "Alibaba": ("alibaba", "qwen", "qwq", "gte", "tongyi"),
    "Meta": ("meta-llama", "facebook", "llama", "contriever"),
    "Mistral AI": ("mistralai", "mistral", "mixtral", "ministral", "magistral", "codestral"),
    "Microsoft": ("microsoft", "phi", "e5", "harrier", "intfloat"),
    "NVIDIA": ("nvidia", "nemotron", "nv-embed", "nemoretriever"),
    "IBM": ("ibm-granite", "ibm", "granite"),
    "Cohere": ("cohere", "cohereforai", "command", "embed-english", "embed-multilingual", "embed-v4", "aya"),
    "BAAI": ("baai", "bge"),
    "Jina AI": ("jinaai", "jina", "readerlm"),
    "Snowflake": ("snowflake", "arctic"),
    "DeepSeek": ("deepseek",),
    "Zhipu AI": ("thudm", "zai-org", "glm", "chatglm"),
    "LG": ("lgai-exaone", "exaone"),
    "Liquid AI": ("liquidai", "lfm2"),
    "Salesforce": ("salesforce", "sfr"),
    "Nomic": ("nomic-ai", "nomic"),
    "Anthropic": ("anthropic", "claude"),
}
_MADE_FROM = {
    re.compile(r"jina-embeddings-v5-text-small|jina-reranker-v3|jina-embeddings-v4"): "Alibaba",
}


def makers_of(name: str) -> set[str]:
    """Return the makers of a model by its name, including the makers of its base model."""
    text = name.lower()
    found = {
        maker
        for maker, parts in _PARTS.items()
        if any(re.search(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z])", text) for part in parts)
    }
    return found | {maker for pattern, maker in _MADE_FROM.items() if pattern.search(text)}


def relatives(judge: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Return the arms that share a maker with the judge, with the maker.

    Args:
        sources: the sources of the arms' models, with their ids, by arm.
    """
    mine = makers_of(judge)
    found = {}
    for arm, source in sources.items():
        if shared := sorted(mine & makers_of(source)):
            found[arm] = shared[0]
    return found
