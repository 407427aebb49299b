"""Sources and sinks by their URLs.

::

    qdrant://host:6333/collection            a server; qdrant+https:// by TLS
    qdrant:///data/qdrant#collection         a folder: the part after # is the collection
    qdrant:./qdrant#collection               a folder, relative to the working directory
    milvus://host:19530/collection           milvus:./milvus.db#collection is Milvus Lite
    pgvector://user@host:5432/database/table
    lancedb:./lance#table                    also lancedb:s3://bucket/folder#table
    chroma://host:8000/collection            chroma:./chroma#collection

A key or password comes from the environment: from the variable that the store's own tools read, or from the variable
named by ``?key_env=NAME``. A URL with a password is rejected, because others can read commands and manifests.
Everything without such a scheme is a file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from gateway.bulk.files.paths import expanded
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import MovableStore, Place, Store
from gateway.config.wording import did_you_mean, enumerate_names, quote


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of store.

    Attributes:
        package: the package that its module imports. The extra that installs it has the same name as the kind.
        example: an example of its URL, for messages.
        key: the environment variable with its key or password, unless the URL names another variable.
        port: the default port of its server; 0 for a store without a server.
        collection: the store's own word for a collection.
        has_folder: the store can be a folder or file on this machine.
        has_users: its server has named users.
        options: the options in a URL's query, besides ``key_env``.
    """

    package: str
    example: str
    key: str = ""
    port: int = 0
    collection: str = "collection"
    has_folder: bool = True
    has_users: bool = False
    options: tuple[str, ...] = ()


_KINDS: Final[Mapping[str, _Kind]] = {
    "qdrant": _Kind(
        "qdrant_client", "qdrant://localhost:6333/docs", "QDRANT_API_KEY", port=6333, options=("vector",)
    ),
    "milvus": _Kind(
        "pymilvus", "milvus://localhost:19530/docs", "MILVUS_TOKEN", port=19530, has_users=True, options=("vector",)
    ),
    "pgvector": _Kind(
        "psycopg", "pgvector://me@localhost:5432/shop/docs", "PGPASSWORD", port=5432, collection="table",
        has_folder=False, has_users=True, options=("vector", "id", "sslmode"),
    ),
    "lancedb": _Kind("lancedb", "lancedb:./lance#docs", collection="table"),
    "chroma": _Kind(
        "chromadb", "chroma://localhost:8000/docs", "CHROMA_AUTH_TOKEN", port=8000, options=("tenant", "database")
    ),
}  # fmt: skip
_OTHER_NAMES: Final = {"postgresql": "pgvector", "postgres": "pgvector", "lance": "lancedb", "chromadb": "chroma"}
_FILE_SCHEMES: Final = {"file", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}
"""Read by fsspec."""


class _StoreModule(Protocol):
    def open_store(self, place: Place) -> Store:
        """Open the store of a place."""


def read_place(url: str, *, has_collection: bool = True) -> Place | None:
    """Return the parts of a store's URL; ``None`` for a file, folder or pattern.

    Args:
        has_collection: the URL must end in a collection; otherwise it must name only a store.

    Raises:
        BulkError: the scheme is unknown, or a part is missing or wrong. The message never contains a password.
    """
    scheme, colon, rest = url.partition(":")
    written, plus, transport = scheme.lower().partition("+")
    name = _OTHER_NAMES.get(written, written)
    kind = _KINDS.get(name)
    if not colon or "/" in scheme:
        return None
    if kind is None:
        is_file = name in _FILE_SCHEMES or not (rest.startswith("//") or _is_misspelled(url, written))
        if is_file:
            return None
        raise BulkError(_unknown_scheme(written))
    if plus and (transport not in ("http", "https") or not kind.port):
        secure = f" or {quote(f'{name}+https')}" if kind.port else ""
        raise BulkError(f"{quote(scheme)} is not a scheme; write {quote(name)}{secure}")
    base, _, collection = rest.partition("#")
    if "?" in collection:
        # The query belongs before the fragment, but people write it at the end.
        collection, _, query = collection.partition("?")
        base = f"{base}?{query}"
    location, _, query = base.partition("?")
    options = _options(query, name, kind)
    key = options.pop("key_env", kind.key or None)
    place = Place(kind=name, key=key, options=options, collection=unquote(collection))
    if not kind.port or not location.startswith("//") or location[2:3] in ("", "/", ".", "~"):
        place = replace(place, location=_folder(location, name, kind))
        if key != (kind.key or None):
            raise BulkError(f"a folder of {name} needs no key: leave out {quote(f'key_env={key}')}")
    else:
        place = _on_server(place, kind, location, transport == "https", has_collection and not collection)
    if has_collection and not place.collection:
        example = kind.example if place.host else f"{name}:./folder#docs"
        raise BulkError(f"the URL of {name} must end in a {kind.collection}, such as {quote(example)}")
    return place


def _folder(location: str, name: str, kind: _Kind) -> str:
    path = unquote(location.removeprefix("//"))
    if not kind.has_folder:
        raise BulkError(f"{name} needs a server: write it like {quote(kind.example)}")
    if not path:
        raise BulkError(f"the URL of {name} has neither a host nor a folder; an example is {quote(kind.example)}")
    return str(expanded(path)) if path.startswith("~") else path


def _on_server(place: Place, kind: _Kind, location: str, is_secure: bool, takes_last: bool) -> Place:
    """Return a place on a server.

    Args:
        takes_last: take the last part of the path as the collection.
    """
    try:
        parts = urlsplit(location)
        host, port, user = parts.hostname or "", parts.port or kind.port, unquote(parts.username or "")
    except ValueError:
        # The error's text may quote a part of the URL, and with it a part of a password.
        raise BulkError(
            f"the URL of {place.kind} has a malformed host or port; an example is {quote(kind.example)}"
        ) from None
    if parts.password is not None or (user and not kind.has_users):
        raise BulkError(
            f"the URL of {place.kind} contains a key or password, which others could read: put it into the "
            f"environment variable {kind.key}, or into another variable that the URL names with ?key_env=NAME"
        )
    path = unquote(parts.path).strip("/")
    collection = place.collection
    if takes_last:
        path, _, collection = path.rpartition("/")
    return replace(place, host=host, port=port, user=user, path=path, is_secure=is_secure, collection=collection)


def _options(query: str, name: str, kind: _Kind) -> dict[str, str]:
    """Return the settings in a URL's query."""
    written = parse_qsl(query, keep_blank_values=True)
    options = dict(written)
    known = (*(["key_env"] if kind.key else []), *kind.options)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or ";"
            raise BulkError(f"{name} has no option {quote(option)}{hint} its options are {enumerate_names(known)}")
        if [key for key, _value in written].count(option) > 1:
            raise BulkError(f"the URL of {name} has the option {quote(option)} twice")
    return options


def _is_misspelled(url: str, scheme: str) -> bool:
    """Return whether this is not a file but a store in a folder with a misspelled kind: ``qdant:./folder#docs``."""
    return "#" in url and bool(did_you_mean(scheme, [*_KINDS, *_OTHER_NAMES])) and not Path(url).exists()


def _unknown_scheme(scheme: str) -> str:
    if scheme in ("http", "https"):
        known = enumerate_names(_KINDS)
        return f"{quote(f'{scheme}://')} does not name the kind of store: write one of {known} instead"
    hint = did_you_mean(scheme, [*_KINDS, *_OTHER_NAMES]) or ";"
    return f"no store has the scheme {quote(scheme)}{hint} the stores are {enumerate_names(_KINDS)}"


def open_store(place: Place) -> Store:
    """Open a store.

    Raises:
        BulkError: its package is not installed, or the store cannot be opened.
    """
    kind = _KINDS[place.kind]
    try:
        importlib.import_module(kind.package)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != kind.package:
            raise BulkError(
                f"{place.kind} cannot be used: its package {kind.package} fails to import: {error}"
            ) from error
        raise BulkError(
            f'{place.kind} needs a package that is not installed: pip install "embedding-gateway[{place.kind}]", '
            "or in a checkout: make install EXTRAS=stores"
        ) from error
    module = cast(_StoreModule, importlib.import_module(f"gateway.bulk.stores.{place.kind}"))
    return module.open_store(place)


def open_movable(place: Place) -> MovableStore:
    """Open a store whose collections can move to another model.

    Raises:
        BulkError: `gateway move` does not support this store, or `open_store` fails.
    """
    store = open_store(place)
    if not hasattr(store, "flip"):
        store.close()
        raise BulkError(f"`gateway move` does not support {place.kind}; it supports qdrant, milvus and pgvector")
    return cast(MovableStore, store)
