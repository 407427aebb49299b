"""Pages and forms over HTTP: rendering, headers, static files, and the fields of a form."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlencode

from fastapi import Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gateway.console import words
from gateway.console.access import Gate, Right, Visitor, check_origin
from gateway.errors import BadInput, BodyTooLarge, RequestError
from gateway.http.context import RequestContext

HERE: Final = Path(__file__).parent
ROOT: Final = "/console"
"""The path of the console."""

THEMES: Final = ("auto", "light", "dark")
THEME_COOKIE: Final = "gateway_theme"
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    # With `no-referrer`, browsers would send `Origin: null` with the console's own forms.
    "referrer-policy": "same-origin",
}
_PAGE_HEADERS: Final = {**_HEADERS, "cache-control": "no-store"}
_STATIC_HEADERS: Final = {**_HEADERS, "cache-control": "public, max-age=31536000, immutable"}
_MEDIA_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_MAX_FORM_BYTES: Final = 1024 * 1024
_MAX_FIELDS: Final = 300
_SMALL_FORM_BYTES: Final = 64 * 1024  # a larger form may block the event loop for more than 10 ms
Handler = Callable[[Request], Awaitable[Response]]
"""A function that answers a request for a page."""


@dataclass(frozen=True, slots=True)
class StaticFile:
    content: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:12]


class Form:
    """The fields of a form, each with all of its values."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._fields = fields

    def first(self, name: str, default: str = "") -> str:
        """Return the first value of a field."""
        return next((value for key, value in self._fields if key == name), default)

    def all(self, name: str) -> list[str]:
        """Return every value of a field."""
        return [value for key, value in self._fields if key == name]


class Pages:
    """Renders pages, and admits only readers who may see them."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters.update(words.FILTERS)
        self._is_compiled = False
        self._files = {
            path.name: StaticFile(path.read_bytes(), _MEDIA_TYPES[path.suffix])
            for path in sorted((HERE / "static").iterdir())
        }

    def guard(self, handler: Handler, right: Right) -> Handler:
        """Return a handler that only readers with this right can reach, and that answers errors with pages."""

        async def guarded(request: Request) -> Response:
            context = RequestContext.of(request)
            if not self._is_compiled:
                # A quarter of a second of work, so it is not done at each start, and not on the event loop.
                await asyncio.to_thread(self._compile)
            try:
                if request.method == "POST":
                    check_origin(request)
                visitor = await self.gate.visitor(request)
                if visitor is not None:
                    request.state.visitor, context.client = visitor, visitor.client
                elif right is not Right.ANYONE:
                    return self.redirect(request, f"/sign-in?{urlencode({'next': context.path})}")
                if visitor is not None and right is Right.OPERATOR:
                    self.gate.require_operator(visitor)
                response = await handler(request)
            except RequestError as error:
                context.refuse(error)
                response = self.error(request, error)
            if context.error_code == BodyTooLarge.code:
                await context.body.drain()  # else the browser shows a broken connection instead of the page
            return response

        return guarded

    def _compile(self) -> None:
        """Compile all templates, which the environment keeps."""
        for name in self._environment.list_templates():
            self._environment.get_template(name)
        self._is_compiled = True

    def render(self, request: Request, template: str, status: int = 200, **values: object) -> Response:
        """Return a page."""
        context = RequestContext.of(request)
        root_path = request.scope.get("root_path", "")
        base = root_path + ROOT
        visitor: Visitor | None = getattr(request.state, "visitor", None)
        theme = request.cookies.get(THEME_COOKIE, "")
        text = self._environment.get_template(template).render(
            base=base,
            api=self.api(request),
            host=request.url.netloc,
            here=context.path,
            request_id=context.request_id,
            visitor=visitor,
            gate=self.gate,
            theme=theme if theme in THEMES else "auto",
            static=lambda name: f"{base}/static/{name}?v={self._files[name].digest}",
            **values,
        )
        # A text may hold half a surrogate pair, which cannot be encoded.
        content = text.encode("utf-8", "replace")
        return Response(content, status, _PAGE_HEADERS, media_type="text/html")

    def api(self, request: Request) -> str:
        """Return the base URL of the API, as the reader's browser reaches it."""
        url = request.url
        if self.gate.clients_port is not None:  # these pages are on the operator's port, but the API is not
            url = url.replace(port=self.gate.clients_port)
        return f"{url.scheme}://{url.netloc}{request.scope.get('root_path', '')}/v1"

    def error(self, request: Request, error: RequestError) -> Response:
        """Return the page of an error."""
        response = self.render(request, "error.html.j2", error.status, error=error)
        if error.retry_after_s is not None:
            response.headers["retry-after"] = str(error.retry_after_s)
        return response

    def redirect(self, request: Request, to: str) -> Response:
        """Send the browser to a page of the console, with GET."""
        location = f"{request.scope.get('root_path', '')}{ROOT}{to}"
        return Response(status_code=303, headers={**_PAGE_HEADERS, "location": location})

    def file(self, name: str) -> Response | None:
        """Return a static file; ``None`` if there is no such file."""
        file = self._files.get(name)
        return None if file is None else Response(file.content, 200, _STATIC_HEADERS, media_type=file.media_type)


async def read_form(request: Request) -> Form:
    """Read the fields of a form.

    Raises:
        BodyTooLarge: the form has more than a megabyte.
        BadInput: the form has too many fields, or another content type.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith("application/x-www-form-urlencoded"):
        raise BadInput("a form must be sent as application/x-www-form-urlencoded")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_FORM_BYTES:
            raise BodyTooLarge(f"the form has more than {_MAX_FORM_BYTES} bytes: use fewer or shorter texts")
    if len(body) <= _SMALL_FORM_BYTES:
        return _parse_form(body)
    return await asyncio.to_thread(_parse_form, body)


def _parse_form(body: bytearray) -> Form:
    try:
        return Form(parse_qsl(body.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=_MAX_FIELDS))
    except ValueError:
        raise BadInput(f"the form has more than {_MAX_FIELDS} fields") from None


def visitor_of(request: Request) -> Visitor:
    """Return the reader of a guarded page."""
    visitor: Visitor = request.state.visitor
    return visitor


def chosen(value: str, choices: Mapping[str, object] | Sequence[str], default: str) -> str:
    """Return a value of a link or form if it is one of the choices, else the default."""
    return value if value in choices else default
