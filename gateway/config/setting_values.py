"""Check settings that are lists, addresses, paths or secrets. Each error says which values are accepted."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from pydantic import SecretStr

from gateway.config.wording import quote

_LEAST_KEY: Final = 8
PREFIX: Final = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*", re.ASCII)
"""The path under which a proxy serves the gateway; empty for none. Clients resolve `.` and `..` before they send a path."""

_ORIGIN = re.compile(r"https?://[^/\s]+")
_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


def split_keys(value: object) -> object:
    """Split comma-separated keys; no message may show a key."""
    if not isinstance(value, str):
        return value
    keys = tuple(key.strip() for key in value.split(","))
    if not all(keys):
        raise ValueError("has an empty key before, between or after its commas; leave it unset to turn keys off")
    for number, key in enumerate(keys, start=1):
        if len(key) < _LEAST_KEY:
            raise ValueError(f"key {number} must have at least {_LEAST_KEY} characters, got {len(key)}")
    return keys


def split_origins(value: object) -> object:
    if not isinstance(value, str):
        return value
    origins = tuple(origin.strip().rstrip("/") for origin in value.split(","))
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"must be origins such as `https://app.example.com`, or `*`, got {quote(origin)}")
    return origins


def split_networks(value: object) -> object:
    if not isinstance(value, str):
        return value
    networks = tuple(network.strip() for network in value.split(","))
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(f"must be addresses or networks such as `10.0.0.0/8`, got {quote(network)}") from None
    return networks


def check_prefix(prefix: str) -> str:
    prefix = prefix.rstrip("/")
    if not PREFIX.fullmatch(prefix):
        raise ValueError(f"must be a path such as `/embeddings-gateway`, got {quote(prefix)}")
    return prefix


def check_cluster(text: str) -> str:
    if text.lower() in {"local", "auto"}:
        return text.lower()
    if text.startswith("ray://"):
        raise ValueError(
            "must not be a Ray client's address (`ray://`): run this gateway on a machine of the cluster, and set `auto`"
        )
    if not _ADDRESS.fullmatch(text):
        raise ValueError(f"must be `local`, `auto` or the HOST:PORT of a Ray cluster's head, got {quote(text)}")
    return text


def check_admin_key(key: SecretStr) -> SecretStr:
    if len(key.get_secret_value()) < _LEAST_KEY:
        raise ValueError(f"must have at least {_LEAST_KEY} characters, got {len(key.get_secret_value())}")
    return key


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def lower_off(value: object) -> object:
    """Read `off` in any case; any other text is a path."""
    return "off" if isinstance(value, str) and value.lower() == "off" else value


def with_mapped(networks: Sequence[str]) -> list[str]:
    """Return networks, and those of IPv4 also as a socket for both versions of IP reports them: ``::ffff:10.0.0.0/104``."""
    parsed = (ipaddress.ip_network(network) for network in networks)
    mapped = (f"::ffff:{one.network_address}/{96 + one.prefixlen}" for one in parsed if one.version == 4)
    return [*networks, *mapped]
