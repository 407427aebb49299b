"""The shortcut to handlers of fixed paths: the routes that use it, and answers equal to the framework's."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message

from gateway.api.pieces import unless_disconnected
from gateway.errors import ClientDisconnected
from gateway.http.context import RequestContext
from gateway.http.shortcut import Shortcut, direct_routes


async def alone(request: Request) -> Response:
    if request.method == "DELETE":
        raise HTTPException(405)
    return PlainTextResponse(f"alone {request.scope['route'].path} {request.path_params}")


async def of_model(request: Request, model: str) -> Response:
    return PlainTextResponse(model)


async def data(request: Request) -> dict[str, str]:
    return {"no": "answer"}


def routes(*paths: tuple[str, Any]) -> dict[tuple[str, str], APIRoute]:
    router = APIRouter()
    for path, handler in paths:
        router.add_api_route(path, handler, methods=["POST", "DELETE"], response_model=None)
    return direct_routes(route for route in router.routes if isinstance(route, APIRoute))


def test_only_handlers_that_take_the_request_alone_are_called_directly_and_in_the_order_of_routes() -> None:
    found = routes(
        ("/a", alone), ("/{model:path}/b", of_model), ("/x/b", alone), ("/c", data), ("/d", of_model), ("/a", data)
    )

    assert set(found) == {("POST", "/a"), ("DELETE", "/a")}
    assert found["POST", "/a"].endpoint is alone


async def answer(method: str, path: str, context: RequestContext) -> tuple[int, bytes]:
    async def framework(_scope: Any, _receive: Any, send: Any) -> None:
        await PlainTextResponse("framework", 404)(_scope, _receive, send)

    async def on_exception(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse("refused", error.status_code)

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": f"/prefix{path}", "headers": []}
    context.path = path
    context.enter(scope)
    await Shortcut(framework, routes(("/a", alone)), on_exception)(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"]


@pytest.fixture
def context() -> RequestContext:
    return RequestContext("r", *[None] * 4)  # type: ignore[arg-type]


async def test_the_answer_is_the_handler_s_below_any_prefix_and_all_else_is_the_framework_s(
    context: RequestContext,
) -> None:
    assert await answer("POST", "/a", context) == (200, b"alone /a {}")
    assert await answer("DELETE", "/a", context) == (405, b"refused")
    assert await answer("GET", "/a", context) == (404, b"framework")
    assert await answer("POST", "/b", context) == (404, b"framework")


# ------------------------------------------------------------------------------------------- work for a client


class Leaving(Request):
    """A request whose client leaves once an event is set."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()

        async def receive() -> Message:
            await self.has_left.wait()
            return {"type": "http.disconnect"}

        super().__init__({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


async def test_work_is_canceled_when_its_client_leaves_and_the_task_continues() -> None:
    request = Leaving()
    canceled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            canceled.set()

    request.has_left.set()
    with pytest.raises(ClientDisconnected):
        await unless_disconnected(request, work())
    assert canceled.is_set()
    await asyncio.sleep(0)  # no cancellation is left over
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("error", [None, ValueError("it fails")])
async def test_a_client_that_leaves_as_the_work_is_done_gets_no_second_cancellation(error: Exception | None) -> None:
    request = Leaving()

    async def work() -> str:
        request.has_left.set()
        while True:  # until the watch is about to cancel this
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                break
        if error is not None:
            raise error
        return "done"

    with pytest.raises((ValueError, ClientDisconnected)) if error else contextlib.nullcontext():
        assert await unless_disconnected(request, work()) == "done"
    await asyncio.sleep(0)


async def test_the_cancellation_of_the_request_itself_is_not_a_disconnection() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    request = Leaving()
    task = asyncio.create_task(unless_disconnected(request, work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await unless_disconnected(request, asyncio.Event().wait())
