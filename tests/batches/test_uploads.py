"""Uploads that are too large, cut off, compressed, misnamed or not forms at all: each costs its own request only."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message, Scope

from gateway.api import files as files_module
from tests.batches.test_batch_api import KEYS, Served, Start, jsonl, line, start  # noqa: F401  a fixture

HEADERS = {"authorization": f"Bearer {KEYS[0]}"}


def contents(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "batches" / "files").iterdir())


async def upload(served: Served, content: bytes, name: str = "a.jsonl", **fields: str) -> httpx.Response:
    data = {"purpose": "batch", **fields}
    return await served.http.post("/files", files={"file": (name, content)}, data=data, headers=HEADERS)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("requests.jsonl", "requests.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\x.jsonl", "x.jsonl"),
        ("/", "upload.jsonl"),
        ("", "upload.jsonl"),
        ("日本 😀.jsonl", "日本 😀.jsonl"),
        ("x" * 1000, "x" * 255),
    ],
)
async def test_a_name_is_a_name_and_no_path(start: Start, tmp_path: Path, sent: str, kept: str) -> None:  # noqa: F811
    served = await start()
    boundary = b"----form"
    head = f'Content-Disposition: form-data; name="file"; filename="{sent}"'.replace("\\", "\\\\")
    body = b'--%b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n' % boundary
    body += b"--%b\r\n%b\r\n\r\n{}\r\n--%b--\r\n" % (boundary, head.encode(), boundary)
    headers = {**HEADERS, "content-type": f"multipart/form-data; boundary={boundary.decode()}"}

    response = await served.http.post("/files", content=body, headers=headers)

    assert response.status_code == 200, response.text
    assert response.json()["filename"] == kept
    [path] = contents(tmp_path)
    assert path.name == response.json()["id"]


async def test_a_file_is_returned_unchanged(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(files_module, "_PIECE_BYTES", 1000)
    client = (await start()).client()
    content = bytes(range(256)) * 100

    file = await client.files.create(file=("a.jsonl", content), purpose="batch")

    assert (file.bytes, file.purpose, file.status, file.object) == (25_600, "batch", "processed", "file")
    assert file.expires_at == file.created_at + 30 * 24 * 3600
    assert (await client.files.content(file.id)).content == content


@pytest.mark.parametrize("seconds", [3600, 2_592_000])
async def test_a_file_can_expire_earlier(start: Start, seconds: int) -> None:  # noqa: F811
    client = (await start()).client()
    expires: Any = {"anchor": "created_at", "seconds": seconds}

    file = await client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after=expires)

    assert file.expires_at == file.created_at + seconds


@pytest.mark.parametrize(
    "fields",
    [
        {"purpose": " Batch\r\n"},
        {"expires_after[anchor]": "", "expires_after[seconds]": ""},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": " 2592000.0 "},
    ],
    ids=str,
)
async def test_fields_of_a_form_are_read_laxly(start: Start, fields: dict[str, str]) -> None:  # noqa: F811
    response = await upload(await start(), b"{}", **fields)

    assert response.status_code == 200, response.text
    assert response.json()["expires_at"] - response.json()["created_at"] == 2_592_000


async def test_a_file_may_be_as_large_as_the_limit_and_no_larger(
    start: Start,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 3_000_000)
    served = await start(memory_budget_bytes=64 * 1024 * 1024)

    assert (await upload(served, b"x" * 3_000_000)).status_code == 200
    refused = await upload(served, b"x" * 3_000_001)

    assert refused.status_code == 413
    assert refused.json()["error"]["message"] == "the file has more than 3000000 bytes, which is the limit: split it"
    assert len(contents(tmp_path)) == 1


async def test_200_mb_and_more_are_refused_before_they_come(start: Start) -> None:  # noqa: F811
    served = await start()
    headers = {**HEADERS, "content-type": "multipart/form-data; boundary=x", "content-length": str(201 * 1024 * 1024)}

    response = await served.http.post("/files", content=b"--x", headers=headers)

    assert response.status_code == 413
    assert "upload several files" in response.json()["message"]


async def test_other_bodies_keep_their_limit(start: Start) -> None:  # noqa: F811
    served = await start(max_body_bytes=1000)

    assert (await upload(served, b"x" * 100_000)).status_code == 200
    response = await served.http.post("/batches", content=b"x" * 2000, headers=HEADERS)
    assert response.status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
async def test_a_compressed_upload_is_refused(start: Start, tmp_path: Path, encoding: str) -> None:  # noqa: F811
    served = await start()
    bomb = gzip.compress(b"\0" * 50_000_000)
    headers = {**HEADERS, "content-encoding": encoding, "content-type": "multipart/form-data; boundary=x"}

    response = await served.http.post("/files", content=bomb, headers=headers)

    assert response.status_code == 415
    assert "must be uploaded uncompressed" in response.json()["message"]
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": "x" * 5000}, None),
        ({"expires_after[anchor]": "created_at"}, "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after"),
    ],
)
async def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(
    start: Start,  # noqa: F811
    tmp_path: Path,
    fields: dict[str, str],
    param: str | None,
) -> None:
    response = await upload(await start(), b"x" * 2_000_000, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (json.dumps({"file": "x"}).encode(), "application/json"),
        (b"", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--',
            "multipart/form-data; boundary=x",
        ),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ncut o', "multipart/form-data; boundary=x"),
    ],
    ids=["json", "empty", "no file", "cut off"],
)
async def test_an_invalid_upload_is_refused(
    start: Start,  # noqa: F811
    tmp_path: Path,
    body: bytes,
    content_type: str,
) -> None:
    served = await start()

    response = await served.http.post("/files", content=body, headers={**HEADERS, "content-type": content_type})

    assert response.status_code == 400
    assert contents(tmp_path) == []


async def test_an_empty_file_is_refused(start: Start) -> None:  # noqa: F811
    with pytest.raises(openai.BadRequestError, match="the file is empty"):
        await (await start()).client().files.create(file=("a.jsonl", b""), purpose="batch")


async def test_a_client_that_goes_away_leaves_nothing(start: Start, tmp_path: Path) -> None:  # noqa: F811
    served = await start()
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    messages: list[Message] = [
        {"type": "http.request", "body": head + b"x" * 3_000_000, "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": [
            (b"host", b"gateway"),
            (b"authorization", f"Bearer {KEYS[0]}".encode()),
            (b"content-type", b"multipart/form-data; boundary=x"),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await served.app(scope, receive, send)

    assert contents(tmp_path) == []


async def test_a_folder_without_room_is_a_507_that_is_not_tried_again(start: Start, tmp_path: Path) -> None:  # noqa: F811
    served = await start(batch_max_bytes=2_000_000)

    response = await upload(served, b"x" * 3_000_000)

    assert response.status_code == 507
    assert response.json()["error"]["code"] == "storage_full"
    assert response.headers["x-should-retry"] == "false"
    assert contents(tmp_path) == []
    assert (await upload(served, jsonl(line("a")))).status_code == 200


async def test_a_key_is_required(start: Start) -> None:  # noqa: F811
    served = await start()

    for method, path in [("GET", "/files"), ("POST", "/files"), ("GET", "/batches"), ("POST", "/batches")]:
        assert (await served.http.request(method, path)).status_code == 401


@pytest.mark.parametrize("gone", ["batches", "batches/files"])
async def test_a_folder_that_was_removed_is_a_503(start: Start, tmp_path: Path, gone: str) -> None:  # noqa: F811
    served = await start()
    client = served.client()
    file = await client.files.create(file=("a.jsonl", jsonl(line("a"))), purpose="batch")
    shutil.rmtree(tmp_path / gone)

    response = await upload(served, jsonl(line("a")))

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "batches_unavailable"
    with pytest.raises(openai.InternalServerError, match="cannot be read"):
        await client.files.content(file.id)
    if gone == "batches":
        with pytest.raises(openai.InternalServerError, match="removed or replaced"):
            await client.files.delete(file.id)
    else:
        assert (await client.files.delete(file.id)).deleted
