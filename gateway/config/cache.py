"""The cache of a model: an entry's ``cache`` in ``models.yaml``. Off unless an entry turns it on."""

from __future__ import annotations

import re
from fractions import Fraction
from importlib.util import find_spec
from typing import Annotated, Final, TypeAlias

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator, model_validator

from gateway.config.fields import Frozen, NonEmptyText, resolve
from gateway.config.upstream import PositiveSeconds
from gateway.config.wording import describe

_UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_LEAST_BYTES: Final = 2**20
_MOST_BYTES: Final = 2**53
_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")


def _read_size(value: object) -> object:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", value) if isinstance(value, str) else None
    if match is not None and match[2] in _UNITS:
        value = int(Fraction(match[1]) * _UNITS[match[2]])
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be a size such as `1GiB` or `500MB`, got {describe(value)}")
    if value < _LEAST_BYTES:
        raise ValueError(f"must be at least `1MiB`, got {value} bytes")
    if value > _MOST_BYTES:
        raise ValueError("must be at most `8192TiB`")
    return value


def _read_redis(value: object) -> object:
    if not isinstance(value, str) or not value.startswith(_REDIS_SCHEMES):  # not shown, because it may hold a password
        raise ValueError("must begin with `redis://`, `rediss://` or `unix://`")
    if find_spec("redis") is None:
        raise ValueError("needs the package redis: pip install 'embedding-gateway[redis]'")
    return SecretStr(value)


Size: TypeAlias = Annotated[int, BeforeValidator(_read_size)]
RedisUrl: TypeAlias = Annotated[SecretStr, BeforeValidator(_read_redis)]


class CacheConfig(Frozen):
    """Vectors that are kept for the next request with the same text."""

    max_bytes: Size = Field(
        default=256 * 2**20,
        description="Maximum memory for vectors, such as `1GiB`; the least recently used go first. Vectors of 384 "
        "dimensions take 1.8 kB per text, of 1,024 dimensions 4.4 kB.",
    )
    disk: NonEmptyText | None = Field(
        default=None,
        description="Folder that keeps vectors too, relative to this file, also after a restart. Each "
        "process needs its own.",
    )
    disk_bytes: Size = Field(
        default=10 * 2**30, description="Maximum number of bytes of this model's vectors in `disk`."
    )
    redis: RedisUrl | None = Field(
        default=None,
        description="Redis that keeps vectors too, and shares them between replicas: `redis://HOST:PORT/DB`. With a "
        "password, keep it out of the file: `${CACHE_REDIS_URL}`.",
    )
    redis_ttl_s: PositiveSeconds = Field(default=7 * 86_400.0, description="Seconds after which vectors leave Redis.")
    per_client: bool = Field(
        default=False,
        description="Whether a client gets only vectors that were computed for it. Otherwise it can see from the time, "
        "and from `x-gateway-cache`, that a text was embedded before.",
    )

    @property
    def is_lasting(self) -> bool:
        """Whether vectors are kept beyond the end of the process."""
        return self.disk is not None or self.redis is not None

    @field_validator("disk")
    @classmethod
    def _resolve_folder(cls, text: str | None, info: ValidationInfo) -> str | None:
        return None if text is None else resolve(text, info, "folder")

    @model_validator(mode="after")
    def _check_places(self) -> CacheConfig:
        if self.disk is not None and self.redis is not None:
            raise ValueError("`disk` and `redis` are two places for the same vectors: set only one of them")
        return self
