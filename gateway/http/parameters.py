"""Read the parameters of a header and of a query, even if they are malformed."""

from __future__ import annotations

from email.message import Message
from typing import Final
from urllib.parse import parse_qsl

from gateway.errors import BadInput

# The library takes 20 ms for 60 KB.
_MAX_CHARACTERS: Final = 8 * 1024
# The charsets of RFC 8187, section 3.2.1, and their subset ASCII. Python's others include slow and partial ones.
_CHARSETS: Final = ("utf-8", "iso-8859-1", "us-ascii")


def read_parameter(header: str, name: str, max_characters: int = _MAX_CHARACTERS) -> str | None:
    """Return a parameter of a header; ``None`` if it is missing, or breaks the rules of RFC 2231.

    Args:
        header: the value of the header, such as ``text/plain; charset=utf-8``.
        name: the name of the parameter, in lower case.
        max_characters: the number of the header's characters that are read.
    """
    header = header[:max_characters]
    if name not in header.lower():  # the usual case
        return None
    message = Message()
    message["content-type"] = header
    try:
        value = message.get_param(name)
    except (TypeError, ValueError, LookupError):  # the library does not expect pieces that are numbered wrongly
        return None
    if not isinstance(value, tuple):
        return value
    charset, _language, text = value
    encoding = charset.lower() if charset and charset.lower() in _CHARSETS else "utf-8"
    return text.encode("raw-unicode-escape").decode(encoding, "replace")


def read_query(query: bytes, name: str) -> str:
    """Return the value of a parameter of a query, which is known to be there.

    The framework takes the last of several values, and a replacement character for bytes that are not UTF-8. A value that
    identifies a person would then be taken for that of others.

    Args:
        query: the part of a URL after the ``?``.

    Raises:
        BadInput: the parameter is given several times, or is not UTF-8. The message does not quote it.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="surrogateescape")
    values = [value for key, value in pairs if key == name]
    if len(values) != 1:
        raise BadInput(f"`{name}` is given {len(values)} times: send one", param=name)
    if any("\udc80" <= character <= "\udcff" for character in values[0]):
        raise BadInput(
            f"`{name}` is not UTF-8: percent-encode it, as encodeURIComponent in JavaScript or quote(…, safe='') in Python "
            "does",
            param=name,
        )
    return values[0]
