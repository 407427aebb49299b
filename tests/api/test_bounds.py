"""The cost of a request is bounded, on every path: memory before the work, time on the event loop."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import http.client
import json
import random
import socket
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from gateway.api import endpoint, json_body, pieces
from gateway.api.json_body import RequestBody
from gateway.api.openai_schema import EmbeddingsBody
from gateway.api.rerank_schema import RerankBody
from gateway.api.tei_schema import EmbedBody, TokenizeBody
from gateway.backends.fake import FakeBackend, fake_info
from gateway.errors import BadInput
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelKind, Output

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
Serve = Callable[..., AbstractContextManager[tuple[str, int]]]
MakeModel = Callable[..., Any]
CheckError = Callable[..., str]
MIB = 1 << 20
SMALL = {"memory_budget_bytes": 64 * MIB}
BOMB_BYTES = 8 * MIB
ALIAS = {"default": "mini"}


def reserved() -> float:
    [metric] = metrics.MEMORY_RESERVED.collect()  # a hundredth of the time that a request to the registry takes
    return metric.samples[0].value


@pytest.fixture(autouse=True)
def _all_is_given_back() -> Iterator[None]:
    """Check that every request has returned its part of the budget."""
    yield
    assert reserved() == 0


# ----------------------------------------------------------------------------------------------------- before the work


@pytest.fixture
def jobs() -> list[EmbedJob]:
    """Return a list that every job is added to that a model is given."""
    return []


@pytest.fixture
def wide(make_model: MakeModel, jobs: list[EmbedJob]) -> Any:
    """Return a model whose answers are large: 64 kB a text, or a token."""
    outputs = (Output.DENSE, Output.SPARSE)
    info = fake_info("mini", width=16_384, max_tokens=100_000, outputs=outputs)
    return make_model("mini", backend=FakeBackend(info, on_embed=jobs.append), width=16_384, outputs=outputs)


@pytest.fixture
def ranker(make_model: MakeModel, jobs: list[EmbedJob]) -> Any:
    """Return a model that reranks."""
    info = fake_info("rr", width=1, kind=ModelKind.RERANK, max_tokens=1_000_000)
    return make_model("rr", backend=FakeBackend(info, on_embed=jobs.append), width=1, kind=ModelKind.RERANK)


MANY = ["a"] * 300
TOO_LARGE = {
    "/v1/embeddings": {"input": MANY},
    "/openai/deployments/mini/embeddings": {"input": MANY},
    "/tei/mini/embed": {"inputs": MANY},
    "/embed": {"inputs": MANY},
    "/tei/mini/embed_sparse": {"inputs": MANY},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": MANY}},
    "/api/embed": {"input": MANY},
}


@pytest.mark.parametrize("path", TOO_LARGE)
async def test_an_answer_that_never_fits_is_refused_before_it_is_computed(
    connect: Connect, wide: Any, jobs: list[EmbedJob], path: str
) -> None:
    client = await connect(wide, aliases=ALIAS, **SMALL)

    response = await client.post(path, json={"model": "mini", **TOO_LARGE[path]})

    assert response.status_code == 413, response.text
    assert f"the maximum is {32 * MIB}" in response.text
    assert not jobs


async def test_vectors_of_tokens_are_refused_once_their_number_is_known(connect: Connect, wide: Any) -> None:
    client = await connect(wide, aliases=ALIAS, **SMALL)

    response = await client.post("/tei/mini/embed_all", json={"inputs": ["word " * 600]})

    assert response.status_code == 413, response.text
    assert (await client.post("/tei/mini/embed_all", json={"inputs": ["word " * 60]})).status_code == 200


async def test_tokens_that_wait_are_counted(connect: Connect, ranker: Any) -> None:
    client = await connect(ranker, aliases={}, **SMALL)
    body = {"model": "rr", "query": "w " * 30_000, "documents": ["a"] * 40}

    response = await client.post("/v1/rerank", json=body)

    assert response.status_code == 413, response.text
    assert (await client.post("/v1/rerank", json={**body, "query": "w"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tokenize", {"model": "mini", "input": "a " * 100_000}),
        ("/tei/mini/tokenize", {"inputs": "a " * 100_000}),
        ("/tei/mini/decode", {"ids": [1] * 100_000}),
    ],
)
async def test_texts_that_are_split_into_tokens_are_counted(
    connect: Connect, wide: Any, path: str, body: dict[str, object]
) -> None:
    client = await connect(wide, aliases=ALIAS, **SMALL)

    assert (await client.post(path, json=body)).status_code == 413


# ------------------------------------------------------------------------------------------------------- while it runs


PARALLEL = {
    "/v1/embeddings": {"input": ["a"] * 40},
    "/tei/mini/embed": {"inputs": ["a"] * 40},
    "/tei/mini/embed_all": {"inputs": ["word " * 120]},
    "/api/embed": {"input": ["a"] * 40},
}


@pytest.mark.parametrize("path", PARALLEL)
async def test_requests_that_do_not_fit_next_to_others_are_asked_to_retry(
    connect: Connect, make_model: MakeModel, path: str
) -> None:
    backend = FakeBackend(fake_info("mini", width=16_384, max_tokens=1000), delay_s=0.3)
    client = await connect(make_model("mini", backend=backend, width=16_384), aliases=ALIAS, **SMALL)

    responses = await asyncio.gather(*(client.post(path, json={"model": "mini", **PARALLEL[path]}) for _ in range(10)))

    statuses = sorted(response.status_code for response in responses)
    assert set(statuses) == {200, 503}
    refused = next(response for response in responses if response.status_code == 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert "bytes of memory" in refused.text
    assert (await client.post(path, json={"model": "mini", **PARALLEL[path]})).status_code == 200


def unread(address: tuple[str, int], request: bytes) -> socket.socket:
    """Send a request, and do not read its answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.sendall(request)
    return connection


def post(path: str, body: bytes, key: str = "", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: gateway", f"content-length: {len(body)}", f"authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answer_of(connection: socket.socket) -> http.client.HTTPResponse:
    connection.settimeout(30)
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def keys_file(tmp_path: Any) -> Any:
    """Return a file of keys for two clients, whose keys are their names."""
    path = tmp_path / "keys.yaml"
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("attacker", "victim")}
    entries = "".join(f"  - name: {name}\n    sha256: [{digest}]\n" for name, digest in hashes.items())
    path.write_text("version: 1\nkeys:\n" + entries)
    return path


def test_unread_answers_fill_only_the_share_of_their_client(
    serve: Serve, make_model: MakeModel, keys_file: Any
) -> None:
    """The arrays of an unread answer stay, but not its JSON; its client gets no more memory, and others do."""
    request = post("/v1/embeddings", json.dumps({"model": "mini", "input": ["a"] * 600}).encode(), "attacker")
    with serve(make_model("mini", width=4096), api_keys_file=keys_file, **SMALL) as address:
        deaf = [unread(address, request)]
        for num in range(2, 20):
            deaf.append(unread(address, request))
            wait_until(lambda num=num: count_requests(address) >= num)
        wait_until(lambda: reserved() <= 32 * MIB)
        held = reserved()
        victim = socket.create_connection(address)
        victim.sendall(post("/v1/embeddings", json.dumps({"model": "mini", "input": ["b"] * 100}).encode(), "victim"))
        served = answer_of(victim)
        content = json.loads(served.read())
        for connection in (*deaf, victim):
            connection.close()
        wait_until(lambda: reserved() == 0)

    assert served.status == 200
    assert len(content["data"]) == 100
    assert 8 * MIB < held <= 32 * MIB


def count_requests(address: tuple[str, int]) -> int:
    """Return how many requests have been begun: those in flight, and those that were refused."""
    in_flight = metrics.REGISTRY.get_sample_value("gateway_requests_in_flight") or 0
    refused = metrics.REGISTRY.get_sample_value("gateway_errors_total", {"code": "memory_full"}) or 0
    return int(in_flight + refused)


def test_a_body_is_reserved_when_it_is_announced(serve: Serve, keys_file: Any) -> None:
    body = b'{"model": "mini", "input": "%s"}' % (b"a" * 15_000_000)
    with serve(api_keys_file=keys_file, **SMALL) as address:
        waiting = [unread(address, post("/v1/embeddings", body, "attacker")[:300]) for _ in range(2)]
        wait_until(lambda: reserved() > 29_000_000)
        with socket.create_connection(address) as third:
            third.sendall(
                post("/v1/embeddings", body, "attacker", expect="100-continue")[:300].partition(b"\r\n\r\n")[0]
                + b"\r\n\r\n"
            )
            refused = answer_of(third)
            error = json.loads(refused.read())["error"]
        with socket.create_connection(address) as victim:
            victim.sendall(post("/v1/embeddings", b'{"model": "mini", "input": "a"}', "victim"))
            assert answer_of(victim).status == 200
        for connection in waiting:
            connection.close()
        wait_until(lambda: reserved() == 0)

    assert (refused.status, error["code"]) == (503, "memory_full")
    assert refused.headers["retry-after"]


def test_a_body_without_a_length_is_reserved_as_it_comes(serve: Serve) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
    with serve(**SMALL) as address:
        coming = unread(address, head + b"%x\r\n%b\r\n" % (5_000_000, b" " * 5_000_000))
        wait_until(lambda: reserved() >= 5_000_000)
        assert reserved() < 6_000_000
        coming.close()
        wait_until(lambda: reserved() == 0)


async def test_texts_count_with_the_memory_they_take(connect: Connect) -> None:
    """One emoji makes four bytes of each letter."""
    client = await connect(**SMALL)
    body = {"model": "mini", "input": "😀" + "a" * 9_000_000}

    assert (await client.post("/v1/embeddings", json={**body, "input": "a" * 9_000_000})).status_code == 200
    refused = await client.post("/v1/embeddings", content=json.dumps(body, ensure_ascii=False).encode())
    assert refused.status_code == 413, refused.text


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("encoding", ["float", "base64", "binary", "ubinary"])
async def test_a_large_answer_is_that_of_its_texts_one_by_one(
    connect: Connect, make_model: MakeModel, encoding: str
) -> None:
    client = await connect(make_model("mini", width=64), aliases=ALIAS)
    texts = [f"text {i}" for i in range(2000)]

    large = await client.post("/v1/embeddings", json={"model": "mini", "input": texts, "encoding_format": encoding})
    small = [
        await client.post("/v1/embeddings", json={"model": "mini", "input": text, "encoding_format": encoding})
        for text in texts[::500]
    ]

    assert large.status_code == 200
    assert ("content-length" in large.headers) == (encoding != "float")
    assert all("content-length" in one.headers for one in small)
    rows = large.json()["data"]
    assert [row["index"] for row in rows] == list(range(2000))
    assert [row["embedding"] for row in rows[::500]] == [one.json()["data"][0]["embedding"] for one in small]


def test_http_1_0_without_chunks_gets_the_length(serve: Serve, make_model: MakeModel) -> None:
    request = post("/embed", json.dumps({"inputs": ["a"] * 1000}).encode()).replace(b"HTTP/1.1", b"HTTP/1.0")
    with serve(make_model("mini", width=256)) as address, socket.create_connection(address) as old:
        old.sendall(request.replace(b"/embed", b"/tei/mini/embed"))
        answer = answer_of(old)
        content = answer.read()

    assert answer.headers["transfer-encoding"] is None
    assert int(answer.headers["content-length"]) == len(content)
    assert np.array(json.loads(content)).shape == (1000, 256)


async def test_large_answers_are_written_in_the_thread(
    connect: Connect, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def in_pieces(parts: Iterator[bytes]) -> Iterator[bytes]:
        for part in parts:
            threads.add(threading.current_thread().name)
            yield part

    monkeypatch.setattr(pieces, "in_pieces", in_pieces)
    client = await connect(make_model("mini", width=512), aliases=ALIAS)

    response = await client.post("/tei/mini/embed", json={"inputs": ["a"] * 500})

    assert len(response.json()) == 500
    assert {name.partition("_")[0] for name in threads} == {"json"}


async def test_the_log_has_the_time_that_a_large_answer_took_to_write(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model("wide", width=2048), aliases={})
    labels = {"model": "wide", "task": "", "experiment": "", "arm": "", "stage": "serialize"}

    answer = await client.post("/v1/embeddings", json={"model": "wide", "input": ["a"] * 500})

    # The headers went out before anything was written.
    assert "serialize" not in answer.headers["server-timing"]
    assert metrics.REGISTRY.get_sample_value("gateway_stage_duration_seconds_count", labels) == 1
    assert (metrics.REGISTRY.get_sample_value("gateway_stage_duration_seconds_sum", labels) or 0) > 0.001


# --------------------------------------------------------------------------------------------------------------- bodies


async def test_large_bodies_are_parsed_in_the_thread_and_small_ones_are_not(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    parse_object = json_body.parse_object

    def parse(body: bytearray, *arguments: Any) -> object:
        threads.append(threading.current_thread().name.partition("_")[0])
        return parse_object(body, *arguments)

    monkeypatch.setattr(endpoint, "parse_object", parse)
    client = await connect()

    for path, field in (("/v1/embeddings", "input"), ("/tei/mini/embed", "inputs"), ("/api/embed", "input")):
        for size in (10, 100_000):
            assert (await client.post(path, json={"model": "mini", field: "a" * size})).status_code == 200
    assert threads == ["MainThread", "json"] * 3


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (EmbeddingsBody, "model"),
        (EmbeddingsBody, "task"),
        (EmbeddingsBody, "input_type"),
        (EmbeddingsBody, "prompt_name"),
        (EmbeddingsBody, "task_type"),
        (RerankBody, "model"),
        (EmbedBody, "prompt_name"),
        (TokenizeBody, "prompt_name"),
    ],
)
def test_of_a_name_no_more_is_looked_up_than_a_name_may_have(body: type[RequestBody], field: str) -> None:
    given = {"input": "a", "inputs": "a", "query": "a", field: "n" * MIB}

    assert len(getattr(body.parse(given), field)) == 10_000


BOMBS = {
    "numbers": (b'{"model":"mini","input":[' + b"1," * 600_000 + b"1]}", "more than 500000 values"),
    "empty lists": (b'{"model":"mini","input":[' + b"[]," * 100_000 + b"1]}", "more than 50000 lists and objects"),
    "empty objects": (b'{"model":"mini","input":[' + b"{}," * 100_000 + b"1]}", "more than 50000 lists and objects"),
    "nested": (b'{"model":"mini","input":' + b"[" * 100_000, "more than 50000 lists and objects"),
    "keys": (
        b'{"input":"a",' + b",".join(b'"%d":1' % i for i in range(60_000)) + b"}",
        "more than 50000 keys",
    ),
    "the same key": (b'{"input":"a",' + b'"a":1,' * 60_000 + b'"b":1}', "more than 50000 keys"),
    "elsewhere": (b'{"input":"a","outputs":[' + b"1," * 600_000 + b"1]}", "more than 500000 values"),
    "backslashes": (
        b'{"input":"' + rb"\n" * 3_000_001 + b'"}',
        "more than 3000000 backslashes, which is the limit: send fewer inputs in a request, or characters as",
    ),
    "lone surrogates": (b'{"input":"' + rb"\ud83d" * 100_001 + b'"}', "more than 100000 lone surrogates"),
}


@pytest.mark.parametrize(
    ("path", "bomb"),
    [
        *(("/v1/embeddings", bomb) for bomb in BOMBS),
        *((path, "numbers") for path in ("/embed", "/embed_all", "/tokenize", "/v1/rerank", "/api/embed")),
    ],
)
async def test_a_body_of_very_many_parts_is_refused_before_it_is_parsed(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, bomb: str
) -> None:
    body, message = BOMBS[bomb]
    if bomb != "lone surrogates":  # which the parser finds
        monkeypatch.setattr(json_body, "_parse", lambda *_arguments: pytest.fail("parsed"))

    response = await client.post(path, content=body)

    assert response.status_code in {400, 422}
    assert message in response.text


async def test_a_text_that_looks_like_many_parts_is_one_text(client: httpx.AsyncClient) -> None:
    text = '[{,:}]\\"' * 200_000

    response = await client.post("/v1/embeddings", json={"model": "mini", "input": text})

    assert response.status_code == 200, response.text


WRONG = {
    "model": "m" * 100_000,
    "task": "t" * 100_000,
    "outputs": ["dense"] * 100_000,
    "dimensions": [1] * 100_000,
    "encoding_format": {str(i): 1 for i in range(10_000)},
    "truncate": ["x"] * 100_000,
    "input": [["a"] * 100_000],
    "user": "u" * 100_000,
}


@pytest.mark.parametrize("field", WRONG)
async def test_a_huge_value_in_any_field_is_refused_in_a_line(
    client: httpx.AsyncClient, check_error: CheckError, field: str
) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", "model": "mini", field: WRONG[field]})

    assert 400 <= response.status_code < 500
    assert len(response.content) < 2_000


# ------------------------------------------------------------------------------------------------------------- encodings


def deflate(data: bytes) -> bytes:
    return zlib.compress(data)


ENCODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": deflate, "zstd": zstandard.compress}


@pytest.mark.parametrize("coding", ENCODERS)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "mini", "input": "hi"}),
        ("/embed", {"inputs": "hi"}),
        ("/api/embed", {"input": "hi"}),
    ],
)
async def test_compressed_bodies_are_decoded_on_every_path(
    client: httpx.AsyncClient, coding: str, path: str, body: dict[str, object]
) -> None:
    content = ENCODERS[coding](json.dumps(body).encode())

    response = await client.post(path, content=content, headers={"content-encoding": coding})

    assert response.status_code == 200, response.text


@pytest.mark.parametrize("coding", ENCODERS)
async def test_the_limit_is_that_of_the_decoded_body(connect: Connect, check_error: CheckError, coding: str) -> None:
    client = await connect(max_body_bytes=BOMB_BYTES)
    head, tail = b'{"model":"mini","input":"', b'"}'

    for size, status in ((BOMB_BYTES - len(head + tail), 200), (BOMB_BYTES, 413)):
        body = ENCODERS[coding](head + b"a" * size + tail)
        assert len(body) < 20_000
        response = await client.post("/v1/embeddings", content=body, headers={"content-encoding": coding})
        assert response.status_code == status, response.text


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_bomb_takes_no_more_than_the_limit(serve: Serve, coding: str) -> None:
    bomb = ENCODERS[coding](bytes(100 * MIB))
    held: list[float] = []
    with serve(**SMALL) as address:
        sent = unread(address, post("/v1/embeddings", bomb, content_encoding=coding))
        thread = threading.Thread(target=lambda: [held.append(reserved()) or time.sleep(0.001) for _ in range(300)])
        thread.start()
        answer = answer_of(sent)
        thread.join()
        sent.close()

    assert answer.status == 413
    assert max(held) < 32 * MIB


@pytest.mark.parametrize("coding", ["br", "gzip, zstd", "compress"])
async def test_other_codings_are_refused_with_those_that_are_supported(
    client: httpx.AsyncClient, check_error: CheckError, coding: str
) -> None:
    response = await client.post("/v1/embeddings", content=b"x", headers={"content-encoding": coding})

    message = check_error(response, 415, "unsupported_encoding")
    assert "gzip, deflate, zstd" in message


@pytest.mark.parametrize("coding", ENCODERS)
async def test_a_body_in_another_charset_than_its_header_names_is_a_bad_request(
    client: httpx.AsyncClient, check_error: CheckError, coding: str
) -> None:
    response = await client.post("/v1/embeddings", content=b'{"input": "a"}', headers={"content-encoding": coding})

    assert f"not valid {coding}, which `Content-Encoding` says it is" in check_error(response, 400, "invalid_input")


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        ('{"input": "a"}'.encode("utf-16"), "application/json", "is in UTF-16: send it in UTF-8"),
        ('{"input": "a"}'.encode("utf-16-le"), "application/json; charset=utf-16le", "says utf-16le: send it in UTF-8"),
        ('{"input": "a"}'.encode("utf-16-be"), "application/json", "is in UTF-16 or UTF-32: send it in UTF-8"),
        ('{"input": "a"}'.encode("utf-32"), "application/json", "is in UTF-32: send it in UTF-8"),
        (
            '{"input": "é"}'.encode("latin-1"),
            'application/json; charset="ISO-8859-1"',
            "byte 11 is 0xe9; its content type says ISO-8859-1. Send it in UTF-8",
        ),
        ('{"input": "é"}'.encode("latin-1"), "a/b" + "; c=d" * 200 + "; charset=latin-1", "byte 11 is 0xe9. Send it"),
    ],
)
async def test_another_encoding_than_utf_8_is_named(
    client: httpx.AsyncClient, check_error: CheckError, body: bytes, content_type: str, expected: str
) -> None:
    response = await client.post("/v1/embeddings", content=body, headers={"content-type": content_type})

    assert expected in check_error(response, 400, "invalid_input")


@pytest.mark.parametrize("charset", ["latin-1", "utf-8", "x", "x; charset*=utf-8''y; charset*0=z"])
async def test_utf_8_is_read_with_any_declared_charset(client: httpx.AsyncClient, charset: str) -> None:
    response = await client.post(
        "/v1/embeddings",
        content='{"model": "mini", "input": "é"}'.encode(),
        headers={"content-type": f"application/json; charset={charset}"},
    )

    assert response.status_code == 200


# ---------------------------------------------------------------------------------------------------------- JSON, read


def test_values_outside_strings_are_counted_for_any_split_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    for size in (3, 5, 7, 64):
        monkeypatch.setattr(json_body, "_PIECE_BYTES", size)
        for _ in range(500):
            texts = ["".join(rng.choices('a"\\,:[{é\n', k=rng.randint(0, 12))) for _ in range(rng.randint(0, 4))]
            body = json.dumps({"".join(rng.choices('a"\\,', k=3)): texts}).encode()

            found = b"".join(json_body._outside_strings(body)).replace(b" ", b"")

            assert found == b"{:[" + b"," * (len(texts) - 1) + b"]}", body


@pytest.mark.parametrize(
    ("limit", "content", "more"),
    [
        ("_MAX_VALUES", '{"a": [1, 2, 3, 4]}', '{"a": [1, 2, 3, 4, 5]}'),
        ("_MAX_CONTAINERS", '{"a": [[]]}', '{"a": [[], {}]}'),
        ("_MAX_KEYS", '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2, "c": 3, "d": 4}'),
        ("_MAX_BACKSLASHES", r'{"a": "\n\n\n"}', r'{"a": "\n\n\n\n"}'),
        ("_MAX_LONE_SURROGATES", r'{"a": "\ud83d\ud83d\ud83d"}', r'{"a": "\ud83d\ud83d\ud83d\ud83d"}'),
    ],
)
def test_a_body_may_have_as_many_parts_as_the_limit_and_no_more(
    monkeypatch: pytest.MonkeyPatch, limit: str, content: str, more: str
) -> None:
    monkeypatch.setattr(json_body, limit, 3)
    monkeypatch.setattr(json_body, "SMALL_BYTES", 0)
    monkeypatch.setattr(json_body, "_PIECE_BYTES", 5)

    assert json_body.parse_object(content.encode())
    with pytest.raises(BadInput, match="more than 3 "):
        json_body.parse_object(more.encode())


@pytest.mark.parametrize(
    ("value", "description"),
    [
        ("é", "the string 'é'"),
        ("x" * 40, f"the string '{'x' * 40}'"),
        ("x" * 41, f"the string '{'x' * 40}…' of 41 characters"),
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1, "the number 1"),
        (0.5, "the number 0.5"),
        (10**50, f"the number 1{'0' * 39}"),
        ([], "an empty list"),
        ([1, 2], "a list of 2"),
        ({}, "an empty object"),
        ({"a": 1, "k" * 50: 2, "c": 3, "d": 4}, f"an object with 'a', '{'k' * 40}', 'c'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_is_described_in_a_few_words(value: json_body.Json, description: str) -> None:
    assert json_body.describe(value) == description


def test_lone_surrogates_are_replaced_as_python_would(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    parts = ["\ud83d", "\ude00", "\ud83d\ude00", "\\", "\\\\", "\\ud83d", "a", '"', "\u00e9", "\udbff", "\udc00"]
    for size in (7, 12, 64):
        monkeypatch.setattr(json_body, "_PIECE_BYTES", size)
        for _ in range(500):
            text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
            expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

            assert json_body.parse_object(json.dumps({"a": text}).encode()) == {"a": expected}
