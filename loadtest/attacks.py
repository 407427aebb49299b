"""Attacks by a client that wants more than its share of a gateway. Run by ``loadtest.abuse``, on loopback only.

``python -m loadtest.attacks NAME PORT KEY SECONDS`` is one attacker: it prints ``begun``, and at the end how many answers of
which status it got.
"""

from __future__ import annotations

import gzip
import http.client
import itertools
import json
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import zstandard

HOST: Final = "127.0.0.1"
MODEL: Final = "all-minilm-l6-v2"
RERANKER: Final = "reranker"
MIB: Final = 1 << 20
_READ_BYTES: Final = 1 << 16


@dataclass(slots=True)
class Attacker:
    """One client that means ill.

    Attributes:
        seconds: how long it lasts after its first connection; it prepares its requests before that.
        statuses: the statuses of its responses.
    """

    port: int
    key: str
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    _until: float | None = None

    @property
    def is_over(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        """Return a connection, with a small window where ``receive_bytes`` says so."""
        if self._until is None:
            self._until = time.monotonic() + self.seconds
            print("begun", flush=True)
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(60)
        connection.connect((HOST, self.port))
        return connection

    def head(self, path: str, num_bytes: int, **headers: str) -> bytes:
        """Return the head of a request."""
        lines = [f"POST {path} HTTP/1.1", "host: gateway", f"content-length: {num_bytes}"]
        lines += [f"authorization: Bearer {self.key}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def ask(self, path: str, body: bytes, **headers: str) -> None:
        """Send a request, and read its answer to the end."""
        try:
            with self.connect() as connection:
                connection.sendall(self.head(path, len(body), connection="close", **headers))
                connection.sendall(body)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                while answer.read(_READ_BYTES):
                    pass
                self.statuses[str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            self.statuses[type(error).__name__] += 1
            time.sleep(0.05)

    def ask_again_and_again(self, requests: Iterator[tuple[str, bytes]], **headers: str) -> None:
        """Send one request after the other."""
        while not self.is_over:
            path, body = next(requests)
            self.ask(path, body, **headers)


Attack = Callable[[Attacker], None]


def _in_parallel(attacker: Attacker, num: int, requests: Sequence[tuple[str, bytes]], **headers: str) -> None:
    """Send requests in turns, over ``num`` connections at once."""
    threads = [
        threading.Thread(
            target=attacker.ask_again_and_again,
            args=(itertools.cycle([*requests[i % len(requests) :], *requests[: i % len(requests)]]),),
            kwargs=headers,
        )
        for i in range(num)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _unread(attacker: Attacker, num: int, path: str, bodies: Iterator[bytes]) -> None:
    """Ask for answers and do not read them."""
    with ExitStack() as stack:
        for body in itertools.islice(bodies, num):
            with suppress(OSError):
                connection = stack.enter_context(attacker.connect(4096))
                connection.sendall(attacker.head(path, len(body)) + body)
        while not attacker.is_over:
            time.sleep(0.05)


def _slow_bodies(attacker: Attacker) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(attacker.connect()) for _ in range(200)]
        for connection in connections:
            connection.sendall(attacker.head("/v1/embeddings", 1_000_000) + b"{")
        while not attacker.is_over:
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(b" ")
            time.sleep(0.1)


def _pipelined(attacker: Attacker) -> None:
    """Send requests without a pause, and read none of their answers."""
    body = json.dumps({"model": MODEL, "input": "pipelined"}).encode()
    request = (attacker.head("/v1/embeddings", len(body)) + body) * 200
    with ExitStack() as stack:
        connections = [stack.enter_context(attacker.connect(4096)) for _ in range(8)]
        for connection in connections:
            connection.setblocking(False)
        while not attacker.is_over:
            for connection in connections:
                with suppress(OSError):
                    connection.send(request)
            time.sleep(0.01)


def _many_connections(attacker: Attacker) -> None:
    with ExitStack() as stack:
        for _ in range(3_000):
            if attacker.is_over:
                return
            try:
                connection = stack.enter_context(attacker.connect())
                connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\n")
            except OSError as error:
                attacker.statuses[type(error).__name__] += 1
        while not attacker.is_over:
            time.sleep(0.05)


def _states(attacker: Attacker) -> None:
    bodies = (json.dumps({"inputs": [f"w{i} " * 126] * 128}).encode() for i in itertools.count())
    _unread(attacker, 60, f"/tei/{MODEL}/embed_all", bodies)


def _dense(attacker: Attacker) -> None:
    bodies = (
        json.dumps({"model": MODEL, "input": [f"{i} {k}" for k in range(2048)]}).encode() for i in itertools.count()
    )
    _unread(attacker, 60, "/v1/embeddings", bodies)


def _embeddings(content: bytes) -> tuple[str, bytes]:
    return "/v1/embeddings", b'{"model":"%s","input":%s}' % (MODEL.encode(), content)


def _large_bodies(attacker: Attacker) -> None:
    _in_parallel(attacker, 40, [_embeddings(b'"' + b"a" * 16_000_000 + b'"')])


def _numbers(attacker: Attacker) -> None:
    _in_parallel(attacker, 4, [_embeddings(b"[" + b"1," * 8_300_000 + b"1]")])


def _structures(attacker: Attacker) -> None:
    size = 16_000_000
    keys = b",".join(b'"%d":1' % i for i in range(1_400_000))
    bombs = [
        _embeddings(b"[" + b"[]," * (size // 3) + b"1]"),
        _embeddings(b"[" * size),
        _embeddings(b"{" + keys + b"}"),
        _embeddings(b"[" + b'"",' * (size // 3) + b"1]"),
        _embeddings(b'"' + rb"\ud83d" * (size // 6) + b'"'),
        _embeddings(b'"' + rb"\u0000" * (size // 6) + b'"'),
        _embeddings(b'"' + rb"\\" * (size // 2) + b'"'),
        _embeddings(b"1" * size),
        _embeddings(b'"a","outputs":[' + b"1," * (size // 2) + b"1]"),
        ("/embed_all", b'{"inputs":[' + b"[1]," * (size // 4) + b"1]}"),
        ("/tokenize", b'{"inputs":[' + b'"",' * (size // 3) + b'""]}'),
    ]
    _in_parallel(attacker, 4, bombs)


def _token_ids(attacker: Attacker) -> None:
    _in_parallel(attacker, 4, [_embeddings(b"[" + b",".join([b"[" + b"100255," * 30_000 + b"0]"] * 16) + b"]")])


def _compressed(attacker: Attacker) -> None:
    bomb = bytes(500 * MIB)
    coders: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "zstd": zstandard.compress,
    }
    path, body = _embeddings(b'"' + b"a" * 16_000_000 + b'"')
    threads = [
        threading.Thread(
            target=_in_parallel, args=(attacker, 3, [(path, coder(bomb)), (path, coder(body))]), kwargs=headers
        )
        for name, coder in coders.items()
        if (headers := {"content_encoding": name})
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _late_chunks(attacker: Attacker) -> None:
    dots, words = json.dumps([". " * 7_500_000]).encode(), json.dumps(["word " * 3_000_000]).encode()
    end = b',"late_chunking":true}'
    _in_parallel(attacker, 4, [(path, body[:-1] + end) for path, body in map(_embeddings, (dots, words))])


def _one_letter(attacker: Attacker) -> None:
    letters = ("a", " ", "\n", "\u0301", "\U0001f600")
    texts = [json.dumps(letter * (8_000_000 // len(letter.encode())), ensure_ascii=False) for letter in letters]
    _in_parallel(attacker, 5, [_embeddings(text.encode()) for text in texts])


def _long_texts(attacker: Attacker) -> None:
    _in_parallel(attacker, 20, [_embeddings(json.dumps(["\u0301\u0316" * 99_990], ensure_ascii=False).encode())])


def _many_texts(attacker: Attacker) -> None:
    texts = [[f"text {i} of {n}" for i in range(2_000)] for n in range(20)]
    _in_parallel(attacker, 20, [_embeddings(json.dumps(many).encode()) for many in texts])


def _tokens(attacker: Attacker) -> None:
    tokenize = json.dumps({"inputs": ["a " * 62_500] * 2}).encode()
    decode = json.dumps({"ids": [[2000] * 250_000]}).encode()
    _in_parallel(attacker, 8, [("/tokenize", tokenize), ("/decode", decode)])


def _pairs(attacker: Attacker) -> None:
    documents = json.dumps({"model": RERANKER, "query": "a", "documents": ["word " * 100_000] * 30}).encode()
    query = json.dumps({"model": RERANKER, "query": "word " * 1_500_000, "documents": ["a"] * 2048}).encode()
    _in_parallel(attacker, 8, [("/v1/rerank", documents), ("/v1/rerank", query)])


ATTACKS: Final[dict[str, tuple[str, Attack]]] = {
    "states": ("60 answers of `/embed_all`, 147 MB of JSON each, are not read", _states),
    "dense": ("60 answers of 2,048 embeddings are not read", _dense),
    "bodies": ("40 bodies of 16 MB at once", _large_bodies),
    "numbers": ("8.3 million numbers, over 4 connections", _numbers),
    "structures": ("lists, keys, escapes and numbers, 16 MB of each, over 4 connections", _structures),
    "ids": ("480,000 token ids, over 4 connections", _token_ids),
    "compressed": ("gzip, deflate and zstd of 500 MB of zeros and of 16 MB of text, over 9 connections", _compressed),
    "chunks": ("15 MB with `late_chunking`, over 4 connections", _late_chunks),
    "letter": ("8 MB of one character, over 5 connections", _one_letter),
    "long": ("20 texts of 199,980 characters at once", _long_texts),
    "many": ("20 requests of 2,000 texts at once", _many_texts),
    "tokens": ("`/tokenize` of 250,000 characters and `/decode` of 250,000 ids, over 8 connections", _tokens),
    "pairs": ("`/v1/rerank` with 15 MB of documents, or a query of 7.5 MB, over 8 connections", _pairs),
    "slow": ("200 bodies, a byte at a time", _slow_bodies),
    "pipelined": ("requests without end over 8 connections, answers not read", _pipelined),
    "connections": ("3,000 connections", _many_connections),
}


def main(arguments: Sequence[str]) -> int:
    """Run one attacker."""
    name, port, key, seconds = arguments
    attacker = Attacker(int(port), key, float(seconds))
    _description, attack = ATTACKS[name]
    attack(attacker)
    print(json.dumps(attacker.statuses))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
