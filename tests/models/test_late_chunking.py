"""Late chunking: one forward over the whole document, and the mean of each chunk's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from gateway.config.registry import ModelEntry
from gateway.engine.model.items import Item, Tokens
from gateway.errors import BadInput, ContextLengthExceeded
from tests.engine.model.reading import tokenize_chunks
from tests.models.checkpoints import JINA_TASKS, MAX_TOKENS

Load = Callable[..., Any]
Tokenize = Callable[..., list[int]]
PeftStates = Callable[[Sequence[int], str | None], torch.Tensor]
Reference = Callable[[Sequence[str], str | None], np.ndarray]
Connect = Callable[..., Any]

RUNTIMES = ("reference", "packed", "openvino")
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
TASKS = (None, *JINA_TASKS.values())
DOCUMENTS = (
    ("Berlin is the capital of Germany;", " it has 3.85 million inhabitants.", "Grüße aus Köln"),
    ("fox", "fox", "fox", "fox"),
    ("again and again " * 5, "near"),
    ("a query",),
)


@pytest.fixture(scope="module")
def reference(jina: Path, tokenize: Tokenize, peft_states: PeftStates) -> Reference:
    """Return the function that chunks late, written out as plainly as can be."""

    def vectors(chunks: Sequence[str], task: str | None) -> np.ndarray:
        instruction = INSTRUCTIONS.get(task or "", "")
        texts = [instruction + chunks[0], *chunks[1:]]
        pieces = [tokenize(jina, text, add_special_tokens=False) for text in texts]
        states = peft_states([0, *(token for piece in pieces for token in piece), 2], task)
        owner = [0]  # the chunk of each token: the special tokens at the ends belong to the first and the last
        for index, piece in enumerate(pieces):
            owner += [index] * len(piece)
        owner += [len(chunks) - 1]
        return np.stack([states[torch.tensor(owner) == index].mean(0).numpy() for index in range(len(chunks))])

    return vectors


def chunked(model: Any, chunks: Sequence[str], task: str | None) -> Item:
    encoder = model.encoder
    return Item(tokenize_chunks(encoder.tokenizer, chunks, encoder.instruction(task)), task)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chunks", DOCUMENTS)
def test_a_document_alone(
    jina: Path, load: Load, reference: Reference, runtime: str, task: str | None, chunks: Sequence[str]
) -> None:
    model = load(jina, runtime)

    [encoded] = model.encoder.encode([chunked(model, chunks, task)])

    assert encoded.dense.shape == (len(chunks), 64)
    np.testing.assert_allclose(encoded.dense, reference(chunks, task), atol=2e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_documents_and_plain_texts_in_one_batch(jina: Path, load: Load, reference: Reference, runtime: str) -> None:
    model = load(jina, runtime)
    wanted = [(chunks, task) for chunks in DOCUMENTS for task in TASKS]
    items = [chunked(model, chunks, task) for chunks, task in wanted]
    plain = [Item(Tokens(item.tokens.ids), item.task) for item in items]

    encoded = model.encoder.encode([item for pair in zip(items, plain, strict=True) for item in pair])

    for (chunks, task), document, whole in zip(wanted, encoded[::2], encoded[1::2], strict=True):
        np.testing.assert_allclose(document.dense, reference(chunks, task), atol=2e-4)
        assert whole.dense.shape == (1, 64)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("text", ["a query", "  near   vectors ", "near " * 20])
def test_one_chunk_is_a_plain_text(jina: Path, load: Load, task: str | None, text: str) -> None:
    model = load(jina, "reference")

    [encoded] = model.encoder.encode([chunked(model, [text], task)])

    np.testing.assert_allclose(encoded.dense, model.vectors([text], [task]), atol=1e-5)


def test_a_chunk_s_vector_depends_on_the_others(jina: Path, load: Load) -> None:
    """This is the purpose of late chunking."""
    model = load(jina, "reference")
    documents = [["fox", "Berlin is the capital"], ["fox", "near vectors"]]

    one, other = model.encoder.encode([chunked(model, chunks, None) for chunks in documents])

    assert abs(one.dense[0] - other.dense[0]).max() > 0.01


def test_the_longest_document_fits_and_one_token_more_does_not(jina: Path, load: Load) -> None:
    tokenizer = load(jina, "reference").encoder.tokenizer
    fitting = ["fox"] * (MAX_TOKENS - 2)

    tokens = tokenize_chunks(tokenizer, fitting, "")

    assert len(tokens.ids) == MAX_TOKENS
    assert tokens.spans[0] == (0, 2)
    assert tokens.spans[-1] == (MAX_TOKENS - 2, MAX_TOKENS)
    message = f"maximum context length is {MAX_TOKENS} tokens, however the chunks have {MAX_TOKENS + 1} tokens together"
    with pytest.raises(ContextLengthExceeded, match=message):
        tokenize_chunks(tokenizer, [*fitting, "fox"], "")
    with pytest.raises(ContextLengthExceeded, match=r"the chunks have at least \d+ tokens together"):
        tokenize_chunks(tokenizer, ["fox"] * 1000, "")  # not all of them are read


@pytest.mark.parametrize("instruction", ["", "Represent the document for retrieval: "])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_chunk_without_tokens_is_refused(jina: Path, load: Load, instruction: str, index: int) -> None:
    chunks = ["fox", "near", "Berlin"]
    chunks[index] = ""

    with pytest.raises(BadInput, match=rf"input\[{index}\] has no tokens"):
        tokenize_chunks(load(jina, "reference").encoder.tokenizer, chunks, instruction)


# -------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
async def client(jina: Path, m3: Path, connect: Connect) -> httpx.AsyncClient:
    """Return a client of a gateway with a model that pools the mean, and one that does not."""
    entry = {"device": "cpu", "enabled": True, "dtype": "float32", "runtime": "torch"}
    return await connect(
        ModelEntry(id="jina", source=str(jina), default_task="separation", dimensions=(32,), **entry),
        ModelEntry(id="m3", source=str(m3), **entry),
    )


async def embed(client: httpx.AsyncClient, texts: Sequence[str], **fields: object) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "jina", "input": list(texts), **fields})


@pytest.mark.parametrize("task", [None, "retrieval.passage"])
async def test_it_is_a_field_of_a_request(
    client: httpx.AsyncClient, reference: Reference, tokenize: Tokenize, jina: Path, task: str | None
) -> None:
    chunks = DOCUMENTS[0]

    response = await embed(client, chunks, late_chunking=True, task=task)

    assert response.status_code == 200, response.text
    body = response.json()
    expected = reference(chunks, task or "separation")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose([row["embedding"] for row in body["data"]], expected, atol=5e-5)
    assert [row["index"] for row in body["data"]] == [0, 1, 2]
    texts = [INSTRUCTIONS.get(task or "", "") + chunks[0], *chunks[1:]]
    num_tokens = 2 + sum(len(tokenize(jina, text, add_special_tokens=False)) for text in texts)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_it_is_in_the_space_of_plain_texts(client: httpx.AsyncClient) -> None:
    """They are meant to be compared with plain queries."""
    plain, late = await embed(client, ["fox", "near"]), await embed(client, ["fox", "near"], late_chunking=True)

    assert late.headers["x-gateway-space"] == plain.headers["x-gateway-space"]
    assert late.json()["data"] != plain.json()["data"]


async def test_dimensions_are_cut_and_normalized(client: httpx.AsyncClient) -> None:
    response = await embed(client, ["fox", "near"], late_chunking=True, dimensions=32)

    vectors = np.array([row["embedding"] for row in response.json()["data"]])
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        pytest.param(
            {"input": ["near vectors " * 40, "fox"]}, "context_length_exceeded", "cannot cut any of them", id="too long"
        ),
        pytest.param({"input": ["fox", ""]}, "invalid_input", "input[1] has no tokens", id="an empty chunk"),
        pytest.param({"model": "m3"}, "invalid_input", "needs the mean over token states", id="pools the first token"),
        pytest.param({"outputs": ["dense", "sparse"]}, "unsupported_output", "returns only: dense", id="other outputs"),
    ],
)
async def test_what_cannot_be_is_a_400(
    client: httpx.AsyncClient, fields: dict[str, object], code: str, message: str
) -> None:
    response = await embed(client, ["fox", "near"], late_chunking=True, **{"truncate": True, **fields})

    assert response.status_code == 400
    assert response.json()["error"]["code"] == code
    assert message in response.json()["message"]
