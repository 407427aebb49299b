"""Messages between a front and a replica, on one connection between the two.

Ray Serve starts, places, restarts and scales the replicas, but texts and vectors do not pass through it. A call through
its handle takes 1.3 ms, 0.7 ms of them on the front's core; a call over this connection takes 0.03 ms and 0.014 ms,
measured side by side with the same trivial model. Also, a call through the handle cannot be canceled inside a batch,
cannot report its number of tokens before they are computed, and cannot report its replica's queue.

A frame is a length followed by a pickle and its buffers, so vectors are not copied into the pickle. Only arrays and the
gateway's own values and errors are unpickled. Both sides first prove that they know the replica's secret, which only
members of the Ray cluster can read. The frames are not encrypted, like those between Ray's own processes without TLS.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import pickle
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import structlog

log = structlog.get_logger(__name__)

Message: TypeAlias = tuple[Any, ...]
"""A message: its kind, then its parts; see :mod:`gateway.cluster.line` and :mod:`gateway.cluster.host`."""

_HEAD: Final = struct.Struct("<I")
_NUM: Final = struct.Struct("<H")
_LENGTH: Final = struct.Struct("<I")
_BUFFER_BYTES: Final = 1 << 16
_MAX_FRAME: Final = (1 << 32) - 1
_MAX_GREETING: Final = 96
_MAGIC: Final = b"gateway replica 1"
_NONCE_BYTES: Final = 32

# Modules of values and errors, whose constructors have no side effects.
_VALUES: Final = {
    "gateway.cluster.values",
    "gateway.errors",
    "gateway.precision",
    "gateway.similarity",
    "gateway.types",
}
_NUMPY: Final = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return super().find_class(module, name)
        found = super().find_class(module, name) if module in _VALUES and "." not in name else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a message")


def to_frame(messages: Sequence[Message]) -> list[bytes | memoryview]:
    """Return the parts of a frame with messages: a small head, then the buffers.

    Raises:
        ValueError: the frame is too large.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < 256 or len(buffers) == 65_535:  # copying is cheaper
            return True
        buffers.append(raw)
        return False

    pickled = pickle.dumps(messages, protocol=5, buffer_callback=keep)
    sizes = [len(pickled), *(buffer.nbytes for buffer in buffers)]
    num_bytes = _NUM.size + _LENGTH.size * len(sizes) + sum(sizes)
    if num_bytes > _MAX_FRAME:
        raise ValueError(f"a message of {num_bytes} bytes is too large for the connection to a replica")
    head = _HEAD.pack(num_bytes) + _NUM.pack(len(buffers)) + struct.pack(f"<{len(sizes)}I", *sizes)
    return [head + pickled, *buffers]


def from_frame(frame: bytearray) -> list[Message]:
    """Return the messages of a frame, given without its leading length. Their arrays are views of ``frame``.

    Raises:
        pickle.UnpicklingError: the bytes are not a frame, or contain a class that does not belong in a message.
    """
    view = memoryview(frame)
    try:
        (num_buffers,) = _NUM.unpack_from(view)
        sizes = struct.unpack_from(f"<{num_buffers + 1}I", view, _NUM.size)
    except struct.error as error:
        raise pickle.UnpicklingError(f"not a frame: {error}") from error
    parts, start = [], _NUM.size + _LENGTH.size * len(sizes)
    for size in sizes:
        parts.append(view[start : start + size])
        start += size
    if start != len(frame):
        raise pickle.UnpicklingError(f"not a frame: {len(frame)} bytes, expected {start}")
    messages: list[Message] = _Unpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()
    return messages


class Connection(asyncio.BufferedProtocol):
    """One end of a connection. Messages sent in the same turn of the event loop share a frame.

    Args:
        secret: the secret that both ends must know.
        is_front: this is the front's end.
        on_open: called once both ends have proved that they know the secret.
        on_message: called with each later message.
        on_closed: called once, at the end, with the reason.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        is_front: bool,
        on_open: Callable[[Connection], None],
        on_message: Callable[[Connection, Message], None],
        on_closed: Callable[[Connection, str], None],
    ) -> None:
        self._secret = secret
        self._is_front = is_front
        self._on_open, self._on_message, self._on_closed = on_open, on_message, on_closed
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._their_nonce = b""
        self.is_open = False
        self._reason = ""
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._end = 0
        self._frame: bytearray | None = None
        self._filled = 0
        self._outgoing: list[Message] = []
        self._loop = asyncio.get_running_loop()

    # --------------------------------------------------------------------------------------------------- sending

    def send(self, *message: object) -> None:
        """Send a message together with others of this turn of the event loop; drop it if the connection is closed."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if self._transport is None or not self.is_open:
            return
        self._transport.writelines(to_frame(messages))

    def _send_raw(self, content: bytes) -> None:
        if self._transport is not None:
            self._transport.write(_HEAD.pack(len(content)) + content)

    def close(self, reason: str) -> None:
        """Close the connection after all messages are written."""
        self._reason = self._reason or reason
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Close the connection immediately."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------------------- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream
        if not self._is_front:
            self._send_raw(_MAGIC + self._nonce)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self.is_open = None, False
        self._on_closed(self, self._reason or (str(error) if error else "the other end closed the connection"))

    def get_buffer(self, _sizehint: int) -> memoryview:
        if self._frame is not None:
            return memoryview(self._frame)[self._filled :]
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, num_bytes: int) -> None:
        if self._frame is None:
            self._end += num_bytes
            self._take_frames()
            return
        self._filled += num_bytes
        if self._filled == len(self._frame):
            frame, self._frame = self._frame, None
            self._receive(frame)

    def _take_frames(self) -> None:
        """Process the complete frames in the buffer, and start to receive the next if it is incomplete."""
        start = 0
        while self._end - start >= _HEAD.size and self._transport is not None:
            (length,) = _HEAD.unpack_from(self._buffer, start)
            if not self.is_open and length > _MAX_GREETING:
                self.abort("the other end does not speak this protocol")
                return
            start += _HEAD.size
            if self._end - start < length:
                if length < len(self._buffer) - _HEAD.size:
                    start -= _HEAD.size
                    break
                self._frame = bytearray(length)
                self._filled = self._end - start
                self._frame[: self._filled] = self._buffer[start : self._end]
                start = self._end
                break
            self._receive(self._buffer[start : start + length])
            start += length
        self._buffer[: self._end - start] = self._buffer[start : self._end]
        self._end -= start

    def _receive(self, frame: bytearray) -> None:
        if not self.is_open:
            self._greet(bytes(frame))
            return
        try:
            messages = from_frame(frame)
            for message in messages:
                self._on_message(self, message)
        except Exception as error:  # a bad message from the other end must cost no more than its connection
            log.exception("wire_failed")
            self.abort(f"a message could not be read: {error}")

    # -------------------------------------------------------------------------------------------------- greeting

    def _greet(self, content: bytes) -> None:
        """Prove that this end knows the secret, and check that the other end does."""
        if self._is_front and not self._their_nonce:
            self._their_nonce = content.removeprefix(_MAGIC)
            if not content.startswith(_MAGIC) or len(self._their_nonce) != _NONCE_BYTES:
                self.abort("the other end is not a replica of this version of the gateway")
                return
            self._send_raw(self._nonce + self._proof(b"front", self._their_nonce, self._nonce))
            return
        if self._is_front:
            is_right = hmac.compare_digest(content, self._proof(b"replica", self._nonce, self._their_nonce))
        else:
            self._their_nonce, proof = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
            is_right = hmac.compare_digest(proof, self._proof(b"front", self._nonce, self._their_nonce))
        if not is_right:
            self.abort("the other end does not know the secret")
            return
        if not self._is_front:
            self._send_raw(self._proof(b"replica", self._their_nonce, self._nonce))
        self.is_open = True
        self._on_open(self)

    def _proof(self, side: bytes, first: bytes, second: bytes) -> bytes:
        return hmac.digest(self._secret, side + first + second, hashlib.sha256)
