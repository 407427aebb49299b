"""Decode a compressed body piece by piece, so that a small body cannot become a huge one at once."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import zstandard

from gateway.errors import BadInput, UnsupportedEncoding

SUPPORTED = ("gzip", "deflate", "zstd")
_NO_CODING = frozenset(("", "identity"))
_PIECE_BYTES = 256 * 1024
# The zstd decoder cannot limit its output. 4 bytes can decode to 128 KiB, so this many decode to 16 MiB at most.
_ZSTD_INPUT_BYTES = 512
# The sizes of the header of a frame, and of a frame without content.
_ZSTD_FIRST_BYTES = frozenset((0x28, *range(0x50, 0x60)))
_GZIP_MAGIC = b"\x1f\x8b"
# The maximum number of members in a gzip body, and of frames in a zstd body. bgzip, for example, writes one per 64 KiB.
_MAX_PARTS = 4096
# The largest window that a zstd body may ask for, by RFC 9659.
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024


class Decoder(Protocol):
    """Decodes a stream of bytes."""

    memory_bytes: int
    """The maximum memory that the decoder itself holds, in bytes."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode further bytes, and yield the result in pieces.

        Raises:
            BadInput: the bytes are not validly encoded.
        """

    def finish(self) -> None:
        """Check that the stream is complete.

        Raises:
            BadInput: the stream is cut short.
        """


def decoder_for(content_encoding: str) -> Decoder | None:
    """Return the decoder for a body; ``None`` for a body that is not encoded.

    Args:
        content_encoding: the header's value.

    Raises:
        UnsupportedEncoding: the header names an unsupported coding, or several codings.
    """
    codings = [coding for part in content_encoding.split(",") if (coding := part.strip().lower()) not in _NO_CODING]
    match codings:
        case []:
            return None
        case ["gzip" | "x-gzip" | "deflate" as name]:
            return _Zlib(name)
        case ["zstd"]:
            return _Zstd()
        case _:
            raise UnsupportedEncoding(
                f"`Content-Encoding: {content_encoding[:100]}` is not supported: send the body uncompressed, or as one of "
                f"{', '.join(SUPPORTED)}"
            )


class _Zlib:
    """Decodes gzip, and deflate with zlib's frame (RFC 9110) or without it, as some clients send it.

    A gzip body may have several members (RFC 1952, section 2.2), as the tools cat and bgzip write them.
    """

    memory_bytes = 64 * 1024

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin = b""
        self._inflater = None if name == "deflate" else _gzip_member()
        self._num_members = 1

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inflater is None:
            self._begin += data
            if len(self._begin) < 2:
                return
            # A zlib frame: method 8, and a header that is a multiple of 31 (RFC 1950, section 2.2).
            has_frame = self._begin[0] & 0x0F == 8 and int.from_bytes(self._begin[:2], "big") % 31 == 0
            self._inflater = zlib.decompressobj(zlib.MAX_WBITS if has_frame else -zlib.MAX_WBITS)
            data, self._begin = self._begin, b""
        # The bytes after a member are copied each time, so only a part of the body is in the decoder.
        for first in range(0, len(data), _PIECE_BYTES):
            rest = data[first : first + _PIECE_BYTES]
            while rest:
                if self._inflater.eof:
                    self._begin_member(rest)
                yield from self._inflate(rest)
                rest = self._inflater.unused_data

    def _begin_member(self, data: bytes) -> None:
        if self._name == "deflate" or not _GZIP_MAGIC.startswith(data[:2]):
            raise _broken(self._name, "something follows its end")
        self._num_members = _count_more(self._name, self._num_members)
        self._inflater = _gzip_member()

    def _inflate(self, data: bytes) -> Iterator[bytes]:
        inflater = self._inflater
        assert inflater is not None  # noqa: S101
        has_more = True
        while has_more and not inflater.eof:
            try:
                piece = inflater.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise _broken(self._name, str(error)) from None
            data = inflater.unconsumed_tail
            # The input may be consumed before all output is returned.
            has_more = bool(data) or len(piece) == _PIECE_BYTES
            if piece:
                yield piece

    def finish(self) -> None:
        if self._inflater is None or not self._inflater.eof:
            raise _broken(self._name, "it is cut short")


class _Zstd:
    """Decodes zstd: one frame, or several (RFC 8878, section 3), as the tool pzstd writes them."""

    memory_bytes = _ZSTD_WINDOW_BYTES

    def __init__(self) -> None:
        self._frame = _zstd_frame()
        self._num_frames = 1

    def feed(self, data: bytes) -> Iterator[bytes]:
        for first in range(0, len(data), _ZSTD_INPUT_BYTES):
            rest = data[first : first + _ZSTD_INPUT_BYTES]
            while rest:
                if self._frame.eof:
                    self._begin_frame(rest)
                try:
                    piece = self._frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise _broken("zstd", str(error)) from None
                if piece:
                    yield piece
                rest = self._frame.unused_data if self._frame.eof else b""

    def _begin_frame(self, data: bytes) -> None:
        if data[0] not in _ZSTD_FIRST_BYTES:
            raise _broken("zstd", "something follows its end")
        self._num_frames = _count_more("zstd", self._num_frames)
        self._frame = _zstd_frame()

    def finish(self) -> None:
        if not self._frame.eof:
            raise _broken("zstd", "it is cut short")


def _gzip_member() -> zlib._Decompress:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _zstd_frame() -> zstandard.ZstdDecompressionObj:
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()


def _count_more(name: str, number: int) -> int:
    """Count one more part of a body.

    Raises:
        BadInput: the body has more parts than any client needs; even empty parts cost time.
    """
    if number >= _MAX_PARTS:
        raise _broken(name, f"it has more than {_MAX_PARTS} parts, which is the limit")
    return number + 1


def _broken(name: str, why: str) -> BadInput:
    return BadInput(f"the request body is not valid {name}, which `Content-Encoding` says it is: {why}")
