"""OpenAI's Batches: the requests of a file, answered within a day while nothing else waits."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.api.batch_lines import ENDPOINTS, LineRequests
from gateway.api.endpoint import Endpoint, add, headers_of_texts
from gateway.api.files import owner_of, read_kept_s, read_page, require_runner
from gateway.api.json_body import Json, describe
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.batches.runner import Runner
from gateway.batches.store import Page, Store
from gateway.batches.values import WINDOW_S, Batch, Purpose, Status
from gateway.config.wording import cut
from gateway.errors import BadInput, NotFound, RateLimited
from gateway.http.context import RequestContext

_MAX_BODY_BYTES = 64 * 1024
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


class BatchProblem(AnswerBody):
    """A reason why a batch failed."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchProblems(AnswerBody):
    """OpenAI's list of a batch's problems."""

    object: Literal["list"] = "list"
    data: list[BatchProblem]


class RequestCounts(AnswerBody):
    """The number of requests by result."""

    total: int
    completed: int
    failed: int


class BatchUsage(AnswerBody):
    """Tokens of the requests that were answered."""

    input_tokens: int
    input_tokens_details: dict[str, int] = Field(default_factory=lambda: {"cached_tokens": 0})
    output_tokens: int = 0
    output_tokens_details: dict[str, int] = Field(default_factory=lambda: {"reasoning_tokens": 0})
    total_tokens: int


class BatchCard(AnswerBody):
    """OpenAI's batch object."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchProblems | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(AnswerBody):
    """Batches, the latest first."""

    object: Literal["list"] = "list"
    data: list[BatchCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchBody(AnswerBody):
    """A new batch."""

    input_file_id: str = Field(description="A file with the purpose `batch`, of at most 50,000 lines.")
    endpoint: Literal["/v1/embeddings", "/v1/rerank"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, description="Your own keys and values, at most 16 pairs.")
    output_expires_after: dict[str, Any] | None = None


class BatchRoutes:
    """The handlers.

    Args:
        has_keys: clients have API keys; otherwise, all clients share their batches.
    """

    def __init__(self, endpoint: Endpoint, runner: Runner | None, *, has_keys: bool) -> None:
        self._endpoint = endpoint
        self._runner = runner
        self._has_keys = has_keys

    async def create_batch(self, request: Request) -> BatchCard:
        """Begin a batch. Its file is checked first: see `status` and `errors`."""
        runner = require_runner(self._runner)
        RequestContext.of(request).body.limit(_MAX_BODY_BYTES)
        content = await self._endpoint.read(request, lambda content: content)
        owner = owner_of(request, has_keys=self._has_keys)
        batch = replace(_read(content, owner, runner), headers=headers_of_texts(request))
        file = await runner.call(runner.store.file, owner, batch.input_id)
        if file is None:
            raise NotFound(f"No such File object: {cut(batch.input_id)}", param="input_file_id")
        if file.purpose is not Purpose.BATCH:
            raise BadInput(f"the purpose of {file.id} is `{file.purpose}`, not `batch`", param="input_file_id")
        limit = self._endpoint.settings.batch_max_open
        if runner.num_open(owner) >= limit:
            raise RateLimited(
                f"this key has {limit} batches that have not ended, which is the limit: wait until one ends",
                retry_after_s=60,
            )
        await runner.add(batch)
        return card_of(batch)

    async def list_batches(self, request: Request) -> Response:
        """List the batches of the key."""
        runner = require_runner(self._runner)
        page = read_page(request, 20, 100)
        owner = owner_of(request, has_keys=self._has_keys)
        return Response(await runner.call(_written_list, runner.store, owner, page), media_type="application/json")

    async def retrieve_batch(self, request: Request, batch_id: str) -> BatchCard:
        """Describe a batch."""
        return card_of(await self._find(request, batch_id))

    async def cancel_batch(self, request: Request, batch_id: str) -> BatchCard:
        """Cancel a batch. Its output has the answers so far."""
        batch = await self._find(request, batch_id)
        if batch.status.is_final or batch.status is Status.FINALIZING:
            raise BadInput(f"Cannot cancel a batch with status '{batch.status}'.", param="batch_id")
        return card_of(await require_runner(self._runner).cancel(batch))

    async def _find(self, request: Request, batch_id: str) -> Batch:
        batch = await require_runner(self._runner).find(owner_of(request, has_keys=self._has_keys), batch_id)
        if batch is None:
            raise NotFound(f"No batch found with id '{cut(batch_id)}'.", param="batch_id")
        return batch


def _read(content: dict[str, Json], owner: str, runner: Runner) -> Batch:
    """Return the new batch that a body describes."""
    input_id = content.get("input_file_id")
    if not isinstance(input_id, str) or not input_id:
        raise BadInput(f"`input_file_id` must be the id of a file, got {describe(input_id)}", param="input_file_id")
    endpoint = content.get("endpoint")
    if endpoint not in ENDPOINTS:
        known = " and ".join(f"'{path}'" for path in ENDPOINTS)
        shown = cut(repr(endpoint))
        raise BadInput(f"Invalid value: {shown}. Supported values are: {known}.", param="endpoint")
    window = content.get("completion_window")
    if window != "24h":
        raise BadInput(f"Invalid value: {cut(repr(window))}. Value must be '24h'.", param="completion_window")
    kept = content.get("output_expires_after")
    kept = {} if kept is None or kept == "" else kept
    if not isinstance(kept, dict):
        raise BadInput(f"`output_expires_after` must be an object, got {describe(kept)}", param="output_expires_after")
    now = int(time.time())
    return Batch(
        id=f"batch_{secrets.token_hex(12)}",
        owner=owner,
        endpoint=str(endpoint),
        input_id=input_id,
        output_id=runner.store.new_id(),
        error_id=runner.store.new_id(),
        created_at=now,
        expires_at=now + WINDOW_S,
        metadata=_metadata(content.get("metadata")),
        output_kept_s=read_kept_s(kept.get("anchor"), kept.get("seconds"), "output_expires_after"),
    )


def _metadata(value: Json) -> dict[str, str] | None:
    if value is None or value == "":
        return None
    if not isinstance(value, dict):
        raise BadInput(f"`metadata` must be an object, got {describe(value)}", param="metadata")
    if len(value) > _MAX_METADATA:
        raise BadInput(f"`metadata` has {len(value)} pairs; the limit is {_MAX_METADATA}", param="metadata")
    metadata: dict[str, str] = {}
    for key, text in value.items():
        if len(key) > _MAX_KEY:
            raise BadInput(
                f"a key of `metadata` has {len(key)} characters; the limit is {_MAX_KEY}: {cut(repr(key))}",
                param="metadata",
            )
        if not isinstance(text, str) or len(text) > _MAX_VALUE:
            raise BadInput(
                f"the value of {key!r} in `metadata` must be a string of at most {_MAX_VALUE} characters, got "
                f"{describe(text)}",
                param="metadata",
            )
        metadata[key] = text
    return metadata


def _written_list(store: Store, owner: str, page: Page) -> str:
    """Return a page as JSON, in a thread: with many errors and metadata, it can have 4 MB."""
    batches = store.batches(owner, page)
    cards = [card_of(batch) for batch in batches[: page.limit]]
    return BatchList(
        data=cards,
        first_id=cards[0].id if cards else None,
        last_id=cards[-1].id if cards else None,
        has_more=len(batches) > page.limit,
    ).model_dump_json()


def card_of(batch: Batch) -> BatchCard:
    has_ended = batch.status.is_final
    problems = [BatchProblem(code=e.code, message=e.message, line=e.line, param=e.param) for e in batch.errors]
    return BatchCard(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchProblems(data=problems) if problems else None,
        input_file_id=batch.input_id,
        status=batch.status,
        output_file_id=batch.output_id if has_ended and batch.output_bytes else None,
        error_file_id=batch.error_id if has_ended and batch.error_bytes else None,
        created_at=batch.created_at,
        expires_at=batch.expires_at,
        request_counts=RequestCounts(total=batch.num_total, completed=batch.num_completed, failed=batch.num_failed),
        usage=BatchUsage(input_tokens=batch.num_tokens, total_tokens=batch.num_tokens),
        metadata=None if batch.metadata is None else dict(batch.metadata),
        in_progress_at=batch.times.get(Status.IN_PROGRESS),
        finalizing_at=batch.times.get(Status.FINALIZING),
        completed_at=batch.times.get(Status.COMPLETED),
        failed_at=batch.times.get(Status.FAILED),
        expired_at=batch.times.get(Status.EXPIRED),
        cancelling_at=batch.times.get(Status.CANCELLING),
        cancelled_at=batch.times.get(Status.CANCELLED),
    )


def make_runner(endpoint: Endpoint, keyring: Keyring, memory: MemoryBudget) -> Runner | None:
    """Return the runner of all batches, which begins with the server; ``None`` without a folder for them.

    Raises:
        StartError: the folder cannot be used.
    """
    settings = endpoint.settings
    if settings.batch_dir is None:
        return None
    store = Store(settings.batch_dir, settings.batch_max_bytes)
    runner = Runner(store, LineRequests(endpoint, keyring, memory))
    endpoint.deployment.resources.push_async_callback(runner.stop)
    endpoint.on_start.append(runner.start)
    return runner


def batches_router(endpoint: Endpoint, runner: Runner | None, *, has_keys: bool) -> APIRouter:
    """Return the routes of batches, with and without ``/v1``."""
    router = APIRouter(tags=["Batches"])
    handlers = BatchRoutes(endpoint, runner, has_keys=has_keys)
    answers = responses(BatchCard, BadInput, NotFound)
    created = responses(BatchCard, BadInput, NotFound, RateLimited)
    add(router, "/batches", handlers.create_batch, created, method="POST", request=request_body(BatchBody))
    add(router, "/batches", handlers.list_batches, responses(BatchList, BadInput, NotFound))
    add(router, "/batches/{batch_id}", handlers.retrieve_batch, answers)
    add(router, "/batches/{batch_id}/cancel", handlers.cancel_batch, answers, method="POST")
    return router
