"""Open the cache that a model's entry in ``models.yaml`` describes."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.cache.model_cache import ModelCache
from gateway.cache.stores import PATIENCE_S, Guarded, Store
from gateway.config.cache import CacheConfig


def open_cache(model: str, config: CacheConfig, *, is_remote: bool) -> ModelCache:
    """Return the cache of a model, which reads and connects nothing before the first request."""
    store = _store(model, config)
    return ModelCache(
        model,
        config.max_bytes,
        None if store is None else Guarded(model, store),
        is_remote=is_remote,
        is_per_client=config.per_client,
    )


def _store(model: str, config: CacheConfig) -> Store | None:
    if config.redis is not None:
        from gateway.cache.redis_store import RedisStore

        return RedisStore(config.redis.get_secret_value(), config.redis_ttl_s, PATIENCE_S)
    if config.disk is not None:
        from gateway.cache.disk_store import DiskStore

        return DiskStore(Path(config.disk) / folder_of(model), config.disk_bytes)
    return None


def folder_of(model: str) -> str:
    """Return the name of a model's folder, which no other model has: ``org--name`` for ``org/name``."""
    return re.sub("-(?=[-/])", "%2d", model).replace("/", "--")
