"""Clients that use neither OpenAI's format nor the gateway's own: Hugging Face's client for TEI, and Azure's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.clients.conftest import KEY
from tests.clients.gateway_process import HUB_NAME, MODEL, Gateway

Embed = Callable[..., np.ndarray]
AssertSame = Callable[..., None]
AZURE_VERSION = "2024-02-01"
DOCUMENTS = ["hello world", "日本 😀", "two\nlines"]


@pytest.fixture
def truth(embed: Embed) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function that asks the gateway in its own form."""
    return lambda texts: embed(*texts)


@pytest.mark.parametrize("path", ["/embed", f"/tei/{MODEL}/embed", f"/tei/{HUB_NAME}/embed"])
def test_hugging_face_s_inference_client(
    gateway: Gateway, truth: Callable[[Sequence[str]], np.ndarray], assert_same_vectors: AssertSame, path: str
) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=gateway.root_url + path)

    vectors = [client.feature_extraction(text, truncate=True, truncation_direction="right")[0] for text in DOCUMENTS]

    assert_same_vectors(np.array(vectors), truth(DOCUMENTS))


def test_hugging_face_s_similarity(gateway: Gateway, truth: Callable[[Sequence[str]], np.ndarray]) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{gateway.root_url}/tei/{MODEL}/similarity")

    cosines = client.sentence_similarity(DOCUMENTS[0], DOCUMENTS[1:])

    vectors = truth(DOCUMENTS)
    np.testing.assert_allclose(cosines, vectors[1:] @ vectors[0], atol=1e-5)


def test_hugging_face_s_client_shows_the_error(gateway: Gateway) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(model=f"{gateway.root_url}/tei/{MODEL}/embed")

    with pytest.raises(HfHubHTTPError, match="nonsense"):
        client.feature_extraction("a", prompt_name="nonsense")


def test_azure_openai(
    furnished_gateway: Gateway, truth: Callable[[Sequence[str]], np.ndarray], assert_same_vectors: AssertSame
) -> None:
    from openai import AzureOpenAI

    with AzureOpenAI(azure_endpoint=furnished_gateway.root_url, api_key=KEY, api_version=AZURE_VERSION) as client:
        answer = client.embeddings.create(model=MODEL, input=DOCUMENTS)

    assert_same_vectors(np.array([item.embedding for item in answer.data]), truth(DOCUMENTS))


# LangChain has no way to close its connections.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_langchain_s_azure_embeddings(
    furnished_gateway: Gateway,
    truth: Callable[[Sequence[str]], np.ndarray],
    assert_same_vectors: AssertSame,
    vocabulary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    from langchain_openai import AzureOpenAIEmbeddings

    embeddings = AzureOpenAIEmbeddings(
        azure_endpoint=furnished_gateway.root_url,
        azure_deployment=MODEL,
        api_key=KEY,
        api_version=AZURE_VERSION,
    )

    assert_same_vectors(np.array(embeddings.embed_documents(DOCUMENTS)), truth(DOCUMENTS))
