"""Compressed bodies are decoded piece by piece; others are refused with the reason."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable

import pytest
import zstandard

from gateway.errors import BadInput, UnsupportedEncoding
from gateway.http.decoding import decoder_for

TEXT = b'{"input": "' + bytes(random.Random(3).choices(range(32, 127), k=300_000)) + b'"}'


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    " deflate, identity": raw_deflate,
    "zstd": zstandard.compress,
}


def decoded(coding: str, data: bytes, step: int = 1 << 16) -> bytes:
    decoder = decoder_for(coding)
    assert decoder is not None
    pieces = [piece for first in range(0, len(data), step) for piece in decoder.feed(data[first : first + step])]
    decoder.finish()
    return b"".join(pieces)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_a_compressed_body_is_restored(coding: str, step: int) -> None:
    text = TEXT if step > 7 else TEXT[:5000]

    assert decoded(coding, CODINGS[coding](text), step) == text


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("text", [b"", b"a", b"a" * (256 * 1024), b"a" * (256 * 1024 + 1)])
def test_it_ends_where_it_ends(coding: str, text: bytes) -> None:
    assert decoded(coding, CODINGS[coding](text)) == text


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_bomb_comes_in_pieces(coding: str) -> None:
    bomb = CODINGS[coding](bytes(200_000_000))
    decoder = decoder_for(coding)
    assert decoder is not None

    pieces = decoder.feed(bomb)

    assert max(len(next(pieces)) for _ in range(3)) <= 17_000_000
    assert len(bomb) < 300_000


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:1], "cut short"),
        (lambda data: data + b"{}", "something follows its end"),
        (lambda data: data + bytes(8), "something follows its end"),
        (lambda data: b"{" + data, "is not valid"),
        (lambda _data: TEXT, "is not valid"),
    ],
)
def test_a_broken_body_is_reported(coding: str, damage: Callable[[bytes], bytes], message: str) -> None:
    name = coding.partition(",")[0].strip().lower()
    with pytest.raises(BadInput, match=message) as raised:
        decoded(coding, damage(CODINGS[coding](TEXT)))
    assert raised.value.message.startswith(f"the request body is not valid {name}, which")


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_a_body_may_have_several_parts(coding: str, step: int) -> None:
    encode = CODINGS[coding]
    texts = [TEXT[:3000], b"", b"a", TEXT if step > 7 else TEXT[:500], b""]

    assert decoded(coding, b"".join(map(encode, texts)), step) == b"".join(texts)
    for damage, message in ((b"\x1f", "cut short|follows"), (b"\x28\xb5", "cut short|follows"), (b"}", "follows")):
        with pytest.raises(BadInput, match=message):
            decoded(coding, encode(b"a") + encode(b"b") + damage, step)
    with pytest.raises(BadInput, match="cut short"):
        decoded(coding, encode(b"a") + encode(TEXT)[:-5], step)


def test_a_zstd_frame_without_content_is_skipped() -> None:
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"

    assert decoded("zstd", skipped + zstandard.compress(b"a") + skipped + zstandard.compress(b"b")) == b"ab"


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_the_parts_of_a_body_are_bounded(coding: str) -> None:
    empty = CODINGS[coding](b"")

    assert decoded(coding, empty * 4096) == b""
    with pytest.raises(BadInput, match="more than 4096 parts"):
        decoded(coding, empty * 4097)


@pytest.mark.parametrize("coding", ["deflate", " deflate, identity"])
def test_deflate_has_one_part(coding: str) -> None:
    with pytest.raises(BadInput, match="something follows its end"):
        decoded(coding, CODINGS[coding](b"a") * 2)


def test_a_frame_that_asks_for_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(TEXT) + compressor.flush()

    with pytest.raises(BadInput, match="not valid zstd"):
        decoded("zstd", data)


@pytest.mark.parametrize("coding", ["", "identity", "Identity", ",", "identity, identity"])
def test_no_coding_has_no_decoder(coding: str) -> None:
    assert decoder_for(coding) is None


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "gzip, zstd", "utf-8", "x" * 1000])
def test_others_are_refused_with_those_that_are_supported(coding: str) -> None:
    with pytest.raises(UnsupportedEncoding, match="uncompressed, or as one of gzip, deflate, zstd") as raised:
        decoder_for(coding)

    assert raised.value.status == 415
    assert len(raised.value.message) < 300
