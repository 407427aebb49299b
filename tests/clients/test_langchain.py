"""LangChain's OpenAIEmbeddings: with its defaults, which send token ids, and with the setting that makes it send texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest

from tests.clients.conftest import KEY
from tests.clients.gateway_process import MODEL, WIDTH, Gateway

if TYPE_CHECKING:
    from langchain_openai import OpenAIEmbeddings

# LangChain has no way to close its connections.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

DOCUMENTS = ["hello world", "", "日本 😀", "two\nlines"]


@pytest.fixture
def make_embeddings(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIEmbeddings]:
    """Return a function that makes embeddings; LangChain would download the vocabulary."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))

    def make(gateway: Gateway, **settings: Any) -> OpenAIEmbeddings:
        from langchain_openai import OpenAIEmbeddings

        return OpenAIEmbeddings(model=MODEL, base_url=gateway.base_url, api_key=KEY, **settings)

    return make


@pytest.fixture
def embeddings(gateway: Gateway, make_embeddings: Callable[..., OpenAIEmbeddings]) -> OpenAIEmbeddings:
    return make_embeddings(gateway)


def test_texts_give_the_gateways_vectors(
    embeddings: OpenAIEmbeddings, embed: Callable[..., np.ndarray], assert_same_vectors: Callable[..., None]
) -> None:
    assert_same_vectors(embeddings.embed_documents(DOCUMENTS), embed(*DOCUMENTS))
    assert_same_vectors([embeddings.embed_query(DOCUMENTS[0])], embed(DOCUMENTS[0]))


async def test_async_texts_give_the_gateways_vectors(
    embeddings: OpenAIEmbeddings, embed: Callable[..., np.ndarray], assert_same_vectors: Callable[..., None]
) -> None:
    assert_same_vectors(await embeddings.aembed_documents(DOCUMENTS), embed(*DOCUMENTS))
    assert_same_vectors([await embeddings.aembed_query(DOCUMENTS[0])], embed(DOCUMENTS[0]))


def test_a_task_can_be_sent_with_a_call(embeddings: OpenAIEmbeddings) -> None:
    with_task = embeddings.embed_query("hello", extra_body={"task": "retrieval.query"})

    assert with_task == embeddings.embed_query("hello")
    with pytest.raises(openai.BadRequestError, match=r"unknown task 'no\.task'"):
        embeddings.embed_query("hello", extra_body={"task": "no.task"})


def test_dimensions_of_the_model_pass_and_others_do_not(
    gateway: Gateway, make_embeddings: Callable[..., OpenAIEmbeddings]
) -> None:
    native = make_embeddings(gateway, dimensions=WIDTH)
    other = make_embeddings(gateway, dimensions=512)

    assert len(native.embed_query("hello")) == WIDTH
    with pytest.raises(openai.BadRequestError, match="`dimensions` is 512"):
        other.embed_query("hello")


async def test_ids_give_the_vectors_that_texts_give(
    gateway: Gateway, make_embeddings: Callable[..., OpenAIEmbeddings], assert_same_vectors: Callable[..., None]
) -> None:
    as_ids, as_texts = make_embeddings(gateway), make_embeddings(gateway, check_embedding_ctx_length=False)

    assert_same_vectors(as_ids.embed_documents(DOCUMENTS), as_texts.embed_documents(DOCUMENTS))
    assert_same_vectors(await as_ids.aembed_documents(DOCUMENTS), as_texts.embed_documents(DOCUMENTS))


def test_long_documents_work_too(gateway: Gateway, make_embeddings: Callable[..., OpenAIEmbeddings]) -> None:
    """They come in several inputs of 8,191 ids each, whose vectors LangChain averages."""
    [vector] = make_embeddings(gateway).embed_documents(["a long document, word by word " * 5_000])

    assert len(vector) == WIDTH


def test_ids_outside_of_the_vocabulary_are_a_bad_request(gateway: Gateway) -> None:
    with (
        openai.OpenAI(base_url=gateway.base_url, api_key=KEY) as client,
        pytest.raises(openai.BadRequestError, match=r"not in the cl100k_base vocabulary \(0 to 100276\)"),
    ):
        client.embeddings.create(model=MODEL, input=[[15339, 1_000_000]])
