"""LlamaIndex's OpenAILikeEmbedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import openai
import pytest

from tests.clients.gateway_process import MODEL, Gateway

if TYPE_CHECKING:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

# LlamaIndex has no way to close its connections.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

TEXTS = [f"text number {i}" for i in range(25)]


@pytest.fixture
def embedding(gateway: Gateway) -> OpenAILikeEmbedding:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    # 25 texts are three requests, so that the order between requests counts too.
    return OpenAILikeEmbedding(model_name=MODEL, api_base=gateway.base_url, api_key="any", embed_batch_size=10)


def test_query_text_and_batch_give_the_gateways_vectors(
    embedding: OpenAILikeEmbedding, embed: Callable[..., np.ndarray], assert_same_vectors: Callable[..., None]
) -> None:
    expected = embed(*TEXTS)

    assert_same_vectors([embedding.get_query_embedding(TEXTS[0])], expected[:1])
    assert_same_vectors([embedding.get_text_embedding(TEXTS[1])], expected[1:2])
    assert_same_vectors(embedding.get_text_embedding_batch(TEXTS), expected)


async def test_async_query_text_and_batch_give_the_gateways_vectors(
    embedding: OpenAILikeEmbedding, embed: Callable[..., np.ndarray], assert_same_vectors: Callable[..., None]
) -> None:
    expected = embed(*TEXTS)

    assert_same_vectors([await embedding.aget_query_embedding(TEXTS[0])], expected[:1])
    assert_same_vectors([await embedding.aget_text_embedding(TEXTS[1])], expected[1:2])
    assert_same_vectors(await embedding.aget_text_embedding_batch(TEXTS), expected)


def test_an_error_reaches_the_user_with_its_message(gateway: Gateway) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=gateway.base_url, api_key="any", dimensions=512)

    with pytest.raises(openai.BadRequestError, match="`dimensions` is 512"):
        embedding.get_text_embedding("hello")
