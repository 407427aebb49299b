"""The heads of requests, as the parser has taken them: where they point, and what is wrong with them."""

from __future__ import annotations

import re

from gateway.errors import InvalidHttp, RequestError, UnsupportedTransferCoding

_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


def path_of(target: bytes) -> bytes:
    """Return a request's target as a path: without the address in front of it, where it has one (RFC 9112, 3.2)."""
    if target.startswith(b"/"):
        return target
    path = _ABSOLUTE_FORM.sub(b"", target, count=1)
    return path if path.startswith(b"/") else b"/" + path if path.startswith((b"?", b"#")) or path == b"*" else b"/"


def why_refused(headers: list[tuple[bytes, bytes]], version: str) -> RequestError | None:
    """Return what is wrong with a head that the parser has taken (RFC 9112, 3.2 and 6.1)."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return InvalidHttp(f"a request has exactly one `Host` header, this one has {len(hosts)}")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return InvalidHttp("the `Host` header is not an address")
    values = [value for name, value in headers if name == b"transfer-encoding"]
    codings = [coding.strip().lower() for coding in b",".join(values).split(b",") if coding.strip()]
    if codings in ([], [b"chunked"]):
        return None
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        return InvalidHttp("`Transfer-Encoding` must end with `chunked`, once")
    named = b", ".join(codings).decode("latin-1")[:100]
    return UnsupportedTransferCoding(
        f"`Transfer-Encoding: {named}` is not supported, only `chunked`; announce a compressed body by `Content-Encoding`",
        is_permanent=True,
    )


def without_offer(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Write a head once more, without its offer of another protocol."""
    start = b"%s %s HTTP/%s\r\n" % (method, target, version.encode())
    lines = [b"%s: %s\r\n" % (b"x-declined-upgrade" if name == b"upgrade" else name, value) for name, value in headers]
    return b"".join((start, *lines, b"\r\n"))
