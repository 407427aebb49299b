"""Files and batches by OpenAI's own client, unmodified, against the application in this process."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args
from unittest.mock import Mock

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from gateway.api.batch_lines import LineRequests
from gateway.api.openai import OpenAIDialect
from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.batches.lines import Answered, Line
from gateway.batches.runner import Runner
from gateway.batches.store import Store
from gateway.batches.values import Batch, BatchesUnavailable, Status, StorageFull
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import BadInput, InferenceFailed, ModelNotReady
from gateway.fleet import Model
from gateway.http.multipart import Multipart
from gateway.types import EmbedJob, ModelKind, Priority

KEYS = ("first-secret-key", "second-secret-key")
PATIENCE_S = 20.0


class Served:
    """A gateway over fakes whose jobs are noted."""

    def __init__(self, app: Any, deployment: Deployment, jobs: list[EmbedJob]) -> None:
        self.app = app
        self.deployment = deployment
        self.jobs = jobs
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway/v1")

    def client(self, key: str = KEYS[0]) -> AsyncOpenAI:
        return AsyncOpenAI(api_key=key, base_url="http://gateway/v1", http_client=self.http, max_retries=0)


Start = Callable[..., Awaitable[Served]]


@pytest.fixture
async def start(
    tmp_path: Path, make_model: Callable[..., Model], make_fleet: Callable[..., Any]
) -> AsyncIterator[Start]:
    """Return a function that starts a gateway with a folder for batches; all that is started is stopped."""
    async with AsyncExitStack() as stack:

        async def start(
            on_embed: Callable[[EmbedJob], None] = lambda _job: None, folder: str = "batches", **settings: Any
        ) -> Served:
            jobs: list[EmbedJob] = []

            def note(job: EmbedJob) -> None:
                on_embed(job)
                jobs.append(job)

            infos = [
                {"model_id": "mini", "width": 8, "max_tokens": 8},
                {"model_id": "other", "width": 4},
                {"model_id": "ranker", "kind": ModelKind.RERANK, "width": 1, "dimensions": (1,)},
            ]
            models = [make_model(**info, backend=FakeBackend(fake_info(**info), on_embed=note)) for info in infos]
            registry, fleet = make_fleet(*models, aliases={"default": "mini"}, experiments=())
            for model in fleet:
                await model.backend.start()
            fleet.started.set()
            values = {"batch_dir": tmp_path / folder, "api_keys": KEYS, **settings}
            deployment = Deployment(registry, Settings(**values), fleet)
            app = create_app(deployment)
            stack.push_async_callback(deployment.stop)
            served = Served(app, deployment, jobs)
            stack.push_async_callback(served.http.aclose)
            return served

        yield start


def line(custom_id: str, url: str = "/v1/embeddings", **body: Any) -> dict[str, Any]:
    body = {"model": "mini", "input": f"text of {custom_id}", **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


# Made at each collection of the tests, so not as JSON line by line.
_LINE = jsonl(line("@"))
MANY = b"".join(_LINE.replace(b"@", b"%d" % number) for number in range(50_001))


async def looked_at(look: Callable[[], Awaitable[Any]], is_right: Callable[[Any], bool]) -> Any:
    """Check until the result is right, and return it."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_right(found := await look()):  # noqa: ASYNC110  another client has no event either
            await asyncio.sleep(0.01)
    return found


async def ended(client: AsyncOpenAI, batch_id: str) -> Any:
    final = ("completed", "failed", "expired", "cancelled")
    return await looked_at(lambda: client.batches.retrieve(batch_id), lambda batch: batch.status in final)


async def has_begun(client: AsyncOpenAI, batch_id: str) -> None:
    await looked_at(lambda: client.batches.retrieve(batch_id), lambda batch: batch.request_counts.completed > 0)


async def run(client: AsyncOpenAI, content: bytes, endpoint: Any = "/v1/embeddings", **fields: Any) -> Any:
    """Upload a file, make a batch of it, and return the batch when it has ended."""
    file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)
    return await ended(client, batch.id)


async def rows(client: AsyncOpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    return [json.loads(row) for row in (await client.files.content(file_id)).text.splitlines()]


# ------------------------------------------------------------------------------------------------------ a whole batch


async def test_a_batch_from_the_upload_to_its_output(start: Start) -> None:
    served = await start()
    client = served.client()

    batch = await run(client, jsonl(*(line(f"r{i}") for i in range(200))), metadata={"name": "nightly"})

    assert batch.status == "completed"
    assert (batch.endpoint, batch.completion_window, batch.model) == ("/v1/embeddings", "24h", "mini")
    assert batch.metadata == {"name": "nightly"}
    assert batch.errors is None
    assert batch.error_file_id is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (200, 200, 0)
    assert batch.usage.total_tokens == 600
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 24 * 3600
    found = await rows(client, batch.output_file_id)
    assert [row["custom_id"] for row in found] == [f"r{i}" for i in range(200)]
    assert len({row["id"] for row in found}) == len({row["response"]["request_id"] for row in found}) == 200
    assert all(set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None for row in found)
    assert {job.priority for job in served.jobs} == {Priority.LOW}
    assert min(job.deadline for job in served.jobs) > time.monotonic() + 23 * 3600  # and not that of a request
    output = await client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.object, output.status) == ("batch_output", "file", "processed")
    assert output.bytes == len((await client.files.content(batch.output_file_id)).content)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/embeddings", {"input": ["a b", "c"], "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": "a b", "dimensions": 8, "user": "ada"}),
        ("/v1/embeddings", {"input": "😀 日本", "model": "default"}),
        ("/v1/embeddings", {"input": "a", "dimensions": 7}),
        ("/v1/embeddings", {}),
        ("/v1/rerank", {"model": "ranker", "query": "a b", "documents": ["a", "b c"], "input": None}),
    ],
)
async def test_a_line_gets_the_very_body_that_a_request_gets(start: Start, url: str, body: dict[str, Any]) -> None:
    served = await start()
    client = served.client()
    request = line("one", url, **body)
    if not body:
        del request["body"]["input"]
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    expected = await served.http.post(url.removeprefix("/v1"), json=request["body"], headers=headers)

    batch = await run(client, jsonl(request), url)

    is_ok = expected.status_code == 200
    file_id = batch.output_file_id if is_ok else batch.error_file_id
    content = (await client.files.content(file_id)).content
    response = json.loads(content)["response"]
    assert response["status_code"] == expected.status_code
    written = expected.content
    if url == "/v1/rerank":  # its body has the id of the request
        written = written.replace(expected.headers["x-request-id"].encode(), response["request_id"].encode())
    assert b'"body":' + written + b"}" in content
    assert (batch.request_counts.completed, batch.request_counts.failed) == (is_ok, not is_ok)


def missing_fields(kind: Any, content: Any, name: str = "") -> set[str]:
    """Return the fields of a type of the client that a response lacks, at any depth."""
    kinds = [kind, *get_args(kind)]
    if isinstance(content, list):
        return {field for item in content for one in kinds[1:] for field in missing_fields(one, item, name)}
    missing: set[str] = set()
    for one in kinds:
        if isinstance(content, dict) and isinstance(one, type) and issubclass(one, openai.BaseModel):
            missing |= {f"{name}.{field}" for field in one.model_fields.keys() - content.keys()}
            for field, info in one.model_fields.items():
                missing |= missing_fields(info.annotation, content.get(field), f"{name}.{field}")
    return missing


async def test_no_field_of_the_client_s_types_is_missing(start: Start) -> None:
    client = (await start()).client()
    good, bad = await run(client, jsonl(line("a"), line("b", input=7))), await run(client, b"no json\n")
    raw = client.with_raw_response
    file_id = good.input_file_id

    found = [
        (openai.types.Batch, await raw.batches.retrieve(good.id)),
        (openai.types.Batch, await raw.batches.retrieve(bad.id)),
        (openai.types.FileObject, await raw.files.retrieve(good.error_file_id)),
        (openai.types.FileObject, await raw.files.create(file=("a.jsonl", b"x"), purpose="batch")),
        (openai.types.FileDeleted, await raw.files.delete(file_id)),
    ]

    assert [missing_fields(kind, json.loads(answer.text)) for kind, answer in found] == [set()] * 5
    assert missing_fields(openai.types.Batch, {"errors": {"data": [{}]}}) >= {".id", ".errors.data.line"}


async def test_lines_that_fail_are_in_the_error_file_and_the_others_in_the_output(start: Start) -> None:
    client = (await start()).client()

    batch = await run(client, jsonl(line("good"), line("bad", input=7), line("fine")))

    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    assert [row["custom_id"] for row in await rows(client, batch.output_file_id)] == ["good", "fine"]
    [error] = await rows(client, batch.error_file_id)
    assert (error["custom_id"], error["error"], error["response"]["status_code"]) == ("bad", None, 400)
    assert error["response"]["body"]["error"]["param"] == "input"


async def test_a_request_that_a_full_queue_or_a_loading_model_refuses_is_sent_again(start: Start) -> None:
    refusals = iter([ModelNotReady("loading", retry_after_s=None), InferenceFailed("once"), InferenceFailed("twice")])

    def refuse(_job: EmbedJob) -> None:
        if (error := next(refusals, None)) is not None:
            raise error

    client = (await start(refuse)).client()

    batch = await run(client, jsonl(line("a"), line("b")))

    assert batch.request_counts.completed == 2


async def test_a_request_that_always_fails_ends_in_an_error_and_does_not_delay_the_others(start: Start) -> None:
    def fail(job: EmbedJob) -> None:
        if "poison" in job.texts[0]:
            raise InferenceFailed("it cannot be computed")

    client = (await start(fail)).client()

    batch = await run(client, jsonl(line("a"), line("b", input="poison"), line("c")))

    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    [error] = await rows(client, batch.error_file_id)
    assert error["response"]["status_code"] == 500


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("content", "code", "where"),
    [
        (b"   \n\n", "empty_file", None),
        (b"no json\n", "invalid_json_line", 1),
        (jsonl(line("a")) + b"\x00\x01\n", "invalid_json_line", 2),
        (jsonl(line("a")) + b'{"custom_id": "\xff"}\n', "invalid_json_line", 2),
        (b"[1, 2]\n", "invalid_json_line", 1),
        (jsonl(line("a"), line("b"), line("a")), "duplicate_custom_id", 3),
        (jsonl({**line("a"), "custom_id": 7}), "invalid_custom_id", 1),
        (jsonl({**line("a"), "custom_id": ""}), "invalid_custom_id", 1),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method", 1),
        (jsonl(line("a", "/v1/rerank")), "invalid_url", 1),
        (jsonl({**line("a"), "body": "text"}), "invalid_request", 1),
        (jsonl(line("a"), line("b", model="other")), "mismatched_model", 2),
        (b"\n\n" + jsonl(line("a", model="unknown")), "model_not_found", 3),
        (jsonl(line("a", model="ranker")), "unsupported_output", 1),
        (MANY, "too_many_requests", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_file_that_is_wrong_fails_with_the_line(
    start: Start, content: bytes, code: str, where: int | None
) -> None:
    client = (await start()).client()

    batch = await run(client, content)

    assert batch.status == "failed"
    assert batch.failed_at is not None
    [error] = batch.errors.data
    assert (error.code, error.line) == (code, where)
    assert error.message
    assert batch.output_file_id is None


async def test_a_line_that_is_longer_than_a_body_may_be_fails_with_its_number(start: Start) -> None:
    client = (await start(max_body_bytes=1000)).client()

    batch = await run(client, jsonl(line("a"), line("b", input="x" * 100_000), line("c", input="x" * 2000)))

    assert [(error.code, error.line) for error in batch.errors.data] == [("line_too_long", 2), ("line_too_long", 3)]


async def test_the_last_line_needs_no_end_and_blank_lines_do_not_count(start: Start) -> None:
    client = (await start()).client()

    batch = await run(client, b"\xef\xbb\xbf" + jsonl(line("a")) + b"\r\n\n" + jsonl(line("b"))[:-1])

    assert batch.request_counts.completed == 2


async def test_blank_lines_count_in_the_numbers_of_lines(start: Start) -> None:
    client = (await start(max_body_bytes=1000)).client()
    long_blank = b" " * 200_000 + jsonl(line("c"))

    batch = await run(client, b"\r\n\n" + jsonl(line("a")) + b"  \n" + b"no json\n\n" + long_blank)

    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 5), ("line_too_long", 7)]
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (0, 0, 0)


async def test_a_file_of_line_breaks_keeps_no_thread_busy(start: Start) -> None:
    client = (await start()).client()

    batch = await run(client, jsonl(line("a")) + b"\n" * 10_000_000)

    [error] = batch.errors.data
    assert error.code == "too_many_requests"
    assert "more than 200,000 lines" in error.message


async def test_the_requests_of_a_batch_may_differ_in_their_options(start: Start) -> None:
    client = (await start()).client()
    options: list[dict[str, Any]] = [
        {},
        {"normalized": False},
        {"encoding_format": "base64"},
        {"dimensions": 8},
        {"normalize": False, "outputs": ["dense"]},
        {"output_dtype": "binary"},
        {"input_type": "query"},
    ]
    lines = [line(f"r{i}", **options[i % len(options)]) for i in range(350)]

    batch = await run(client, jsonl(*lines))

    assert (batch.request_counts.completed, batch.request_counts.failed) == (350, 0)


@pytest.mark.parametrize("has_space", [True, False])
async def test_a_batch_expects_the_space_that_its_client_expects(start: Start, has_space: bool) -> None:
    served = await start()
    client = served.client()
    space = (await client.embeddings.with_raw_response.create(model="mini", input="a")).headers["x-gateway-space"]
    headers = {"x-gateway-expect-space": space if has_space else "mini@000000000000"}

    batch = await run(client, jsonl(line("a"), line("b")), extra_headers=headers)

    assert (batch.request_counts.completed, batch.request_counts.failed) == ((2, 0) if has_space else (0, 2))
    errors = [row["response"]["body"]["error"]["code"] for row in await rows(client, batch.error_file_id)]
    assert errors == ([] if has_space else ["space_mismatch"] * 2)


async def test_the_ways_in_which_requests_may_differ_are_bounded(start: Start) -> None:
    client = (await start()).client()

    batch = await run(client, jsonl(*(line(f"r{i}", task=f"task {i}" + "x" * 400) for i in range(300))))

    assert [(error.code, error.line) for error in batch.errors.data] == [
        ("too_many_options", i) for i in range(257, 301)
    ]


async def test_no_more_than_a_hundred_errors_are_listed(start: Start) -> None:
    client = (await start()).client()

    batch = await run(client, b"no\n" * 500)

    assert [error.line for error in batch.errors.data] == list(range(1, 101))


async def test_lines_may_leave_the_model_out_in_any_way_and_say_post_in_any_case(start: Start) -> None:
    served = await start()
    ways: list[Any] = [None, "", "default/not-specified"]
    lines = [{**line(f"{way!r}", model=way), "method": "Post"} for way in ways]
    lines.append(line("absent"))
    del lines[-1]["body"]["model"]

    batch = await run(served.client(), jsonl(*lines))

    assert (batch.status, batch.request_counts.completed) == ("completed", 4)
    assert {row["response"]["body"]["model"] for row in await rows(served.client(), batch.output_file_id)} == {"mini"}


@pytest.mark.parametrize("outputs", ["multivector", " MultiVector ", ["dense", "MULTIVECTOR"]])
async def test_a_line_is_as_heavy_as_its_answer_however_the_outputs_are_written(
    start: Start, outputs: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only two such lines are in flight, because their answers have a vector for each token."""
    in_flight = most = 0
    served = await start()

    async def counted(_requests: LineRequests, _batch: Batch, _line: Line) -> Answered:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.1)
        in_flight -= 1
        return Answered(200, "r", b"{}")

    monkeypatch.setattr(LineRequests, "answer", counted)

    await run(served.client(), jsonl(*(line(str(number), outputs=outputs) for number in range(8))))

    assert most == 2


# ------------------------------------------------------------------------------------------------- making and finding


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": "", "output_expires_after": ""},
        {"metadata": None, "output_expires_after": {"anchor": "", "seconds": ""}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 2_592_000.0}},
        {"output_expires_after": {"anchor": "created_at", "seconds": "2592000"}},
    ],
    ids=str,
)
async def test_a_batch_is_read_as_laxly_as_any_other_request(start: Start, fields: dict[str, Any]) -> None:
    served = await start()
    file = await served.client().files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h", **fields}

    response = await served.http.post("/batches", json=body, headers={"authorization": f"Bearer {KEYS[0]}"})

    assert response.status_code == 200, response.text
    assert response.json()["metadata"] is None
    batch = await ended(served.client(), response.json()["id"])
    output = await served.client().files.retrieve(batch.output_file_id)
    assert output.expires_at - output.created_at == 2_592_000


@pytest.mark.parametrize(
    "value", [True, "5 days", 3600.5, "1e6", [3600], "9" * 5000, -3600], ids=lambda value: repr(value)[:20]
)
async def test_an_end_that_is_not_a_number_of_seconds_is_refused(start: Start, value: object) -> None:
    served = await start()
    kept = {"anchor": "created_at", "seconds": value}
    body = {
        "input_file_id": "a",
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
        "output_expires_after": kept,
    }

    response = await served.http.post("/batches", json=body, headers={"authorization": f"Bearer {KEYS[0]}"})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "output_expires_after")
    assert len(response.text) < 1000


async def test_parameters_of_a_list_that_are_empty_are_absent(start: Start) -> None:
    served = await start()
    client = served.client()
    for number in range(3):
        await client.files.create(file=(f"{number}.jsonl", b"{}"), purpose="batch")

    response = await served.http.get(
        "/files?limit=&order=&after=&purpose=", headers={"authorization": f"Bearer {KEYS[0]}"}
    )

    assert response.status_code == 200, response.text
    assert [file["filename"] for file in response.json()["data"]] == ["2.jsonl", "1.jsonl", "0.jsonl"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-unknown"}, "input_file_id"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
    ],
)
async def test_a_batch_that_is_wrong_is_refused(start: Start, fields: dict[str, Any], param: str) -> None:
    client = (await start()).client()
    file = await client.files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")
    body: Any = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h", **fields}

    with pytest.raises(openai.APIStatusError) as refused:
        await client.batches.create(**body)

    assert refused.value.param == param


async def test_a_client_sees_its_own_files_and_batches_only(start: Start) -> None:
    served = await start()
    mine, other = served.client(), served.client(KEYS[1])
    batch = await run(mine, jsonl(line("a")))

    for attempt in (
        other.files.retrieve(batch.input_file_id),
        other.files.content(batch.output_file_id),
        other.files.delete(batch.output_file_id),
        other.batches.retrieve(batch.id),
        other.batches.cancel(batch.id),
        other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/embeddings", completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt
    assert [one async for one in other.files.list()] == []
    assert [one async for one in other.batches.list()] == []
    assert len([one async for one in mine.files.list()]) == 2


async def test_files_and_batches_are_listed_page_by_page(start: Start) -> None:
    client = (await start()).client()
    ids = [(await run(client, jsonl(line("a")))).id for _ in range(5)]

    assert [batch.id async for batch in client.batches.list(limit=2)] == ids[::-1]
    files = [file async for file in client.files.list(limit=3, order="asc")]
    assert len({file.id for file in files}) == 10
    assert {file.purpose async for file in client.files.list(purpose="batch_output")} == {"batch_output"}
    page = await client.batches.list(limit=2)
    assert page.has_more
    assert not (await client.batches.list(limit=100)).has_more
    for query in ("limit=0", "limit=101", "limit=x", "order=up"):
        response = await client._client.get(f"/batches?{query}", headers={"authorization": f"Bearer {KEYS[0]}"})
        assert response.status_code == 400


async def test_a_file_can_be_deleted_when_no_batch_needs_it(start: Start, tmp_path: Path) -> None:
    client = (await start()).client()
    batch = await run(client, jsonl(line("a")))

    for file_id in (batch.input_file_id, batch.output_file_id):
        deleted = await client.files.delete(file_id)
        assert (deleted.id, deleted.deleted) == (file_id, True)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file_id)
    assert list((tmp_path / "batches" / "files").iterdir()) == []


async def test_without_a_folder_the_paths_do_not_exist(start: Start) -> None:
    client = (await start(batch_dir=None)).client()

    for attempt in (
        client.batches.retrieve("batch_1"),
        client.files.create(file=("a", b"{}"), purpose="batch"),
        client.files.list(),
    ):
        with pytest.raises(openai.NotFoundError, match="set GATEWAY_BATCH_DIR"):
            await attempt


async def test_without_keys_all_clients_share_their_batches(start: Start) -> None:
    served = await start(api_keys=())

    batch = await run(served.client("any"), jsonl(line("a")))

    assert (await served.client("another").batches.retrieve(batch.id)).status == "completed"


async def test_more_batches_than_a_key_may_have_open_are_refused(start: Start) -> None:
    served = await start(batch_max_open=2)
    served.deployment.is_draining = True  # no batch continues
    client = served.client()
    file = await client.files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")

    async def create() -> Any:
        return await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")

    first = await create()
    await create()
    with pytest.raises(openai.RateLimitError, match="2 batches that have not ended"):
        await create()
    with pytest.raises(openai.BadRequestError, match=f"in use by {first.id}"):
        await client.files.delete(file.id)


# ---------------------------------------------------------------------------------------------------------- canceling


async def test_a_canceled_batch_keeps_its_answers(start: Start) -> None:
    served = await start()
    client = served.client()
    file = await client.files.create(file=("a.jsonl", jsonl(*(line(f"r{i}") for i in range(500)))), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    await has_begun(client, batch.id)
    canceled = await client.batches.cancel(batch.id)
    assert canceled.status == "cancelling"
    assert canceled.cancelling_at is not None

    batch = await ended(client, batch.id)

    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    found = await rows(client, batch.output_file_id)
    assert len(found) == batch.request_counts.completed < 500
    canceled = [row["custom_id"] for row in await rows(client, batch.error_file_id)]
    assert [row["custom_id"] for row in found] + canceled == [f"r{i}" for i in range(500)]
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a batch with status 'cancelled'"):
        await client.batches.cancel(batch.id)


# ------------------------------------------------------------------------------------------------------------- restart


async def test_a_batch_continues_where_it_was_after_a_restart(start: Start) -> None:
    first = await start()
    client = first.client()
    content = jsonl(*(line(f"r{i}") for i in range(500)))
    file = await client.files.create(file=("a.jsonl", content), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    # More answers than are in flight at once: the first of them are on disk.
    await looked_at(lambda: client.batches.retrieve(batch.id), lambda found: found.request_counts.completed > 64)
    await first.deployment.stop()
    num_before = len(first.jobs)

    second = await start()
    batch = await ended(second.client(), batch.id)

    assert batch.status == "completed"
    assert [row["custom_id"] for row in await rows(second.client(), batch.output_file_id)] == [
        f"r{i}" for i in range(500)
    ]
    assert 500 <= num_before + len(second.jobs) <= 500 + 64
    assert len(second.jobs) < 500


async def test_a_key_that_is_gone_ends_its_batches(start: Start) -> None:
    first = await start()
    first.deployment.is_draining = True
    client = first.client()
    file = await client.files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    await first.deployment.stop()

    second = await start(api_keys=KEYS[1:])
    second.client(KEYS[1])
    await second.client(KEYS[1]).files.list()  # which begins
    runner = next(iter(second.app.state.on_start)).__self__  # type: ignore[attr-defined]
    owner = f"key-{hashlib.sha256(KEYS[0].encode()).hexdigest()[:8]}"
    found = await looked_at(lambda: runner.find(owner, batch.id), lambda one: one.status.is_final)

    assert found.status == "failed"
    assert [error.code for error in found.errors] == ["invalid_api_key"]
    assert second.jobs == []


async def test_a_batch_without_a_key_does_not_run_with_one(start: Start, tmp_path: Path) -> None:
    first = await start(api_keys=())
    first.deployment.is_draining = True
    client = first.client()
    file = await client.files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    await first.deployment.stop()
    keys = tmp_path / "keys.yaml"
    digest = hashlib.sha256(KEYS[0].encode()).hexdigest()
    keys.write_text(f"version: 1\nkeys:\n  - {{name: batches, sha256: {digest}}}\n")

    second = await start(api_keys=(), api_keys_file=keys)
    await second.client().files.list()  # which begins
    runner = next(iter(second.app.state.on_start)).__self__  # type: ignore[attr-defined]
    found = await looked_at(lambda: runner.find("", batch.id), lambda one: one.status.is_final)

    assert found.status == "failed"
    assert [error.message for error in found.errors] == [
        "This batch was made without a key, and now keys are required."
    ]
    assert second.jobs == []


# -------------------------------------------------------------------------------------------------- errors


async def test_a_line_that_can_be_read_but_not_passed_on_fails_with_its_number(start: Start) -> None:
    client = (await start()).client()
    deep: Any = "text"
    for _ in range(300):
        deep = [deep]

    batch = await run(client, jsonl(line("a"), line("b", more=deep)))

    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_request", 2)]


async def test_a_fault_of_the_gateway_costs_the_line_that_meets_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = OpenAIDialect.embeddings

    async def embeddings(self: OpenAIDialect, request: Any) -> Any:
        response = await answer(self, request)
        if len(served.jobs[-1].texts) == 2:
            raise ZeroDivisionError("a fault")
        return response

    monkeypatch.setattr(OpenAIDialect, "embeddings", embeddings)
    served = await start()
    client = served.client()
    batch = await run(client, jsonl(line("b", input=["one", "two"])))
    assert batch.output_file_id is None

    [error] = await rows(client, batch.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("b", 500)
    assert "ZeroDivisionError" not in json.dumps(error)
    assert (await run(client, jsonl(line("a")))).request_counts.completed == 1


@pytest.mark.parametrize("is_over", [False, True], ids=["in time", "expired"])
async def test_lines_that_a_restart_no_longer_accepts_fail_and_the_others_are_answered(
    start: Start, is_over: bool, tmp_path: Path
) -> None:
    has_asked = asyncio.Event()

    def wait(_job: EmbedJob) -> None:
        has_asked.set()
        raise ModelNotReady("loading", retry_after_s=None)

    first = await start(wait)
    content = jsonl(line("a", input="x" * 3000), line("b"))
    file = await first.client().files.create(file=("requests.jsonl", content), purpose="batch")
    made = await first.client().batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    await asyncio.wait_for(has_asked.wait(), PATIENCE_S)  # so its state is on the disk
    await first.deployment.stop()
    if is_over:
        store = Store(tmp_path / "batches", 2**20)
        [batch] = store.open_batches()
        store.save(replace(batch, expires_at=1))
        store.close()

    client = (await start(max_body_bytes=1024)).client()
    await client.files.list()
    batch = await ended(client, made.id)

    errors = {row["custom_id"]: row for row in await rows(client, batch.error_file_id)}
    if is_over:
        assert batch.status == "expired"
        assert set(errors) == {"a", "b"}
    else:
        assert batch.status == "completed"
        assert [row["custom_id"] for row in await rows(client, batch.output_file_id)] == ["b"]
        error = errors["a"]["response"]["body"]["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "line_too_long", "body")
        assert "1024" in error["message"]
        assert batch.usage.total_tokens == 3  # of the line that was answered


async def test_files_can_be_deleted_while_they_are_listed(start: Start) -> None:
    client = (await start()).client()
    for _ in range(7):
        await client.files.create(file=("requests.jsonl", jsonl(line("a"))), purpose="batch")

    async for file in client.files.list(limit=3):
        await client.files.delete(file.id)

    assert [file async for file in client.files.list()] == []
    with pytest.raises(openai.BadRequestError, match="after"):
        await client.files.list(after="file-unknown")


async def test_an_upload_whose_client_is_gone_leaves_nothing(start: Start, tmp_path: Path) -> None:
    served = await start()
    client = served.client()
    await client.files.list()
    upload = asyncio.create_task(client.files.create(file=("requests.jsonl", b"x" * 1000), purpose="batch"))
    folder = tmp_path / "batches" / "files"
    async with asyncio.timeout(PATIENCE_S):
        while not any(folder.iterdir()):  # noqa: ASYNC110  the disk has no event
            await asyncio.sleep(0)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload

    assert [file async for file in client.files.list()] == []
    assert list(folder.iterdir()) == []


async def test_content_that_is_gone_from_the_disk_is_an_error_and_no_broken_answer(
    start: Start, tmp_path: Path
) -> None:
    client = (await start()).client()
    file = await client.files.create(file=("requests.jsonl", jsonl(line("a"))), purpose="batch")
    (tmp_path / "batches" / "files" / file.id).unlink()

    with pytest.raises(openai.InternalServerError, match="cannot be read"):
        await client.files.content(file.id)
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    batch = await ended(client, batch.id)
    assert batch.errors.data[0].code == "file_missing"
    assert str(tmp_path) not in batch.errors.data[0].message


async def test_no_more_batches_are_open_than_allowed_when_many_are_made_at_once(start: Start) -> None:
    def wait(_job: EmbedJob) -> None:
        raise ModelNotReady("loading", retry_after_s=None)

    client = (await start(wait, batch_max_open=3)).client()
    file = await client.files.create(file=("requests.jsonl", jsonl(line("a"))), purpose="batch")
    fields: Any = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h"}

    made = await asyncio.gather(*(client.batches.create(**fields) for _ in range(8)), return_exceptions=True)

    assert sum(isinstance(one, openai.RateLimitError) for one in made) == 5


async def test_a_cancelation_that_cannot_be_saved_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, 2**20)
    batch = Batch("batch_1", "a", "/v1/embeddings", "file-1", "file-2", "file-3", 0, 2**40, status=Status.IN_PROGRESS)
    store.add_batch(batch)
    runner = Runner(store, cast("Any", None))
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", Mock(side_effect=BatchesUnavailable("no")))
        with pytest.raises(BatchesUnavailable):
            await runner.cancel(batch)

    assert await runner.find("a", "batch_1") == batch
    assert (await runner.cancel(batch)).status is Status.CANCELLING
    await runner.stop()


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFull), (errno.EROFS, BatchesUnavailable), (errno.ENOENT, FileNotFoundError)],
)
def test_only_a_full_disk_is_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    store = Store(tmp_path, 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", Mock(side_effect=OSError(number, "the reason")))
        with pytest.raises(error, match="the reason"):
            store.write("file-1", 0, b"data")
    store.close()


def test_a_boundary_that_breaks_the_rules_of_its_header_is_refused() -> None:
    with pytest.raises(BadInput, match="boundary"):
        Multipart("multipart/form-data; boundary*0=B; boundary*=B")
