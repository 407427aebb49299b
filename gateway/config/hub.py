"""Check the variables that huggingface_hub reads when it is imported.

The library fails on a wrong value, and then not even a model that needs no hub can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from gateway.config.wording import quote
from gateway.errors import Problem

_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_URL = "HF_ENDPOINT"


def hub_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each variable with a value that the library cannot read."""
    for name in _SECONDS:
        value = environ.get(name, "")
        try:
            int(value or "0")
        except ValueError:
            yield Problem("environment", 0, 0, name, f"must be a whole number of seconds, got {quote(value)}")
    try:
        urlsplit(environ.get(_URL, "")).port  # noqa: B018  parsed only now
    except ValueError as error:  # the value itself may hold a password
        yield Problem("environment", 0, 0, _URL, f"must be the URL of a model hub: {error}")
