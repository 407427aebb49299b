"""The head of a request, as the parser has accepted it: its path, its faults, the key that it carries."""

from __future__ import annotations

import base64
import hashlib

import pytest
from starlette.datastructures import Headers

from gateway.errors import InvalidHttp, UnsupportedTransferCoding
from gateway.http.head import path_of, sent_key, why_refused, without_offer

HOST = (b"host", b"gateway")


def codings(*values: bytes) -> list[tuple[bytes, bytes]]:
    return [HOST, *((b"transfer-encoding", value) for value in values)]


@pytest.mark.parametrize(
    ("target", "path"),
    [
        pytest.param(b"/v1/models", b"/v1/models", id="a path"),
        pytest.param(b"/v1/models?a=http://b/c", b"/v1/models?a=http://b/c", id="an address in a query"),
        pytest.param(b"/http://b/c", b"/http://b/c", id="an address in a path"),
        pytest.param(b"http://gateway/v1/models", b"/v1/models", id="an address"),
        pytest.param(b"HTTPS://user@gateway:80/v1/models?a=b", b"/v1/models?a=b", id="an address with all its parts"),
        pytest.param(b"http://a/http://b/c", b"/http://b/c", id="an address behind an address"),
        pytest.param(b"http://gateway", b"/", id="an address without a path"),
        pytest.param(b"http://gateway?a=b", b"/?a=b", id="an address with only a query"),
        pytest.param(b"http://gateway#a", b"/#a", id="an address with only a fragment"),
        pytest.param(b"*", b"/*", id="the whole server"),
        pytest.param(b"gateway:443", b"/", id="what CONNECT sends"),
        pytest.param(b"v1/models", b"/", id="a path without its slash"),
    ],
)
def test_a_target_becomes_a_path(target: bytes, path: bytes) -> None:
    assert path_of(target) == path


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([HOST], id="no coding"),
        pytest.param(codings(b"chunked"), id="chunked"),
        pytest.param(codings(b" ChunKed "), id="in any case"),
        pytest.param(codings(b"", b" , "), id="empty codings"),
    ],
)
def test_a_body_may_come_in_chunks(headers: list[tuple[bytes, bytes]]) -> None:
    assert why_refused(headers, "1.1") is None


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(codings(b"chunked, chunked"), id="chunked twice"),
        pytest.param(codings(b"chunked", b"chunked"), id="chunked twice, in two lines"),
        pytest.param(codings(b"chunked, gzip, chunked"), id="chunked twice, around another"),
        pytest.param(codings(b"chunked, gzip"), id="chunked not last"),
        pytest.param(codings(b"gzip"), id="not chunked"),
    ],
)
def test_transfer_codings_must_end_with_chunked_once(headers: list[tuple[bytes, bytes]]) -> None:
    """RFC 9112, 6.1: a proxy in front may see another end of such a message, and read its rest as a second request."""
    refused = why_refused(headers, "1.1")

    assert isinstance(refused, InvalidHttp)
    assert refused.message == "`Transfer-Encoding` must end with `chunked`, once"


def test_a_coding_before_chunked_is_not_supported() -> None:
    refused = why_refused(codings(b"GZIP", b"chunked"), "1.1")

    assert isinstance(refused, UnsupportedTransferCoding)
    assert refused.is_permanent
    assert refused.message.startswith("`Transfer-Encoding: gzip, chunked` is not supported, only `chunked`;")


def test_the_message_quotes_the_first_100_characters_of_the_codings() -> None:
    refused = why_refused(codings(b"x" * 1_000, b"chunked"), "1.1")

    assert refused is not None
    assert refused.message.startswith(f"`Transfer-Encoding: {'x' * 100}` is not supported")


@pytest.mark.parametrize(
    ("hosts", "version", "words"),
    [
        pytest.param([], "1.1", "this one has 0", id="none"),
        pytest.param([b"a", b"a"], "1.1", "this one has 2", id="two"),
        pytest.param([b"a", b"b"], "1.0", "this one has 2", id="two, in HTTP/1.0"),
        pytest.param([b"a/b"], "1.1", "is not an address", id="a path in it"),
        pytest.param([b"a b"], "1.1", "is not an address", id="a space in it"),
    ],
)
def test_a_request_has_one_host(hosts: list[bytes], version: str, words: str) -> None:
    refused = why_refused([(b"host", host) for host in hosts], version)

    assert isinstance(refused, InvalidHttp)
    assert words in refused.message


@pytest.mark.parametrize(
    ("hosts", "version"), [([], "1.0"), ([b""], "1.1"), ([b"[::1]:80"], "1.1"), ([b"gateway"], "1.0")]
)
def test_a_host_may_be_empty_and_in_http_1_0_missing(hosts: list[bytes], version: str) -> None:
    assert why_refused([(b"host", host) for host in hosts], version) is None


def test_a_head_is_written_again_without_its_offer() -> None:
    headers = [HOST, (b"upgrade", b"h2c"), (b"x-a", b"b")]

    head = without_offer(b"POST", b"/v1/models", "1.1", headers)

    assert head == b"POST /v1/models HTTP/1.1\r\nhost: gateway\r\nx-declined-upgrade: h2c\r\nx-a: b\r\n\r\n"


def latin(text: str) -> str:
    """Return a header with these bytes of UTF-8, as the framework decodes it."""
    return text.encode().decode("latin-1")


def basic(credentials: bytes) -> str:
    return f"Basic {base64.b64encode(credentials).decode()}"


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        pytest.param({"authorization": "Bearer  a "}, "a", id="bearer"),
        pytest.param({"authorization": "bEARER a"}, "a", id="bearer in any case"),
        pytest.param({"authorization": "a"}, "a", id="one word"),
        pytest.param({"x-api-key": "a", "api-key": "b"}, "a", id="x-api-key"),
        pytest.param({"api-key": " a "}, "a", id="api-key"),
        pytest.param({"authorization": basic(b"user:a")}, "a", id="password"),
        pytest.param({"authorization": basic(b"a:")}, "a", id="user without a password"),
        pytest.param({"authorization": basic(b":a\r\n")}, "a", id="password that `echo` wrote"),
        pytest.param({"authorization": basic(b"user:a:b")}, "a:b", id="password with a colon"),
        pytest.param({"authorization": "Bearer a", "x-api-key": "b"}, "a", id="the first of several"),
        pytest.param({"authorization": 'Bearer ""', "x-api-key": "b"}, "b", id="the first that is not empty"),
        pytest.param({"authorization": "Basic !", "api-key": "b"}, "b", id="base64 that is not valid"),
        pytest.param(
            {"authorization": latin("Bearer déjà")}, "déjà", id="a letter whose last byte is a blank in Latin-1"
        ),
        pytest.param({"authorization": "Bearer clé"}, "clé", id="a letter in Latin-1"),
        pytest.param({"x-api-key": latin("\tvoilà ")}, "voilà", id="such a letter, and blanks"),
        pytest.param(
            {"authorization": basic("user:déjà".encode())}, "déjà", id="such a letter at the end of a password"
        ),
    ],
)
def test_a_key_may_come_in_several_headers(headers: dict[str, str], key: str) -> None:
    assert sent_key(Headers(headers)) == hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", 'Bearer ""', "Basic", "Basic !", basic(b":"), "Digest a"])
def test_an_empty_key_is_not_a_key(sent: str) -> None:
    assert sent_key(Headers({"authorization": sent})) is None
