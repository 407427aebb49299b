"""The bodies that LiteLLM 1.106.2 was recorded sending, by provider prefix; why not LiteLLM itself: see ``__init__``.

Model and sizes are the ones that are served here. Rerank is not among them.
"""

from __future__ import annotations

import httpx
import pytest

from clients.gateway_process import MODEL, WIDTH, Gateway

HEADERS = {"authorization": "Bearer any", "content-type": "application/json", "accept": "application/json"}
RECORDED = {
    "openai, lm_studio, xinference: no encoding_format": ("/v1", b'{"model":"all-minilm-l6-v2","input":"hello"}'),
    "openai: fields that it hands on": (
        "/v1",
        b'{"model":"all-minilm-l6-v2","input":["hello"],"user":"u1",'
        b'"encoding_format":"float","task":"retrieval.query"}',
    ),
    "hosted_vllm: dimensions": ("/v1", b'{"model":"all-minilm-l6-v2","input":["hello"],"dimensions":384}'),
    "infinity: dimensions by another name": (
        "",
        b'{"input": ["hello"], "model": "all-minilm-l6-v2", "output_dimension": 384}',
    ),
    "jina_ai: a task": (
        "/v1",
        b'{"model": "all-minilm-l6-v2", "dimensions": 384, "task": "retrieval.passage", "input": ["hello"]}',
    ),
}


@pytest.mark.parametrize(("prefix", "body"), RECORDED.values(), ids=RECORDED)
def test_a_recorded_request_is_answered_with_what_litellm_reads(gateway: Gateway, prefix: str, body: bytes) -> None:
    answer = httpx.post(f"{gateway.root_url}{prefix}/embeddings", content=body, headers=HEADERS)

    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["object"] == "list"
    assert content["model"] == MODEL
    assert [(item["object"], item["index"], len(item["embedding"])) for item in content["data"]] == [
        ("embedding", 0, WIDTH)
    ]
    assert all(type(number) is float for number in content["data"][0]["embedding"])
    assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] == 3


def test_an_error_has_the_message_where_litellm_looks(gateway: Gateway) -> None:
    body = b'{"model":"all-minilm-l6-v2","input":["hello"],"dimensions":256}'

    answer = httpx.post(f"{gateway.base_url}/embeddings", content=body, headers=HEADERS)

    assert answer.status_code == 400
    content = answer.json()
    assert "`dimensions` is 256" in content["error"]["message"]
    assert content["error"]["message"] == content["message"] == content["detail"]
