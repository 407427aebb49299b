"""The models that a request can reach, read from ``models.yaml``.

The file is shaped like the classes below: a ``Registry`` holds ``ModelEntry`` and ``Alias``. Fields with
``exclude=True`` are not keys of the file; the loader sets them. The reference in ``docs/configuration.md`` is generated
from the field descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from gateway.config.fields import (
    Device,
    Distinct,
    DistinctListed,
    Enabled,
    FileName,
    Listed,
    Name,
    NonEmptyText,
    Positive,
    Sha256,
    Source,
    Version,
)
from gateway.config.wording import configurable, describe, did_you_mean, enumerate_names, explain, quote, unknown_key
from gateway.config.yaml_source import Document, KeyPath, Value, read_document
from gateway.embedding import Output
from gateway.errors import ConfigError, Problem

__all__ = ["Alias", "ModelEntry", "Registry", "Source", "load_registry"]

# ---------------------------------------------------------------------------------------------------------- models

_COMMIT = "40 lowercase hex digits such as `d18862d9a48706220815554fac3ebb4dfa46fc28`"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ModelEntry(_Frozen):
    """One model of the registry."""

    id: Name = Field(
        description="The public name of the model, which clients send as `model`. Letters, digits and `._-/`; unique, "
        "whatever the case."
    )
    source: str = Field(
        description="Where the checkpoint is. A hub repo `owner/name`, a folder (starts with `/`, `./`, `../` or `~`; "
        "relative to this file), or `package:NAME/sub/folder` in an installed Python package."
    )
    revision: str | None = Field(
        default=None,
        validate_default=True,
        description="The commit of the hub repo, 40 hex digits. Required for a hub source, so that the weights cannot "
        "change under stored vectors; not allowed for others.",
    )
    sha256: Mapping[FileName, Sha256] = Field(
        default_factory=dict,
        description="Expected SHA-256 of files of the checkpoint, by file name. Checked at load; a file that "
        "differs is not loaded.",
    )
    enabled: Enabled = Field(
        default="auto", description="Whether the model is loaded. `auto`: when an accelerator is present."
    )
    required: bool = Field(
        default=False,
        description="Whether the gateway stops when this model fails to load. Otherwise it serves the others, and "
        "answers 503 for this one.",
    )
    backend: Literal["infinity"] = Field(default="infinity", description="What computes the vectors.")
    device: Device = Field(
        default="auto",
        description="Where the model runs: `auto`, `cpu`, `cuda` or `cuda:N`. `auto`: the "
        "accelerator, if one is present.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Precision of the computation. `auto`: `float16` on CUDA; `bfloat16` on a CPU that has it, else "
        "`float32`.",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        default="auto",
        description="What runs the forward. `auto`: OpenVINO on a CPU, where its vectors agree with torch's; torch "
        "elsewhere.",
    )
    default_task: NonEmptyText | None = Field(
        default=None,
        description="The task of a request that names none. Use a symmetric one where clients search and store "
        "under one name.",
    )
    prompts: Mapping[NonEmptyText, str] = Field(
        default_factory=dict,
        description="Instruction put before the text, by task. Overrides the checkpoint's own instructions.",
    )
    dimensions: Distinct[Positive] = Field(
        default=(),
        description="The sizes that a client may ask for with `dimensions`. The native width is always allowed; list "
        "smaller ones only for a model that was trained for them.",
    )
    max_tokens: Positive | None = Field(
        default=None,
        description="The longest text in tokens, special tokens included; longer ones are truncated. By default the "
        "checkpoint's own limit.",
    )
    max_batch_tokens: Positive | None = Field(
        default=None,
        description="The most tokens that one forward pass takes; bounds the memory. By default the "
        "engine's own limit.",
    )
    fp16_accumulation: bool = Field(
        default=False,
        description="Whether float16 matrix products add up in float16: up to twice as fast on GeForce cards, no gain on "
        "others, and less exact. Needs `golden`; refused where the golden vectors leave their tolerance.",
    )
    golden: NonEmptyText | None = Field(
        default=None,
        description="File with the model's golden vectors, relative to this file; they are checked at every start. "
        "`gateway verify MODEL --record` writes it.",
    )
    outputs: DistinctListed[Annotated[Output, Field(strict=False)]] = Field(
        default=(Output.DENSE,), description="What the model can return for a text."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Whether Python code in the checkpoint may run. Only for a source that you have read.",
    )

    @property
    def parsed_source(self) -> Source:
        """Take ``source`` apart."""
        return Source.parse(self.source)

    @field_validator("golden")
    @classmethod
    def _resolve_golden(cls, text: str | None, info: ValidationInfo) -> str | None:
        base: Path = (info.context or {}).get("folder", Path())
        return None if text is None else str((base / text).resolve())

    @field_validator("source")
    @classmethod
    def _resolve_source(cls, text: str, info: ValidationInfo) -> str:
        source = Source.parse(text)
        if source.kind != "folder":
            return text
        base: Path = (info.context or {}).get("folder", Path())
        try:
            return str((base / Path(text).expanduser()).resolve())
        except (OSError, RuntimeError) as error:  # `~name` of a user that does not exist, or a loop of links
            raise ValueError(f"is a folder that cannot be resolved: {error}") from None

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if "source" not in info.data:
            return revision  # has its own problem, and what is right here depends on it
        source: str = info.data["source"]
        if Source.parse(source).kind != "hub":
            if revision is not None:
                raise ValueError(f"is only for hub repos, and {quote(source)} is none; remove it, or pin with `sha256`")
        elif revision is None:
            raise ValueError(
                f"is missing: {quote(source)} must be pinned to a commit, {_COMMIT}; otherwise the weights could "
                "change under the stored vectors"
            )
        elif not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(
                f"must be a commit, {_COMMIT}, got {quote(revision)}; branches and tags move, and vectors of other "
                "weights cannot be compared with the stored ones"
            )
        return revision


class Alias(_Frozen):
    """Another name for a model, or for one task of it."""

    name: str = Field(exclude=True, description="The alias's own name: its key in `aliases`.")
    model: str = Field(description="The id of the model; not another alias.")
    task: NonEmptyText | None = Field(
        default=None, description="The task of requests under this name. By default the model's `default_task`."
    )


class Registry(_Frozen):
    """Every model that a request can reach, and the names they go by."""

    path: Path = Field(exclude=True, description="The file that the registry was read from.")
    version: Version = Field(description="Version of the file's format: `1`.")
    models: Listed[ModelEntry] = Field(description="The models.")
    aliases: Mapping[Name, Alias] = Field(
        default_factory=dict,
        description="Other names for models. A name maps to a model id, or to `{model: MODEL, task: TASK}`; the alias "
        "`default` answers requests that name no model.",
    )

    def model(self, model_id: str) -> ModelEntry:
        """Return the model with exactly this id.

        Raises:
            KeyError: there is none.
        """
        for entry in self.models:
            if entry.id == model_id:
                return entry
        raise KeyError(model_id)

    @model_validator(mode="after")
    def _check_conflicts(self) -> Registry:
        names = [(index, entry.id, entry.source) for index, entry in enumerate(self.models)]
        for conflict in _conflicts(names, {name: alias.model for name, alias in self.aliases.items()}):
            raise ValueError(conflict.message)
        return self


# ------------------------------------------------------------------------------------------------------- conflicts


class _Conflict(NamedTuple):
    path: KeyPath
    is_in_key: bool
    message: str


def _conflicts(names: Iterable[tuple[int, str, str]], targets: Mapping[str, str]) -> Iterator[_Conflict]:
    """Find what is wrong between entries that are right by themselves.

    Args:
        names: index, id and source of each model.
        targets: the model of each alias.
    """
    ids: dict[str, str] = {}  # by folded id: two ids that differ only in case are a trap for clients
    owners: dict[str, str] = {}
    for index, model_id, source in names:
        if model_id.casefold() in ids:
            message = f"must be unique, and {quote(ids[model_id.casefold()])} is taken by another model"
            yield _Conflict(("models", index, "id"), is_in_key=False, message=message)
        ids.setdefault(model_id.casefold(), model_id)
        owners.setdefault(source.casefold(), model_id)
    for alias, target in targets.items():
        path = ("aliases", alias)
        if alias.casefold() in ids:
            yield _Conflict(path, is_in_key=True, message="is the id of a model; choose another name for the alias")
        elif alias.casefold() in owners:
            owner = quote(owners[alias.casefold()])
            yield _Conflict(path, is_in_key=True, message=f"is the source of {owner}, which answers to it already")
        if target not in ids.values():
            yield _Conflict((*path, "model"), is_in_key=False, message=_wrong_target(target, ids, owners, targets))


def _wrong_target(target: str, ids: Mapping[str, str], owners: Mapping[str, str], targets: Mapping[str, str]) -> str:
    model_id, colon, task = target.partition(":")
    if colon and model_id in ids.values():
        return f"must be a model id alone, got {quote(target)}; write `{{model: {model_id}, task: {task}}}`"
    if target in targets:
        right = f"; write {quote(targets[target])}" if targets[target] in ids.values() else ""
        return f"must be a model id, and {quote(target)} is an alias{right}"
    if target.casefold() in owners:
        return f"must be a model id, and {quote(target)} is a source; write {quote(owners[target.casefold()])}"
    guess = did_you_mean(target, ids.values()) or ";"
    return f"is not a model of this file, got {quote(target)}{guess} models: {enumerate_names(ids.values())}"


# ---------------------------------------------------------------------------------------------------------- loader


def load_registry(path: Path, environ: Mapping[str, str]) -> Registry:
    """Read and check a registry file.

    Args:
        path: the file; folders in it are relative to where it lies.
        environ: what ``${NAME}`` in its values stands for.

    Raises:
        ConfigError: the file cannot be read, or holds anything that is not right; lists every problem.
    """
    document = read_document(path, environ)
    root = document.root
    if not isinstance(root, dict):
        message = f"the file must be a mapping with `version` and `models`, got {describe(root)}"
        raise ConfigError([document.value_problem((), message)])
    problems = document.problems
    entries = _without_loader_fields(root, document) | {"path": path}
    registry = None
    try:
        registry = Registry.model_validate(entries, context={"folder": path.parent})
    except ValidationError as error:
        problems += _field_problems(error, document)
        problems += _conflict_problems(entries, document)
    if registry is None or problems:
        # A problem inside an anchor is found once for each place that the anchor is used in.
        raise ConfigError(list(dict.fromkeys(problems)))
    return registry


def _without_loader_fields(root: Mapping[str, Value], document: Document) -> dict[str, object]:
    """Return the file's entries with each alias as the mapping that ``Alias`` reads, and note what cannot be one."""
    entries: dict[str, object] = dict(root)
    if "path" in entries:
        allowed = configurable(Registry.model_fields)
        document.problems.append(document.key_problem(("path",), unknown_key("path", allowed)))
    aliases = root.get("aliases")
    if isinstance(aliases, dict):
        read = {name: _alias_entries(name, value, document) for name, value in aliases.items()}
        entries["aliases"] = {name: alias for name, alias in read.items() if alias is not None}
    return entries


def _alias_entries(name: str, value: Value, document: Document) -> dict[str, Value] | None:
    path = ("aliases", name)
    if isinstance(value, str):
        return {"name": name, "model": value}
    if isinstance(value, dict):
        if "name" in value:
            allowed = configurable(Alias.model_fields)
            document.problems.append(document.key_problem((*path, "name"), unknown_key("name", allowed)))
        return {**value, "name": name}
    if path not in document.unread:
        message = f"must be a model id or `{{model: MODEL, task: TASK}}`, got {describe(value)}"
        document.problems.append(document.value_problem(path, message))
    return None


def _field_problems(error: ValidationError, document: Document) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path: KeyPath = detail["loc"]
        if path == () or path in document.unread:
            continue  # `()`: a conflict between entries, told by _conflict_problems
        if path[-1] == "[key]":
            yield document.key_problem(path[:-1], explain(detail, {}))
        elif detail["type"] == "extra_forbidden":
            yield document.key_problem(path, explain(detail, _fields_at(path)))
        else:
            yield document.value_problem(path, explain(detail, _fields_at(path)))


def _fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    """Return the fields of the model that the last key of a path belongs to."""
    match path:
        case ("models", int(), *_):
            return ModelEntry.model_fields
        case ("aliases", str(), _, *_):
            return Alias.model_fields
        case _:
            return Registry.model_fields


def _conflict_problems(entries: Mapping[str, object], document: Document) -> Iterator[Problem]:
    """Find the conflicts also when single entries are wrong, so that one run tells everything."""
    models, aliases = entries.get("models"), entries.get("aliases")
    names: list[tuple[int, str, str]] = []
    for index, model in enumerate(models if isinstance(models, tuple) else ()):
        match model:
            case {"id": str(model_id), **rest}:
                source = rest.get("source")
                names.append((index, model_id, source if isinstance(source, str) else ""))
    targets: dict[str, str] = {}
    for name, alias in aliases.items() if isinstance(aliases, dict) else ():
        match alias:
            case {"model": str(target)} if ("aliases", name, "model") not in document.unread:
                targets[name] = target
    for path, is_in_key, message in _conflicts(names, targets):
        if is_in_key:
            yield document.key_problem(path, message)
        else:
            written = path if path in document.values else path[:-1]  # the alias may be a string rather than a mapping
            yield document.value_problem(written, message)
