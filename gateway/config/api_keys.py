"""The file of API keys: the clients of the gateway, their models, and their quotas per minute.

It holds only hashes, so reading it gives no usable key. A plain SHA-256 is enough, because keys are 256 random bits
(``gateway key`` makes them), which cannot be guessed like passwords.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from gateway.config.fields import Distinct, DistinctListed, Frozen, Name, NonEmptyText, Positive, Sha256, Time, Version
from gateway.config.files import one_writer, style_of, write_whole
from gateway.config.problems import field_problems
from gateway.config.wording import describe, did_you_mean, explain, quote
from gateway.config.yaml_source import (
    MAX_FILE_BYTES,
    Document,
    FileKind,
    KeyPath,
    compose,
    read_document,
    read_text,
)
from gateway.errors import ConfigError, Problem, StartError

# Enough for a file of a megabyte: about 8,000 clients with their own limits and models.
_KEY_FILE = FileKind("`version: 1` and `keys:`", "GATEWAY_API_KEYS_FILE or --file names it", max_values=100_000)
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # text in YAML without quotes, except for a few words


class KeyEntry(Frozen):
    """One client, with its keys."""

    name: Name = Field(description="Name of the client in logs and metrics; quotas are counted per name.")
    sha256: DistinctListed[Sha256] = Field(
        description="SHA-256 of the key in hex, or a list of several that are all valid, so that a key can be replaced "
        "without interruption."
    )
    models: DistinctListed[NonEmptyText] | None = Field(
        default=None,
        description="Names that the client may send as `model`. The id of a model allows all of its names; an alias or an "
        "experiment allows only that name. A client sees only names that it may use. Left out: all.",
    )
    requests_per_minute: Positive | None = Field(default=None, description="Requests per minute; 429 beyond.")
    tokens_per_minute: Positive | None = Field(
        default=None, description="Tokens per minute, as counted by the models; 429 beyond."
    )
    expires: Time | None = Field(
        default=None, description="Time at which the keys expire: a time, or a date (its start)."
    )

    @field_validator("sha256", mode="before")
    @classmethod
    def _wrap_one(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)


class KeyFile(Frozen):
    """The whole file."""

    version: Version = Field(description="Version of the file's format: `1`.")
    keys: Distinct[KeyEntry] = Field(description="The clients. With an empty list, no client gets in.")


def load_key_file(path: Path, environ: Mapping[str, str], text: str | None = None) -> KeyFile:
    """Read and check a file of API keys.

    Args:
        environ: the variables for ``${NAME}`` in the file's values.
        text: new content of the file, which is checked before it is written.

    Raises:
        ConfigError: the file cannot be read or is wrong; the error lists every problem.
    """
    document = read_document(path, environ, _KEY_FILE, text)
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
    """List the keys that name unknown models.

    Args:
        names: all ids, aliases and experiments of the registry.
    """
    known = set(names)
    return [
        f"key {entry.name}: the model {quote(name)} does not exist{did_you_mean(name, known)}"
        for entry in keys.keys
        for name in entry.models or ()
        if name not in known
    ]


# ------------------------------------------------------------------------------------------------------- add a key


def make_entry(**options: object) -> KeyEntry:
    """Return an entry for command-line options; ``None`` omits a field.

    Raises:
        ConfigError: an option is not valid in the file.
    """
    try:
        entry = KeyEntry.model_validate({name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [(str(detail["loc"][0]), explain(detail, KeyEntry.model_fields)) for detail in details]
        raise ConfigError(
            [
                Problem("command line", 0, 0, "NAME" if field == "name" else f"--{field.replace('_', '-')}", message)
                for field, message in problems
            ]
        ) from error
    # In a file, an expired key is valid, because its entry may stay there.
    if entry.expires is not None and entry.expires <= datetime.now(UTC):
        raise ConfigError(
            [Problem("command line", 0, 0, "--expires", f"must be in the future, got {quote(str(options['expires']))}")]
        )
    return entry


def entry_lines(entry: KeyEntry, indent: str = "  ") -> str:
    """Return an entry as YAML: an item of a list, with one line per field."""
    lines = [f"{key}: {value}\n" for key, value in _entry_yaml(entry).items()]
    return "".join(f"{indent}{'  ' if number else '- '}{line}" for number, line in enumerate(lines))


def add_key(path: Path, entry: KeyEntry, environ: Mapping[str, str]) -> None:
    """Add an entry to a file of API keys, or create the file; the rest, comments included, does not change.

    Raises:
        ConfigError: the existing file cannot be read, or is wrong.
        StartError: the name is taken, the entry cannot be inserted, or the file cannot be written.
    """
    try:
        with one_writer(path):
            if not path.exists() or (path.is_file() and path.stat().st_size == 0):
                write_whole(path, f"version: 1\n\nkeys:\n{entry_lines(entry)}", 0o600)
                return
            before = load_key_file(path, environ)
            if entry.name.casefold() in {other.name.casefold() for other in before.keys}:
                raise StartError(f"{path}: the name {quote(entry.name)} is taken; choose another, or remove its entry")
            style = style_of(path, MAX_FILE_BYTES)
            text = _extended(read_text(path, _KEY_FILE), path, entry, style.line_break)
            if text is None or not _holds(path, environ, text, (*before.keys, entry)):
                raise StartError(f"{path}: its `keys` are not a plain list; add by hand:\n{entry_lines(entry)}")
            write_whole(path, style.dress(text))
    except OSError as error:
        raise StartError(f"{path}: cannot be written: {error.strerror}") from error


def _holds(path: Path, environ: Mapping[str, str], text: str, entries: tuple[KeyEntry, ...]) -> bool:
    try:
        return load_key_file(path, environ, text).keys == entries
    except ConfigError:
        return False


def _entry_yaml(entry: KeyEntry) -> dict[str, str]:
    is_plain = _PLAIN_NAME.fullmatch(entry.name) and entry.name.lower() not in {"true", "false", "null"}
    values = {"name": entry.name if is_plain else json.dumps(entry.name), "sha256": f'"{entry.sha256[0]}"'}
    if entry.models is not None:
        values["models"] = json.dumps(entry.models)
    for limit in ("requests_per_minute", "tokens_per_minute"):
        if (value := getattr(entry, limit)) is not None:
            values[limit] = str(value)
    if entry.expires is not None:
        values["expires"] = f'"{entry.expires.isoformat()}"'
    return values


def _extended(text: str, path: Path, entry: KeyEntry, line_break: str) -> str | None:
    """Return the text of a file of keys with one more entry; ``None`` if its keys have another form, such as an alias."""
    _yaml, root = compose(text, str(path), _KEY_FILE)
    keys = _value_of(root, "keys")
    if not isinstance(keys, SequenceNode):
        return None
    if keys.flow_style:
        item = ", ".join(f"{key}: {value}" for key, value in _entry_yaml(entry).items())
        end = keys.end_mark.index - 1  # before the bracket
        before = text[:end].rstrip().removesuffix(",")
        return f"{before}{', ' if keys.value else ''}{{{item}}}{text[end:]}"
    end = _end_of_block(text, keys)
    lines = entry_lines(entry, " " * keys.start_mark.column).replace("\n", line_break)
    return text[:end] + ("" if text[:end].endswith("\n") else line_break) + lines + text[end:]


def _value_of(root: Node, name: str) -> Node | None:
    pairs = root.value if isinstance(root, MappingNode) else ()
    return next((value for key, value in pairs if key.value == name), None)


def _end_of_block(text: str, keys: SequenceNode) -> int:
    """Return the end of a block of keys: after its last line that is not a comment, line break included."""
    lines = text[: keys.end_mark.index].splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return sum(map(len, lines))


def _fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    return KeyEntry.model_fields if path[0] == "keys" and len(path) > 2 else KeyFile.model_fields


def _repeated(keys: KeyFile, document: Document) -> list[Problem]:
    """Find names and hashes that appear twice in the file."""
    problems = []
    seen: set[str] = set()
    for index, entry in enumerate(keys.keys):
        for key, values in (("name", (entry.name.casefold(),)), ("sha256", entry.sha256)):
            for value in values:
                if value in seen:
                    problems.append(document.value_problem(("keys", index, key), f"{quote(value)} appears twice"))
                seen.add(value)
    return problems
