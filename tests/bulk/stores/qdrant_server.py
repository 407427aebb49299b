"""A server with Qdrant's REST interface in front of Qdrant's own engine in Python, and with faults on demand.

No package brings Qdrant's server. The client's requests are real, and so are the contents of the answers.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel
from qdrant_client import QdrantClient, models

Fault = str
"""``close``: no response; ``late``: the request is done, and then no response; otherwise a status: ``503``."""


class QdrantServer:
    """Listens on a free port of 127.0.0.1 until it is closed.

    Attributes:
        faults: of the next requests, in order.
        key: that requests must have; ``None`` for none.
        has_metadata: false for a server before 1.16, which ignores metadata.
        indexes: of payload fields, by collection and field; the engine has none.
        paths: of all requests, with their methods.
        sizes: of the bodies of all requests.
    """

    def __init__(self) -> None:
        self.engine = QdrantClient(":memory:")
        self.faults: deque[Fault] = deque()
        self.key: str | None = None
        self.has_metadata = True
        self.indexes: dict[str, dict[str, models.PayloadIndexInfo]] = {}
        self.max_bytes = 32 * 2**20
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self.engine.close()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, object]:
        """Return the status and the result of a request."""
        for pattern, act in _ROUTES.items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                try:
                    with self._lock:
                        return 200, act(self, *found.groups(), body)
                except ValueError as error:
                    return (404 if "not found" in str(error) else 400), str(error)
        return 404, f"no route {method} {path}"


def _create(server: QdrantServer, name: str, body: dict[str, Any]) -> bool:
    config = models.CreateCollection.model_validate(body)
    return server.engine.create_collection(
        name,
        vectors_config=config.vectors,
        sparse_vectors_config=config.sparse_vectors,
        metadata=config.metadata if server.has_metadata else None,
    )


def _update(server: QdrantServer, name: str, body: dict[str, Any]) -> bool:
    return server.engine.update_collection(name, metadata=body.get("metadata") if server.has_metadata else None)


def _describe(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    return server.engine.get_collection(name).model_copy(update={"payload_schema": server.indexes.get(name, {})})


def _index(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    schema = body["field_schema"]
    kind, params = (schema, None) if isinstance(schema, str) else (schema["type"], schema)
    info = models.PayloadIndexInfo.model_validate({"data_type": kind, "params": params, "points": 0})
    server.indexes.setdefault(name, {})[body["field_name"]] = info
    return {"operation_id": 0, "status": "completed"}


def _upsert(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    return server.engine.upsert(name, models.PointsList.model_validate(body).points)


def _update_vectors(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    return server.engine.update_vectors(name, models.UpdateVectors.model_validate(body).points)


def _scroll(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    asked = models.ScrollRequest.model_validate(body)
    points, following = server.engine.scroll(
        name, asked.filter, asked.limit or 10, offset=asked.offset, with_payload=asked.with_payload or False,
        with_vectors=asked.with_vector or False,
    )  # fmt: skip
    return {"points": [point.model_dump() for point in points], "next_page_offset": following}


def _retrieve(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    asked = models.PointRequest.model_validate(body)
    return server.engine.retrieve(name, asked.ids, asked.with_payload or False, asked.with_vector or False)


def _query(server: QdrantServer, name: str, body: dict[str, Any]) -> object:
    asked = models.QueryRequest.model_validate(body)
    return server.engine.query_points(
        name, query=asked.query, using=asked.using, limit=asked.limit or 10, with_payload=asked.with_payload or False
    )


_ROUTES: dict[str, Callable[..., object]] = {
    r"GET /collections": lambda server, body: server.engine.get_collections(),
    r"GET /aliases": lambda server, body: server.engine.get_aliases(),
    r"POST /collections/aliases": lambda server, body: server.engine.update_collection_aliases(
        models.ChangeAliasesOperation.model_validate(body).actions
    ),
    r"GET /collections/([^/]+)/exists": lambda server, name, body: {"exists": server.engine.collection_exists(name)},
    r"GET /collections/([^/]+)": _describe,
    r"PUT /collections/([^/]+)/index": _index,
    r"PUT /collections/([^/]+)": _create,
    r"PATCH /collections/([^/]+)": _update,
    r"DELETE /collections/([^/]+)": lambda server, name, body: server.engine.delete_collection(name),
    r"PUT /collections/([^/]+)/points": _upsert,
    r"PUT /collections/([^/]+)/points/vectors": _update_vectors,
    r"POST /collections/([^/]+)/points": _retrieve,
    r"POST /collections/([^/]+)/points/scroll": _scroll,
    r"POST /collections/([^/]+)/points/query": _query,
    r"POST /collections/([^/]+)/points/count": lambda server, name, body: server.engine.count(
        name, models.CountRequest.model_validate(body).filter
    ),
    r"POST /collections/([^/]+)/points/delete": lambda server, name, body: server.engine.delete(name, body["points"]),
}


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return json.loads(value.model_dump_json())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _handler(server: QdrantServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            path = self.path.partition("?")[0]
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.paths.append(f"{self.command} {self.path}")
            server.sizes.append(len(content))
            fault = server.faults.popleft() if server.faults else ""
            if fault == "close":
                self.close_connection = True
                return
            if server.key is not None and self.headers.get("api-key") != server.key:
                self._send(401, "Invalid API key or JWT", {})
                return
            if len(content) > server.max_bytes:
                self._send(413, "Payload error: JSON payload is larger than allowed", {})
                return
            if fault.isdigit():
                self._send(int(fault), "Service internal error", {"Retry-After": "0"} if fault == "429" else {})
                return
            status, result = server.answer(self.command, path, json.loads(content) if content else {})
            if fault == "late":
                self.close_connection = True
                return
            self._send(status, _plain(result), {})

        def _send(self, status: int, result: object, headers: dict[str, str]) -> None:
            ok = status == 200
            answer = {"status": "ok" if ok else {"error": result}, "time": 0.0, "result": result if ok else None}
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
