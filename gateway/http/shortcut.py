"""A shortcut from the middleware to the handlers of fixed paths."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.context import RequestContext

Routes: TypeAlias = dict[tuple[str, str], Route]
"""Routes with a handler to be called directly, by method and path."""

OnException: TypeAlias = Callable[[Request, Exception], Awaitable[Response]]


class Shortcut:
    """Calls the handlers of fixed paths directly. The framework's routing takes a fifth of a request's processor time.

    The framework searches each router for the route, prepares the cleanup of dependencies, and inspects the parameters
    of the handler. These handlers need none of that.

    Args:
        routes: the routes to call directly; they may grow until the first request.
        on_http_exception: answers the framework's exceptions, as the framework itself would.
    """

    def __init__(self, app: ASGIApp, routes: Routes, on_http_exception: OnException) -> None:
        self._app = app
        self._routes = routes
        self._on_http_exception = on_http_exception

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http":
            route = self._routes.get((scope["method"], RequestContext.in_scope(scope).path))
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        handle: Callable[[Request], Awaitable[Response]] = route.endpoint
        request = Request(scope, receive, send)
        try:
            response = await handle(request)
        except HTTPException as error:
            response = await self._on_http_exception(request, error)
        await response(scope, receive, send)


def include(app: FastAPI, routers: Sequence[Router]) -> None:
    """Serve the routes, and remember the documented paths and the methods of each path.

    Making the OpenAPI document takes a tenth of a second.
    """
    for router in routers:
        if isinstance(router, APIRouter):
            app.include_router(router)
        else:  # `include_router` would replace plain routes by copies, without the `route` in the scope that metrics need
            app.router.routes.extend(router.routes)
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    app.state.shown_paths = [route.path for route in routes if route.include_in_schema]
    app.state.methods = defaultdict[str, set[str]](set)
    for route in routes:
        app.state.methods[route.path] |= route.methods or set()
    app.state.direct_routes |= direct_routes(routes)


def direct_routes(routes: Iterable[Route]) -> Routes:
    """Return the routes whose handlers take only the request, unless an earlier route with parameters matches."""
    found: Routes = {}
    with_parameters: list[Route] = []
    for route in routes:
        if route.param_convertors:
            with_parameters.append(route)
        elif _takes_only_request(route) and not any(other.path_regex.match(route.path) for other in with_parameters):
            for method in route.methods or ():
                found.setdefault((method, route.path), route)
    return found


def _takes_only_request(route: Route) -> bool:
    signature = inspect.signature(route.endpoint)
    returns_answer = signature.return_annotation in ("Response", Response)
    return list(signature.parameters) == ["request"] and returns_answer and inspect.iscoroutinefunction(route.endpoint)
