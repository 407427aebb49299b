"""A judge without a model: an HTTP server in this process that grades as it is programmed to."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_DATA = re.compile(
    r"\A<query (?P<code>[0-9a-f]{16})>\n(?P<query>.*)\n</query (?P=code)>\n"
    r"<document (?P=code)>\n(?P<document>.*)\n</document (?P=code)>\Z",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response; ``chunks`` are sent one after the other, without a length in front."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: Iterator[bytes] | None = None


Respond = Callable[[dict[str, Any], int], Reply]


@dataclass(slots=True)
class StandIn:
    """A running judge, and the requests that it received.

    Attributes:
        bodies: of all requests, in order.
        keys: the ``authorization`` of each.
    """

    respond: Respond
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """The query and the document of each request."""
        return [texts_of(body) for body in self.bodies]


def texts_of(body: dict[str, Any]) -> tuple[str, str]:
    """Return the query and the document of a request, exactly the text between its tags."""
    parts = _DATA.fullmatch(body["messages"][-1]["content"])
    assert parts is not None, body["messages"][-1]["content"]
    return parts["query"], parts["document"]


def completion(content: str | None, **message: Any) -> Reply:
    """Return a chat completion with this text."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 500, "completion_tokens": 20}
    return Reply(body=json.dumps({"model": "stand-in-1", "choices": [choice], "usage": usage}).encode())


def ended(reply: Reply, reason: object) -> Reply:
    """Return a chat completion with another reason for its end."""
    return Reply(
        body=reply.body.replace(b'"finish_reason": "stop"', b'"finish_reason": ' + json.dumps(reason).encode())
    )


def graded(grade: object) -> Reply:
    """Return the answer of a judge that keeps to the schema."""
    return completion(json.dumps({"reason": "so it is", "grade": grade}))


def refusal(status: int, message: str, **headers: str) -> Reply:
    """Return an error as OpenAI's API writes it."""
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing about clients that have disconnected."""


@contextlib.contextmanager
def serve_judge(respond: Respond) -> Iterator[StandIn]:
    """Serve a judge on a free port of this machine.

    Args:
        respond: gets the body and the number of requests before it.
    """
    judge = StandIn(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are sent one after the other

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            number = len(judge.bodies)
            judge.bodies.append(body)
            judge.keys.append(self.headers["authorization"])
            reply = judge.respond(body, number)
            with contextlib.suppress(OSError):  # the client has read enough, or has disconnected
                self._send(reply)

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name.replace("_", "-"), value)
            if reply.chunks is None:
                self.send_header("content-length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                return
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            for chunk in reply.chunks:
                self.wfile.write(chunk)

        def log_message(self, *_arguments: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        judge.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield judge
        finally:  # also after a failed test, or its thread would keep the process alive
            server.shutdown()
            thread.join()
