"""The registry: the models that a request can reach, and their names, read from ``models.yaml``.

The file has the shape of the classes: a ``Registry`` holds ``ModelEntry``, ``Alias``, ``Experiment`` and ``Shadow``. Fields
with ``exclude=True`` are not keys of the file; the loader sets them. The reference in ``docs/configuration.md`` is
generated from the field descriptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from gateway.config.capture import Capture
from gateway.config.conflicts import ConflictError, find_conflicts
from gateway.config.fields import KNOWN_BY, Distinct, DistinctListed, Frozen, Listed, Name, Source, Version
from gateway.config.model_entry import ModelEntry
from gateway.config.problems import field_problems
from gateway.config.replicas import Replicas
from gateway.config.traffic import Alias, Arm, Experiment, Outcome, Shadow
from gateway.config.upstream import Upstream
from gateway.config.wording import configurable, describe, unknown_key
from gateway.config.yaml_source import Document, FileKind, KeyPath, Value, read_document
from gateway.errors import ConfigError, Problem

__all__ = ["Alias", "Arm", "Experiment", "ModelEntry", "Outcome", "Registry", "Shadow", "Source", "load_registry"]


MODELS_FILE = FileKind("`version: 1` and `models:`", "name another with GATEWAY_MODELS or on the command line")


class Registry(Frozen):
    """The models that a request can reach, their names, and the rules that distribute traffic over them."""

    path: Path = Field(exclude=True, description="The file that the registry was read from.")
    version: Version = Field(description="Version of the file format: `1`.")
    models: Listed[ModelEntry] = Field(description="The models.")
    aliases: Mapping[Name, Alias] = Field(
        default_factory=dict,
        description="Other names for models. A name maps to a model id, or to `{model: MODEL, task: TASK}`; the alias "
        "`default` answers requests without a model.",
    )
    experiments: tuple[Experiment, ...] = Field(
        default=(), description="Names whose requests are split between models."
    )
    shadows: Distinct[Shadow] = Field(
        default=(), description="Copies of some traffic to a second model, whose vectors are discarded."
    )
    fallbacks: Mapping[str, DistinctListed[str]] = Field(
        default_factory=dict,
        description="For the id of a model, the ids of the models that answer in its place while it cannot, in order. All "
        "must give vectors of the same space; otherwise the gateway does not start.",
    )

    def model(self, model_id: str) -> ModelEntry:
        """Return the model with exactly this id.

        Raises:
            KeyError: no model has this id.
        """
        for entry in self.models:
            if entry.id == model_id:
                return entry
        raise KeyError(model_id)

    def experiment(self, experiment_id: str) -> Experiment | None:
        """Return the experiment with exactly this id, if there is one."""
        return next((experiment for experiment in self.experiments if experiment.id == experiment_id), None)

    def captures(self) -> dict[str, Capture]:
        """Return the capture of each alias and experiment that has one."""
        entries = [
            *((alias.name, alias.capture) for alias in self.aliases.values()),
            *((experiment.id, experiment.capture) for experiment in self.experiments),
        ]
        return {name: capture for name, capture in entries if capture is not None}

    def aliases_of(self, model_id: str) -> list[str]:
        """Return the other names of a model."""
        return [alias.name for alias in self.aliases.values() if alias.model == model_id]

    def source_names(self) -> dict[str, str]:
        """Return the model of each source that names a model, and of each other well-known name of its weights.

        A source that two models share names neither.
        """
        count = Counter(entry.source for entry in self.models)
        names = {entry.source: entry.id for entry in self.models if count[entry.source] == 1}
        # A name that the registry itself defines takes precedence.
        taken = {*count, *self.names()}
        known_by = {name: names[source] for name, source in KNOWN_BY.items() if source in names and name not in taken}
        return known_by | names

    def source_names_of(self, model_id: str) -> list[str]:
        """Return the names of a model in :meth:`source_names`."""
        return [name for name, owner in self.source_names().items() if owner == model_id]

    def names(self) -> list[str]:
        """Return every name that a request may use, except sources and tasks."""
        return [
            *(entry.id for entry in self.models),
            *self.aliases,
            *(experiment.id for experiment in self.experiments),
        ]

    @model_validator(mode="after")
    def _check_conflicts(self) -> Registry:
        parts = (self.models, self.aliases, self.experiments, self.shadows, self.fallbacks)
        if conflicts := list(find_conflicts(*parts)):
            raise ConflictError(conflicts)
        return self


# ---------------------------------------------------------------------------------------------------------- loader


def load_registry(path: Path, environ: Mapping[str, str], text: str | None = None) -> Registry:
    """Read and check a registry file.

    Args:
        path: the file; folders in it are relative to its folder.
        environ: the variables for ``${NAME}`` in the file's values.
        text: new content of the file, which is checked before it is written.

    Raises:
        ConfigError: the file cannot be read or is wrong; the error lists every problem. Conflicts between entries are found
            once all entries are valid.
    """
    document = read_document(path, environ, MODELS_FILE, text)
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
        problems += field_problems(error, document, _fields_at)
        if not problems:
            problems += _conflict_problems(error, document)
    if registry is None or problems:
        # A problem inside an anchor is found once per use of the anchor.
        raise ConfigError(list(dict.fromkeys(problems)))
    return registry


def _without_loader_fields(root: Mapping[str, Value], document: Document) -> dict[str, object]:
    """Return the file's entries with each alias as a mapping for ``Alias``, and record aliases of another form."""
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


def _fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    """Return the fields of the model that has the last key of a path."""
    match path:
        case ("models", int(), *rest):
            parts = {"upstream": Upstream.model_fields, "replicas": Replicas.model_fields}
            return parts.get(str(rest[0]), ModelEntry.model_fields) if len(rest) > 1 else ModelEntry.model_fields
        case ("aliases", str(), key, *rest):
            return Capture.model_fields if key == "capture" and rest else Alias.model_fields
        case ("experiments", int(), "arms", int(), *_):
            return Arm.model_fields
        case ("experiments", int(), *rest):
            return Capture.model_fields if rest[:1] == ["capture"] and len(rest) > 1 else Experiment.model_fields
        case ("shadows", int(), *_):
            return Shadow.model_fields
        case _:
            return Registry.model_fields


def _conflict_problems(error: ValidationError, document: Document) -> Iterator[Problem]:
    """Yield the conflicts between entries, with their places; they are known only if all entries are valid."""
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        for path, message, is_in_key in cause.conflicts if isinstance(cause, ConflictError) else ():
            if is_in_key:
                yield document.key_problem(path, message)
            else:
                # An alias may be written as a string rather than a mapping: then it has no place for `model`.
                is_written = path in document.values or path[0] != "aliases"
                yield document.value_problem(path if is_written else path[:-1], message)
