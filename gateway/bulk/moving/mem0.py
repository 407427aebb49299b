"""Mem0's own configuration: the store and the collections to move, and the settings to change at the flip."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import MEM0_KEY, Place
from gateway.config.files import write_whole
from gateway.config.wording import enumerate_names

TEXT_FIELDS: Final = {"qdrant": "data", "milvus": "metadata.data", "pgvector": "data"}
"""The path of the text of a memory, by store."""
CHANGED_AT: Final = {"qdrant": "updated_at", "milvus": "metadata.updated_at"}
"""The path of the time of a memory's last change. PostgreSQL has an order of changes itself."""
_VECTORS: Final = {"qdrant": None, "milvus": "vectors", "pgvector": "vector"}
_JSON: Final = ".json"
_DEFAULT_COLLECTION: Final = "mem0"
_ANY_KEY: Final = "any"
"""The key for a gateway without keys: OpenAI's client needs one."""
_PATIENCE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Mem0:
    """The parts of a configuration that a move needs.

    Attributes:
        collection: the collection of the memories.
        entities: the collection of Mem0's entities, which may not exist.
        vector: the name of the vector, in stores that can have several.
        model: the embedding model of the old vectors, as the configuration names it.
        changed_at: the path of the time of a memory's last change. Entities have none.
    """

    path: Path
    place: Place
    collection: str
    text: str
    vector: str | None
    model: str | None
    changed_at: str | None

    @property
    def entities(self) -> str:
        """The name that Mem0 gives the collection of entities."""
        return f"{self.collection}_entities"


def read_mem0(path: Path) -> Mem0:
    """Read a configuration in YAML or JSON.

    Raises:
        BulkError: the file cannot be read, or `gateway move` does not support its store.
    """
    content = _load(path)
    store = _section(content, "vector_store", path)
    provider = str(store.get("provider") or "qdrant")
    if provider not in TEXT_FIELDS:
        raise BulkError(
            f"{path}: vector_store.provider is {provider!r}; `gateway move` knows Mem0's collections in "
            f"{enumerate_names(TEXT_FIELDS)}"
        )
    settings = _section(store, "config", path)
    readers = {"qdrant": _qdrant, "milvus": _milvus, "pgvector": _pgvector}
    embedder = _section(_section(content, "embedder", path), "config", path)
    model = embedder.get("model")
    return Mem0(
        path=path,
        place=readers[provider](settings, path),
        collection=str(settings.get("collection_name") or _DEFAULT_COLLECTION),
        text=TEXT_FIELDS[provider],
        vector=_VECTORS[provider],
        model=None if model is None else str(model),
        changed_at=CHANGED_AT.get(provider),
    )


def _section(content: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = content.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise BulkError(f"{path}: {name} must be a mapping of settings, got {type(section).__name__}")
    return section


def _load(path: Path) -> Any:  # the type that ruamel.yaml uses
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == _JSON else _yaml().load(text)
    except OSError as error:
        raise BulkError(f"{path}: cannot be read: {error.strerror}") from error
    except (YAMLError, ValueError) as error:
        raise BulkError(f"{path}: is neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise BulkError(f"{path}: is not a Mem0 configuration: it must have vector_store and embedder")
    return content


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _keep(secret: object) -> str | None:
    if not secret:
        return None
    os.environ[MEM0_KEY] = str(secret)
    return MEM0_KEY


def _qdrant(settings: Mapping[str, Any], path: Path) -> Place:
    key = _keep(settings.get("api_key"))
    if url := settings.get("url"):
        parts = urlsplit(str(url))
        is_secure = parts.scheme == "https" or bool(settings.get("https"))
        if not parts.hostname:
            raise BulkError(f"{path}: vector_store.config.url must be an address such as http://localhost:6333")
        return Place(
            "qdrant",
            host=parts.hostname,
            port=parts.port or 6333,
            path=parts.path.strip("/"),
            is_secure=is_secure,
            key=key,
        )
    if host := settings.get("host"):
        return Place(
            "qdrant",
            host=str(host),
            port=int(settings.get("port") or 6333),
            is_secure=bool(settings.get("https")),
            key=key,
        )
    return Place("qdrant", location=str(settings.get("path") or "/tmp/qdrant"))  # noqa: S108  Mem0's default


def _milvus(settings: Mapping[str, Any], path: Path) -> Place:
    url = str(settings.get("url") or "http://localhost:19530")
    if "://" not in url:
        return Place("milvus", location=url)
    parts = urlsplit(url)
    if not parts.hostname:
        raise BulkError(f"{path}: vector_store.config.url must be an address such as http://localhost:19530")
    user, _, password = str(settings.get("token") or "").rpartition(":")
    return Place(
        "milvus",
        host=parts.hostname,
        port=parts.port or 19530,
        user=user,
        path=str(settings.get("db_name") or ""),
        is_secure=parts.scheme == "https",
        key=_keep(password),
    )


def _pgvector(settings: Mapping[str, Any], path: Path) -> Place:
    if text := settings.get("connection_string"):
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict

        try:
            parts: Mapping[str, Any] = conninfo_to_dict(str(text))
        except ProgrammingError as error:
            raise BulkError(f"{path}: vector_store.config.connection_string is malformed") from error
    else:
        parts = {**settings, "dbname": settings.get("dbname") or "postgres"}
    sslmode = settings.get("sslmode") or parts.get("sslmode")
    return Place(
        "pgvector",
        host=quote(str(parts.get("host") or ""), safe=""),
        port=int(parts.get("port") or 5432),
        user=str(parts.get("user") or ""),
        path=quote(str(parts.get("dbname") or ""), safe=""),
        key=_keep(parts.get("password")),
        options={"sslmode": str(sslmode)} if sslmode else {},
    )


def present_settings(path: Path) -> dict[str, Any]:
    """Return the values of the settings that `change_mem0` changes, for `restore_mem0`.

    Raises:
        BulkError: the file cannot be read.
    """
    content = _load(path)
    store = (content.get("vector_store") or {}).get("config") or {}
    embedder = content.get("embedder") or {}
    settings = embedder.get("config") or {}
    return {
        "collection_name": store.get("collection_name"),
        "embedding_model_dims": store.get("embedding_model_dims"),
        "provider": embedder.get("provider"),
        "model": settings.get("model"),
        "embedding_dims": settings.get("embedding_dims"),
        "openai_base_url": settings.get("openai_base_url"),
        "has_key": "api_key" in settings,
    }


def _made(content: Any, name: str) -> Any:  # the types that ruamel.yaml uses
    """Return a section, which is made if it is missing or empty."""
    if content.get(name) is None:
        content[name] = {}
    return content[name]


def change_mem0(path: Path, collection: str, model: str, dimensions: int, url: str | None) -> None:
    """Write a collection and a model into a configuration.

    Comments and the order of settings are kept.

    Args:
        url: the gateway's URL; ``None`` if the configuration's embedder already has it. A URL that the embedder has is
            replaced only if the server there does not have the model: programs that use Mem0 may know the gateway by
            another name, for example in a network of containers.

    Raises:
        BulkError: the file cannot be written, or has no URL of a gateway.
    """
    content = _load(path)
    store = _made(_made(content, "vector_store"), "config")
    embedder = _made(content, "embedder")
    settings = _made(embedder, "config")
    if url is None and (embedder.get("provider", "openai") != "openai" or not settings.get("openai_base_url")):
        raise BulkError(
            f"{path}: embedder does not use a gateway: pass its URL with --url, and the flip writes it into the "
            "configuration"
        )
    store["collection_name"], store["embedding_model_dims"] = collection, dimensions
    before, embedder["provider"] = embedder.get("provider", "openai"), "openai"
    settings["model"], settings["embedding_dims"] = model, dimensions
    own = settings.get("openai_base_url") if before == "openai" else None
    if url is not None and (not own or _lacks(str(own), settings.get("api_key"), model)):
        settings["openai_base_url"] = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        settings.setdefault("api_key", _ANY_KEY)
    _write(path, content)


def _lacks(base_url: str, key: object, model: str) -> bool:
    """Return whether an API answers that it does not have a model; OpenAI itself also if it rejects the key."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    address = f"{base_url.rstrip('/')}/models/{quote(model)}"
    try:
        status = httpx.get(address, headers=headers, timeout=_PATIENCE_S).status_code
    # The last two are for the proxy or the certificates that the environment names.
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError):
        return False
    return status == 404 or (status in (401, 403) and (urlsplit(base_url).hostname or "").endswith("openai.com"))


def restore_mem0(path: Path, before: Mapping[str, Any]) -> None:
    """Restore the settings of a configuration to those before `change_mem0`.

    Raises:
        BulkError: it cannot be written.
    """
    content = _load(path)
    store, embedder = content["vector_store"]["config"], content["embedder"]
    for section, name in (
        (store, "collection_name"),
        (store, "embedding_model_dims"),
        (embedder, "provider"),
        (embedder["config"], "model"),
        (embedder["config"], "embedding_dims"),
        (embedder["config"], "openai_base_url"),
    ):
        if before.get(name) is None:
            section.pop(name, None)
        else:
            section[name] = before[name]
    if not before.get("has_key", True) and embedder["config"].get("api_key") == _ANY_KEY:
        del embedder["config"]["api_key"]  # OpenAI itself would reject it, and Mem0 would not read OPENAI_API_KEY
    _write(path, content)


def _write(path: Path, content: Any) -> None:
    text = io.StringIO()
    if path.suffix == _JSON:
        text.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    else:
        _yaml().dump(content, text)
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise BulkError(f"{path}: cannot be written: {error.strerror}") from error
