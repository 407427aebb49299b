"""The file of API keys: who may use the gateway, for which models, and how much a minute.

It holds no key, only hashes: whoever reads it can use none of them. A plain SHA-256 is enough, as keys are 256 random
bits (``gateway key`` makes them), which nobody can try out as one can passwords.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from gateway.config.fields import Distinct, DistinctListed, Name, NonEmptyText, Positive, Sha256, Time, Version
from gateway.config.model_entry import Frozen
from gateway.config.problems import field_problems
from gateway.config.wording import describe, did_you_mean, quote
from gateway.config.yaml_source import Document, KeyPath, read_document
from gateway.errors import ConfigError, Problem


class KeyEntry(Frozen):
    """One client, with the keys that it may send."""

    name: Name = Field(description="What the client is called in logs and metrics; quotas are counted for it.")
    sha256: DistinctListed[Sha256] = Field(
        description="SHA-256 of the key in hex, or a list of several, of which each works: so a key is exchanged without "
        "a moment in which none does."
    )
    models: DistinctListed[NonEmptyText] | None = Field(
        default=None,
        description="Names that the client may send as `model`: ids, aliases, experiments. A model may be asked for by "
        "any of its names. Left out: all.",
    )
    requests_per_minute: Positive | None = Field(default=None, description="Requests a minute; 429 beyond.")
    tokens_per_minute: Positive | None = Field(
        default=None, description="Tokens a minute, as the models count them; 429 beyond."
    )
    expires: Time | None = Field(default=None, description="When the keys stop working: a time, or a date (its start).")

    @field_validator("sha256", mode="before")
    @classmethod
    def _wrap_one(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)


class KeyFile(Frozen):
    """All of the file."""

    version: Version = Field(description="Version of the file's format: `1`.")
    keys: Distinct[KeyEntry] = Field(description="The clients. An empty list lets nobody in.")


def load_key_file(path: Path, environ: Mapping[str, str]) -> KeyFile:
    """Read and check a file of API keys.

    Args:
        environ: what ``${NAME}`` in its values stands for.

    Raises:
        ConfigError: the file cannot be read, or holds anything that is not right; lists every problem.
    """
    document = read_document(path, environ)
    if not isinstance(document.root, dict):
        message = f"the file must be a mapping with `version` and `keys`, got {describe(document.root)}"
        raise ConfigError([document.value_problem((), message)])
    problems = document.problems
    keys = None
    try:
        keys = KeyFile.model_validate(document.root)
        problems += _repeated(keys, document)
    except ValidationError as error:
        problems += field_problems(error, document, _fields_at)
    if keys is None or problems:
        raise ConfigError(problems)
    return keys


def unknown_models(keys: KeyFile, names: Iterable[str]) -> list[str]:
    """Say which models the keys are for that there are not.

    Args:
        names: every id, alias and experiment of the registry.
    """
    known = set(names)
    return [
        f"key {entry.name}: there is no model {quote(name)}{did_you_mean(name, known)}"
        for entry in keys.keys
        for name in entry.models or ()
        if name not in known
    ]


def _fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    return KeyEntry.model_fields if path[0] == "keys" and len(path) > 2 else KeyFile.model_fields


def _repeated(keys: KeyFile, document: Document) -> list[Problem]:
    """Find names and hashes that stand in the file twice."""
    problems = []
    seen: set[str] = set()
    for index, entry in enumerate(keys.keys):
        for key, values in (("name", (entry.name.casefold(),)), ("sha256", entry.sha256)):
            for value in values:
                if value in seen:
                    problems.append(document.value_problem(("keys", index, key), f"{quote(value)} is there twice"))
                seen.add(value)
    return problems
