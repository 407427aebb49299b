"""OpenAI's Files API: uploads with the requests of batches, and files with their answers."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from gateway.api.endpoint import add
from gateway.api.json_body import Json, whole_number
from gateway.api.wire import AnswerBody, error_responses, responses
from gateway.batches.runner import Runner
from gateway.batches.store import Page, Store
from gateway.batches.values import KEPT_S, MAX_FILE_BYTES, BatchesUnavailable, Purpose, StoredFile
from gateway.config.wording import cut
from gateway.errors import BadInput, BodyTooLarge, NotFound, RateLimited, UnsupportedEncoding
from gateway.http.context import RequestContext
from gateway.http.multipart import Multipart, PartStart

LEAST_KEPT_S = 3600
"""The shortest time that a file may be kept, as in OpenAI's API."""

_PIECE_BYTES = 1024 * 1024
_MAX_FIELD_BYTES = 4096
_MAX_UPLOADS = 4
_MAX_NAME = 255
_MAX_FILES_LISTED = 10_000
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class FileCard(AnswerBody):
    """OpenAI's file object."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(AnswerBody):
    """Files, the latest first unless `order` is `asc`."""

    object: Literal["list"] = "list"
    data: list[FileCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(AnswerBody):
    """The file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Upload(AnswerBody):
    """The form of an upload."""

    file: str = Field(description="The content, at most 200 MB.", json_schema_extra={"format": "binary"})
    purpose: Literal["batch"]


def require_runner(runner: Runner | None) -> Runner:
    """Return the runner, and start it if it has not started.

    Raises:
        NotFound: the gateway has no folder for them.
    """
    if runner is None:
        raise NotFound("files and batches are turned off: set GATEWAY_BATCH_DIR to a folder on a local disk")
    runner.start()
    return runner


class FileRoutes:
    """The handlers.

    Args:
        has_keys: whether a client is known by its key; otherwise, all clients share their files.
    """

    def __init__(self, runner: Runner | None, *, has_keys: bool) -> None:
        self._runner = runner
        self._has_keys = has_keys
        self._uploading: Counter[str] = Counter()

    async def create_file(self, request: Request) -> FileCard:
        """Upload a file of requests: a line of JSON for each."""
        runner = require_runner(self._runner)
        owner = owner_of(request, has_keys=self._has_keys)
        with self._one_upload(RequestContext.of(request).caller):
            upload = _Upload(runner)
            try:
                form = Multipart(request.headers.get("content-type", ""))
                has_more = True
                while has_more:
                    message = await request.receive()
                    has_more = message.get("more_body", False)
                    for event in form.feed(message.get("body", b"")):
                        await upload.take(event)
                form.finish()
                file = await upload.finish(owner)
            except BaseException as error:  # also a client that hangs up must not leave its file behind
                with suppress(BatchesUnavailable):  # the next start removes what is left
                    await runner.call(runner.store.abandon, upload.file_id)
                if isinstance(error, OSError):
                    raise BatchesUnavailable(f"the file cannot be written: {error.strerror}") from error
                raise
        return card_of(file)

    async def list_files(self, request: Request) -> Response:
        """List the files of the key."""
        runner = require_runner(self._runner)
        page = read_page(request, _MAX_FILES_LISTED, _MAX_FILES_LISTED)
        owner = owner_of(request, has_keys=self._has_keys)
        purpose = request.query_params.get("purpose") or None
        content = await runner.call(_written_list, runner.store, owner, page, purpose)
        return Response(content, media_type="application/json")

    async def retrieve_file(self, request: Request, file_id: str) -> FileCard:
        """Describe a file."""
        return card_of(await self._find(request, file_id))

    async def delete_file(self, request: Request, file_id: str) -> FileDeleted:
        """Delete a file."""
        file = await self._find(request, file_id)
        runner = require_runner(self._runner)
        if (batch_id := runner.uses(file.id)) is not None:
            raise BadInput(
                f"the file is in use by {batch_id}: cancel that batch, or wait until it ends", param="file_id"
            )
        await runner.call(runner.store.remove_file, file.id)
        return FileDeleted(id=file.id)

    async def retrieve_content(self, request: Request, file_id: str) -> Response:
        """Return the content of a file."""
        file = await self._find(request, file_id)
        runner = require_runner(self._runner)
        headers = {"content-length": str(file.num_bytes)}
        try:
            content = await runner.call(runner.store.open, file.id)
        except OSError as error:
            raise BatchesUnavailable(f"the content of {file.id} cannot be read: {error.strerror}") from error
        pieces = _pieces(runner, content, file.num_bytes)
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    async def _find(self, request: Request, file_id: str) -> StoredFile:
        runner = require_runner(self._runner)
        file = await runner.call(runner.store.file, owner_of(request, has_keys=self._has_keys), file_id)
        if file is None:
            raise NotFound(f"No such File object: {cut(file_id)}", param="id")
        return file

    @contextmanager
    def _one_upload(self, caller: str) -> Iterator[None]:
        if self._uploading[caller] >= _MAX_UPLOADS:
            raise RateLimited(
                f"{caller} is already uploading {_MAX_UPLOADS} files, which is the limit", retry_after_s=5
            )
        self._uploading[caller] += 1
        try:
            yield
        finally:
            self._uploading[caller] -= 1
            if not self._uploading[caller]:
                del self._uploading[caller]


class _Upload:
    """A form while it arrives: its file is written to the disk, its fields are kept in memory."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.file_id = runner.store.new_id()
        self._filename: str | None = None
        self._fields: dict[str, bytearray] = {}
        self._field = bytearray()
        self._is_file = False
        self._held = bytearray()
        self._num_bytes = 0

    async def take(self, event: PartStart | bytes) -> None:
        if isinstance(event, PartStart):
            self._is_file = event.name == "file"
            if self._is_file and self._filename is not None:
                raise BadInput("the form has more than one `file`", param="file")
            if self._is_file:
                self._filename = event.filename or ""
            self._field = bytearray()
            self._fields[event.name] = self._field
        elif self._is_file:
            self._held += event
            if self._num_bytes + len(self._held) > MAX_FILE_BYTES:
                raise BodyTooLarge(f"the file has more than {MAX_FILE_BYTES} bytes, which is the limit: split it")
            if len(self._held) >= _PIECE_BYTES:
                await self._flush()
        else:
            self._field += event
            if len(self._field) > _MAX_FIELD_BYTES:
                raise BadInput(f"a field of the form has more than {_MAX_FIELD_BYTES} bytes")

    async def _flush(self) -> None:
        data = bytes(self._held)
        self._held.clear()
        self._num_bytes = await self._runner.call(self._runner.store.write, self.file_id, self._num_bytes, data)

    async def finish(self, owner: str) -> StoredFile:
        if self._filename is None:
            raise BadInput("the form has no `file`", param="file")
        purpose = self._text("purpose")
        if purpose is None or purpose.strip().lower() != Purpose.BATCH:
            raise BadInput(f"`purpose` must be `batch`, got {cut(repr(purpose))}", param="purpose")
        if not self._num_bytes + len(self._held):
            raise BadInput("the file is empty", param="file")
        kept_s = read_kept_s(self._text("expires_after[anchor]"), self._text("expires_after[seconds]"), "expires_after")
        if self._held:
            await self._flush()
        now = int(time.time())
        name = clean_name(self._filename)
        file = StoredFile(self.file_id, owner, name, Purpose.BATCH, self._num_bytes, now, now + kept_s)
        await self._runner.call(self._runner.store.sync, file.id)
        await self._runner.call(self._runner.store.add_file, file)
        return file

    def _text(self, name: str) -> str | None:
        return self._fields[name].decode("utf-8", "replace") if name in self._fields else None


async def _pieces(runner: Runner, content: BinaryIO, left: int) -> AsyncIterator[bytes]:
    """Yield the content of a file, and close it. If the file is deleted in the meantime, it is still sent."""
    with content:
        while left and (piece := await runner.call(content.read, min(left, _PIECE_BYTES))):
            left -= len(piece)
            yield piece


def _written_list(store: Store, owner: str, page: Page, purpose: str | None) -> str:
    """Return a page as JSON. Call it in a thread: a page of 10,000 files would block other requests."""
    files = store.files(owner, page, purpose)
    cards = [card_of(file) for file in files[: page.limit]]
    return FileList(
        data=cards,
        first_id=cards[0].id if cards else None,
        last_id=cards[-1].id if cards else None,
        has_more=len(files) > page.limit,
    ).model_dump_json()


def card_of(file: StoredFile) -> FileCard:
    return FileCard(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose.value,
    )


def owner_of(request: Request, *, has_keys: bool) -> str:
    """Return the owner of the files that a request creates: the key's client, or a common owner without keys."""
    return RequestContext.of(request).client.name if has_keys else ""


def clean_name(name: str) -> str:
    """Return the name of a file without folders and without characters that cannot be shown."""
    last = re.split(r"[/\\]", name)[-1]
    name = _UNPRINTABLE.sub("", last).strip()[:_MAX_NAME]
    return name if name.strip(".") else "upload.jsonl"


def read_kept_s(anchor: Json, seconds: Json, field: str) -> int:
    """Return the number of seconds that a file is kept.

    Raises:
        BadInput: the fields do not have the form of OpenAI's API.
    """
    if anchor in (None, "") and seconds in (None, ""):
        return KEPT_S
    if anchor != "created_at":
        raise BadInput(f"`{field}.anchor` must be `created_at`, got {cut(repr(anchor))}", param=field)
    number = whole_number(seconds)
    if not isinstance(number, int) or not LEAST_KEPT_S <= number <= KEPT_S:
        shown = cut(repr(seconds))
        raise BadInput(f"`{field}.seconds` must be between {LEAST_KEPT_S} and {KEPT_S}, got {shown}", param=field)
    return number


def read_page(request: Request, limit: int, max_limit: int) -> Page:
    """Read the parameters of a list.

    Args:
        limit: the number of items by default.

    Raises:
        BadInput: a parameter is not accepted.
    """
    parameters = request.query_params
    if sent := parameters.get("limit"):
        if not sent.isdecimal() or len(sent) > 9 or not 1 <= int(sent) <= max_limit:
            raise BadInput(f"`limit` must be a whole number from 1 to {max_limit}, got {cut(sent)}", param="limit")
        limit = int(sent)
    order = parameters.get("order") or "desc"
    if order not in ("asc", "desc"):
        raise BadInput(f"`order` must be `asc` or `desc`, got {cut(order)}", param="order")
    return Page(parameters.get("after") or None, limit, order == "asc")


def files_router(runner: Runner | None, *, has_keys: bool) -> APIRouter:
    """Return the routes of files, with and without ``/v1``."""
    router = APIRouter(tags=["Batches"])
    handlers = FileRoutes(runner, has_keys=has_keys)
    schema = {"schema": Upload.model_json_schema()}
    form: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": schema}}}
    created = responses(FileCard, BadInput, NotFound, BodyTooLarge, UnsupportedEncoding, RateLimited)
    add(router, "/files", handlers.create_file, created, method="POST", request=form)
    add(router, "/files", handlers.list_files, responses(FileList, BadInput, NotFound))
    add(router, "/files/{file_id}", handlers.retrieve_file, responses(FileCard, NotFound))
    add(router, "/files/{file_id}", handlers.delete_file, responses(FileDeleted, BadInput, NotFound), method="DELETE")
    add(router, "/files/{file_id}/content", handlers.retrieve_content, error_responses(NotFound))
    return router
