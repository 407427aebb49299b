"""Read the heads of requests that the parser has accepted: target, faults, key and priority."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

from starlette.datastructures import Headers

from gateway.config.wording import cut
from gateway.errors import BadInput, InvalidHttp, RequestError, UnsupportedTransferCoding
from gateway.types import Priority

_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
PRIORITY_HEADER = "x-gateway-priority"
"""The header with the priority of a request."""

# The values that clients send for an empty key.
_NO_KEY = ("", '""')
# The blanks of HTTP, and the line end that `echo` adds to the credentials of Basic. Of the blanks of Unicode, some are the
# last byte of a letter in UTF-8, such as that of "à".
_BLANKS = " \t\r\n"
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


def path_of(target: bytes) -> bytes:
    """Return a request's target as a path, without the address that may precede it (RFC 9112, 3.2)."""
    if target.startswith(b"/"):
        return target
    path = _ABSOLUTE_FORM.sub(b"", target, count=1)
    return path if path.startswith(b"/") else b"/" + path if path.startswith((b"?", b"#")) or path == b"*" else b"/"


def why_refused(headers: list[tuple[bytes, bytes]], version: str) -> RequestError | None:
    """Return the fault of a head that the parser has accepted, if it has one (RFC 9112, 3.2 and 6.1)."""
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
    """Return the bytes of a head without its offer of another protocol."""
    start = b"%s %s HTTP/%s\r\n" % (method, target, version.encode())
    lines = [b"%s: %s\r\n" % (b"x-declined-upgrade" if name == b"upgrade" else name, value) for name, value in headers]
    return b"".join((start, *lines, b"\r\n"))


def address_of(client: tuple[str, int] | None) -> str:
    """Return a client's address for logs and quotas; that of IPv4 has one form, also on a socket for both versions of IP."""
    host = client[0] if client else "unknown"
    return host.removeprefix("::ffff:") if "." in host else host


def sent_key(headers: Headers) -> str | None:
    """Return the hex sha256 of the key that a request carries, if it has one.

    The key is the first of these: the text after `Bearer`; all of `Authorization` if that is one word; `x-api-key`
    (Anthropic's, and many proxies'); `api-key` (Azure's); the password or, without one, the user of `Basic`.
    """
    scheme, _, credentials = headers.get("authorization", "").strip(_BLANKS).partition(" ")
    scheme_name = scheme.lower()
    is_bare = not credentials and scheme_name not in ("bearer", "basic")
    candidates = (
        credentials if scheme_name == "bearer" else scheme if is_bare else "",
        headers.get("x-api-key", ""),
        headers.get("api-key", ""),
        _basic_key(credentials) if scheme_name == "basic" else "",
    )
    key = next((key for candidate in candidates if (key := candidate.strip(_BLANKS)) not in _NO_KEY), None)
    return None if key is None else hashlib.sha256(_in_utf8(key)).hexdigest()


def _in_utf8(key: str) -> bytes:
    """Return the UTF-8 of a key, whose bytes the framework has decoded as Latin-1."""
    content = key.encode("latin-1")
    try:
        content.decode()
    except UnicodeDecodeError:
        return key.encode()  # Python's requests and browsers send Latin-1
    return content


def sent_priority(headers: Headers) -> Priority:
    """Return the priority that a request asks for.

    Raises:
        BadInput: there is no such priority.
    """
    sent = headers.get(PRIORITY_HEADER, "").strip().lower() or Priority.NORMAL
    try:
        return Priority(sent)
    except ValueError:
        known = " or ".join(f"`{priority}`" for priority in Priority)
        raise BadInput(f"`{PRIORITY_HEADER}` must be {known}, got {cut(sent)}", param=PRIORITY_HEADER) from None


def _basic_key(credentials: str) -> str:
    try:
        user, _, password = base64.b64decode(credentials.strip(), validate=True).decode("latin-1").partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password or user
