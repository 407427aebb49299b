"""A body arrives complete, within its limits, and its memory is reserved as it arrives."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable

import pytest
from starlette.datastructures import Headers
from starlette.types import Message

from gateway.access.memory import MemoryBudget, Reservation
from gateway.errors import BadInput, BodyTooLarge, BodyTooSlow, ClientDisconnected
from gateway.http.body import Body
from gateway.http.pace import Pace

KIB, MIB = 1 << 10, 1 << 20
GONE: Message = {"type": "http.disconnect"}


class CountingPace(Pace):
    """Grants every request immediately, and records the requested bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    async def take(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


class Upload:
    """A body whose pieces have all arrived, and whose client has then disconnected.

    Attributes:
        left: the messages that have not been received.
        memory: the reservation of the request.
    """

    def __init__(
        self, pieces: Iterable[bytes], max_bytes: int = 64 * MIB, timeout_s: float = 60.0, **headers: str
    ) -> None:
        messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if messages:
            del messages[-1]["more_body"]  # which means that this is all
        self.left = [*messages, GONE]
        self.memory = Reservation(MemoryBudget(256 * MIB), "test")
        self.pace = CountingPace()
        known = Headers({name.replace("_", "-"): value for name, value in headers.items()})
        self.body = Body(self._receive, known, self.memory, self.pace, max_bytes, timeout_s)

    async def _receive(self) -> Message:
        if not self.left:
            await asyncio.Event().wait()  # nothing comes any more
        return self.left.pop(0)

    async def read(self) -> bytes:
        self.body.admit()
        content, is_complete = b"", False
        while not is_complete:
            message = await self.body.receive()
            content, is_complete = content + message["body"], not message.get("more_body", False)
        return content


@pytest.mark.parametrize("headers", [{}, {"content_length": "4"}, {"content_length": "four"}])
async def test_a_body_is_passed_on_and_then_that_its_client_has_gone(headers: dict[str, str]) -> None:
    upload = Upload([b"ab", b"", b"cd"], **headers)

    assert await upload.read() == b"abcd"
    assert await upload.body.receive() == GONE


async def test_a_client_that_goes_before_the_end_has_disconnected() -> None:
    upload = Upload([b"ab", b"cd"])
    upload.left[1] = GONE

    with pytest.raises(ClientDisconnected):
        await upload.read()


async def test_a_body_that_does_not_come_in_time_is_refused_and_its_rest_not_read() -> None:
    upload = Upload([b"ab", b"cd"], timeout_s=0.05)
    rest = [upload.left.pop(), upload.left.pop()]

    with pytest.raises(BodyTooSlow, match=r"only 2 bytes of the request body arrived in 0\.05 s"):
        await upload.read()
    upload.left = rest
    await upload.body.drain()

    assert len(upload.left) == 2


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize("is_declared", [True, False])
async def test_the_limit_is_exact(coding: str, is_declared: bool) -> None:
    for num_more in (0, 1):
        content = b" " * (1000 + num_more)
        sent = gzip.compress(content) if coding else content
        headers = {"content_length": str(len(sent))} if is_declared else {}
        upload = Upload([sent[:10], sent[10:]], max_bytes=1000, content_encoding=coding, **headers)
        if not num_more:
            assert await upload.read() == content
        else:
            with pytest.raises(BodyTooLarge, match="the limit is 1000"):
                await upload.read()


async def test_a_compressed_body_that_is_cut_off_is_refused() -> None:
    with pytest.raises(BadInput):
        await Upload([gzip.compress(b"a text")[:-4]], content_encoding="gzip").read()


async def test_no_body_is_taken_for_compressed() -> None:
    assert await Upload([b""], content_encoding="gzip").read() == b""


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("num_bytes", "held"), [(0, 0), (1, 64 * KIB), (64 * KIB, 64 * KIB), (64 * KIB + 1, 128 * KIB), (MIB, MIB)]
)
async def test_a_declared_length_is_reserved_in_advance(num_bytes: int, held: int) -> None:
    upload = Upload([b""], content_length=str(num_bytes))

    upload.body.admit()

    assert upload.memory.num_bytes == held


async def test_an_undeclared_length_is_reserved_as_it_arrives() -> None:
    upload = Upload([b"a", b"a" * 64 * KIB, b"a", b"a" * MIB])
    upload.body.admit()
    held = [upload.memory.num_bytes]
    while upload.left != [GONE]:
        await upload.body.receive()
        held.append(upload.memory.num_bytes)

    assert held == [0, 64 * KIB, 128 * KIB, 128 * KIB, MIB + 128 * KIB]


async def test_a_decoded_body_is_reserved_with_its_decoders_memory() -> None:
    sent = gzip.compress(bytes(MIB))
    upload = Upload([sent[:-20], sent[-20:]], content_encoding="gzip", content_length=str(len(sent)))

    assert len(await upload.read()) == MIB
    assert MIB < upload.memory.num_bytes < 2 * MIB


# ----------------------------------------------------------------------------------------------------------------- pace


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize(("num_bytes", "is_slowed"), [(256 * KIB, False), (257 * KIB, True)])
async def test_only_large_bodies_wait_for_others(coding: str, num_bytes: int, is_slowed: bool) -> None:
    content = bytes(num_bytes)
    upload = Upload([gzip.compress(content) if coding else content], content_encoding=coding)

    await upload.read()

    assert bool(upload.pace.num_bytes) == is_slowed


# ---------------------------------------------------------------------------------------------------------- unread bodies


async def test_an_unread_body_is_received_up_to_a_limit() -> None:
    piece = bytes(MIB)
    upload = Upload([piece] * 100)

    await upload.body.drain()

    assert len(upload.left) == 100 - 64 + 1
    assert upload.pace.num_bytes == 64 * MIB


async def test_a_body_that_is_shorter_is_received_to_its_end() -> None:
    upload = Upload([b"a"] * 5)
    upload.body.admit()
    await upload.body.receive()

    await upload.body.drain()

    assert upload.left == [GONE]


async def test_a_body_that_is_sent_on_request_alone_is_not_waited_for() -> None:
    upload = Upload([b"a"] * 5, expect="100-continue")

    await upload.body.drain()

    assert len(upload.left) == 6
    upload.body.admit()
    await upload.body.receive()
    await upload.body.drain()
    assert upload.left == [GONE]


async def test_another_expectation_holds_no_body_back() -> None:
    upload = Upload([b"a"] * 5, expect="a miracle")

    await upload.body.drain()

    assert upload.left == [GONE]


@pytest.mark.parametrize("is_declared", [False, True])
async def test_a_path_may_lower_the_limit_and_not_raise_it(is_declared: bool) -> None:
    def upload(num_bytes: int) -> Upload:
        headers = {"content_length": str(num_bytes)} if is_declared else {}
        return Upload([b"x" * num_bytes], max_bytes=100, **headers)

    async def read(num_bytes: int, limit: int) -> int:
        body = upload(num_bytes)
        body.body.limit(limit)
        return len(await body.read())

    assert await read(40, limit=40) == 40
    assert await read(100, limit=1000) == 100
    for num_bytes, limit in ((41, 40), (101, 1000)):
        with pytest.raises(BodyTooLarge, match=f"the limit is {min(limit, 100)}"):
            await read(num_bytes, limit)


async def test_a_file_may_take_as_long_as_a_slow_line_needs_for_it_and_holds_little() -> None:
    slow = Upload([], timeout_s=0.05)
    slow.left = []
    slow.body.stream(25 * KIB)  # a tenth of a second, at 256 KiB per second

    with pytest.raises(BodyTooSlow, match=r"arrived in 0.147656 s, which is the limit: upload several files"):
        await slow.read()
    large = Upload([b"x" * MIB] * 5, max_bytes=10)
    large.body.stream(5 * MIB)
    assert len(await large.read()) == 5 * MIB
    assert large.memory.num_bytes == 2 * MIB
