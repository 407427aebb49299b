"""Load for an embeddings server: clients that each send their next request when the last is answered.

Runs as a separate process (``python -m bench.load``), reads a :class:`Load` per line from standard input and writes a
:class:`Sample` per line. It must not take the processor from the server that it measures: requests are built before the
clock starts, sockets are read by a few lines of code, and answers are counted, not parsed, after the first.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import httptools
import orjson
import uvloop

from bench.processes import Worker

HOST = "127.0.0.1"

# A slow server gets more time, up to so many times the given one, until each client has had an answer.
_MAX_STRETCH = 3.0
# After the end, wait for running requests, so that the next measurement does not share the machine with them.
_DRAIN_S = 60.0
# Seconds until a client sends again after a 429 or a 503.
_BACK_OFF_S = 0.1
_TOKENS = b'"total_tokens":'


@dataclass(frozen=True, slots=True)
class Group:
    """Clients that do the same.

    Attributes:
        texts: one pool for all clients, taken from in order; when it is used up, the load ends early.
        repeats: start again when the pool is used up; for servers that ignore the texts.
        priority: sent as ``x-gateway-priority``, unless empty.
    """

    num_clients: int
    texts_per_request: int
    texts: Sequence[str]
    repeats: bool = False
    priority: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send, and for how long.

    Attributes:
        encoding: ``base64`` to ask for vectors in that form; OpenAI's own client does.
    """

    port: int
    path: str
    model: str
    seconds: float
    groups: Sequence[Group]
    encoding: str = "float"


@dataclass(frozen=True, slots=True)
class Sample:
    """The results of one group.

    Attributes:
        seconds: from the first request to the last answer that is counted.
        num_tokens: as the server counted them.
        failures: number of answers by status, and of ``broken`` connections.
    """

    seconds: float
    num_texts: int
    num_tokens: int = 0
    latencies_ms: Sequence[float] = ()
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies_ms) / self.seconds if self.latencies_ms else 0.0

    @property
    def texts_per_s(self) -> float:
        return self.num_texts / self.seconds if self.num_texts else 0.0


class LoadGenerator(Worker):
    """The process that makes load."""

    def __init__(self, environ: dict[str, str]) -> None:
        super().__init__("load", "bench.load", (), environ)

    def run(self, load: Load) -> list[Sample]:
        """Generate load and return the results of each group."""
        return [Sample(**sample) for sample in self.ask(asdict(load))]


# ------------------------------------------------------------------------------------------------- inside the process


class _Tally:
    """The requests of a group, and their results so far."""

    def __init__(self, group: Group, load: Load) -> None:
        self.group = group
        self.requests = _requests(group, load)
        self.latencies: list[float] = []
        self.num_tokens = 0
        self.failures: Counter[str] = Counter()
        self.num_busy = 0
        self.is_over = False
        self.last_answer = time.perf_counter()

    def sample(self, started: float) -> Sample:
        return Sample(
            seconds=self.last_answer - started,
            num_texts=len(self.latencies) * self.group.texts_per_request,
            num_tokens=self.num_tokens,
            latencies_ms=[1000 * latency for latency in self.latencies],
            failures=dict(self.failures),
        )


class _Client(asyncio.Protocol):
    """One connection: sends a request, counts the bytes of its answer, sends the next."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)  # calls the methods on_body and on_message_complete
        self._body: list[bytes] = []
        self._is_busy = False
        self._is_first = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is of no class of asyncio's

    def send(self) -> None:
        tally = self._tally
        request = None if tally.is_over else next(tally.requests, None)
        if request is None or self._transport is None:
            tally.is_over = True
            return
        self._is_busy = True
        tally.num_busy += 1
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        if self._is_first:
            self._body.append(data)
        else:  # the end is enough, which may come in two pieces
            self._body[:] = (self._body[-1:] if len(data) < 100 else []) + [data]

    def on_message_complete(self) -> None:
        tally, status = self._tally, str(self._parser.get_status_code())
        if not tally.is_over:
            self._count(tally, status)
        self._body.clear()
        self._is_busy = False
        tally.num_busy -= 1
        if status == "200":
            self.send()
        else:
            asyncio.get_running_loop().call_later(_BACK_OFF_S, self.send)

    def _count(self, tally: _Tally, status: str) -> None:
        body = b"".join(self._body)
        is_right = status == "200" and (not self._is_first or _is_complete(body, tally.group.texts_per_request))
        self._is_first = False
        if not is_right:
            tally.failures[status if status != "200" else "wrong answer"] += 1
            return
        tally.last_answer = time.perf_counter()
        tally.latencies.append(tally.last_answer - self._sent)
        tokens = body[-100:].partition(_TOKENS)[2]
        tally.num_tokens += int(tokens.partition(b"}")[0] or 0)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._is_busy:
            self._is_busy = False
            self._tally.num_busy -= 1
            self._tally.failures["broken"] += 1

    def close(self) -> None:
        if self._transport is not None:
            self._is_busy = False
            self._transport.abort()


def _requests(group: Group, load: Load) -> Iterator[bytes]:
    size = group.texts_per_request
    whole = range(0, len(group.texts) - size + 1, size)
    built = [_request(load, group.texts[first : first + size], group.priority) for first in whole]
    return itertools.cycle(built) if group.repeats else iter(built)


def _request(load: Load, texts: Sequence[str], priority: str = "") -> bytes:
    form = {} if load.encoding == "float" else {"encoding_format": load.encoding}
    body = orjson.dumps({"model": load.model, "input": texts, **form})
    head = (
        f"POST {load.path} HTTP/1.1\r\nhost: {HOST}:{load.port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n" + (f"x-gateway-priority: {priority}\r\n" if priority else "") + "\r\n"
    )
    return head.encode() + body


def _is_complete(body: bytes, num_texts: int) -> bool:
    """Return whether an answer has as many vectors as texts were sent, all of them equally wide and not of zeros."""
    rows = [item["embedding"] for item in orjson.loads(body)["data"]]
    return len(rows) == num_texts and len({len(row) for row in rows}) == 1 and all(any(row) for row in rows)


async def make_load(load: Load) -> list[Sample]:
    """Generate load from this process, and return the results of each group."""
    loop = asyncio.get_running_loop()
    tallies = [_Tally(group, load) for group in load.groups]
    clients = [
        (await loop.create_connection(functools.partial(_Client, tally), HOST, load.port))[1]
        for tally in tallies
        for _ in range(tally.group.num_clients)
    ]
    started = time.perf_counter()
    for client in clients:
        client.send()
    await _wait(tallies, started, load.seconds)
    for tally in tallies:
        tally.is_over = True
    samples = [tally.sample(started) for tally in tallies]
    deadline = time.perf_counter() + _DRAIN_S
    while any(tally.num_busy for tally in tallies) and time.perf_counter() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for client in clients:
        client.close()
    return samples


async def _wait(tallies: Sequence[_Tally], started: float, seconds: float) -> None:
    """Wait until the time is up; longer where a client of a slow server has had no answer yet."""
    while (elapsed := time.perf_counter() - started) < seconds * _MAX_STRETCH:
        has_enough = all(len(tally.latencies) >= tally.group.num_clients for tally in tallies)
        if any(tally.is_over for tally in tallies) or (elapsed >= seconds and has_enough):
            return
        await asyncio.sleep(0.01)


def read_load(question: dict[str, Any]) -> Load:
    """Read a load as :meth:`LoadGenerator.run` sends it."""
    return Load(**{**question, "groups": [Group(**group) for group in question["groups"]]})


def raise_file_limit() -> None:
    """Allow this process, and those that it starts, as many open sockets as the system lets it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def answer_lines(lines: Iterable[bytes]) -> None:
    """Make the load of each line, until there are no more."""
    for line in lines:
        samples = uvloop.run(make_load(read_load(orjson.loads(line))))
        sys.stdout.buffer.write(orjson.dumps([asdict(sample) for sample in samples]) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    raise_file_limit()
    answer_lines(sys.stdin.buffer)
