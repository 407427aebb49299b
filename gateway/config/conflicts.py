"""Conflicts between valid entries of ``models.yaml``: names that are used twice, targets that do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from gateway.config.capture import Capture
from gateway.config.model_entry import ModelEntry
from gateway.config.traffic import Alias, Experiment, Shadow
from gateway.config.wording import did_you_mean, enumerate_names, quote

KeyPath: TypeAlias = tuple[str | int, ...]


class Conflict(NamedTuple):
    """A problem at a place of the file.

    Attributes:
        is_in_key: whether the problem is the key at ``path`` rather than its value.
    """

    path: KeyPath
    message: str
    is_in_key: bool = False


class ConflictError(ValueError):
    """Conflicting entries; the message states the first conflict, and ``conflicts`` holds all."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        super().__init__(conflicts[0].message)
        self.conflicts = conflicts


def find_conflicts(
    models: Sequence[ModelEntry],
    aliases: Mapping[str, Alias],
    experiments: Sequence[Experiment],
    shadows: Sequence[Shadow],
    fallbacks: Mapping[str, Sequence[str]],
) -> Iterator[Conflict]:
    """Yield the conflicts between valid entries."""
    names = _Names(models, aliases, experiments)
    yield from _name_conflicts(models, aliases, experiments)
    for path, target in _references(aliases, experiments, fallbacks):
        if target not in names.ids:
            yield Conflict(path, names.wrong_target(target))
    for index, model in enumerate(models):
        if model.same_space_as is not None and (problem := _same_space_problem(model, model.same_space_as, names)):
            yield Conflict(("models", index, "same_space_as"), problem)
    for index, shadow in enumerate(shadows):
        for key, problem in _shadow_problems(shadow, names):
            yield Conflict(("shadows", index, key), problem)
    for model_id, others in fallbacks.items():
        if model_id not in names.ids:
            yield Conflict(("fallbacks", model_id), names.wrong_target(model_id), is_in_key=True)
        elif model_id in others:
            path = ("fallbacks", model_id, others.index(model_id))
            yield Conflict(path, "is the model itself; a fallback is another model of the same space")
    yield from _on_demand_conflicts(models, experiments, shadows)
    yield from _cache_conflicts(models)
    yield from _capture_conflicts(aliases, experiments)


def _references(
    aliases: Mapping[str, Alias], experiments: Sequence[Experiment], fallbacks: Mapping[str, Sequence[str]]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield each value that must be the id of a model, with its path."""
    for name, alias in aliases.items():
        yield ("aliases", name, "model"), alias.model
    for index, experiment in enumerate(experiments):
        for arm_index, arm in enumerate(experiment.arms):
            yield ("experiments", index, "arms", arm_index, "model"), arm.model
    for model_id, others in fallbacks.items():
        for index, other in enumerate(others):
            yield ("fallbacks", model_id, index), other


class _Names:
    """The names that are defined, and the explanation for a name that is not a model's id."""

    def __init__(
        self, models: Sequence[ModelEntry], aliases: Mapping[str, Alias], experiments: Sequence[Experiment]
    ) -> None:
        self.ids = [model.id for model in models]
        self.same_space_ids = {model.id for model in models if model.same_space_as is not None}
        self.aliases = {name: alias.model for name, alias in aliases.items()}
        self.experiments = [experiment.id for experiment in experiments]
        self.sources = _by_source(models)

    def wrong_target(self, target: str) -> str:
        """Explain a name that should be a model's id, but is something else."""
        model_id, colon, task = target.partition(":")
        if colon and model_id in self.ids:
            return f"must be a model id alone, got {quote(target)}; write `{{model: {model_id}, task: {task}}}`"
        if target in self.aliases:
            hint = f"; write {quote(self.aliases[target])}" if self.aliases[target] in self.ids else ""
            return f"must be a model id, but {quote(target)} is an alias{hint}"
        if target in self.experiments:
            return f"must be a model id, but {quote(target)} is an experiment"
        if owner := self.sources.get(target.casefold()):
            return f"must be a model id, but {quote(target)} is a source; write {quote(owner)}"
        guess = did_you_mean(target, self.ids) or ";"
        return f"is not a model of this file, got {quote(target)}{guess} models: {enumerate_names(self.ids)}"


def _by_source(models: Sequence[ModelEntry]) -> dict[str, str]:
    """Return the first model of each source, by the source's folded form."""
    return {model.written_source.casefold(): model.id for model in reversed(models)}


def _name_conflicts(
    models: Sequence[ModelEntry], aliases: Mapping[str, Alias], experiments: Sequence[Experiment]
) -> Iterator[Conflict]:
    """Yield the names that are already taken. Case is ignored, because names that differ only in case mislead clients."""
    ids: dict[str, str] = {}
    for index, model in enumerate(models):
        if first := ids.get(model.id.casefold()):
            yield Conflict(("models", index, "id"), f"must be unique, but {quote(first)} is taken by another model")
        ids.setdefault(model.id.casefold(), model.id)
    taken = {
        source: f"is the source of {quote(owner)}, which answers to it already"
        for source, owner in _by_source(models).items()
    }
    taken |= dict.fromkeys(ids, "is the id of a model; choose another name")
    for name in aliases:
        if name.casefold() in taken:
            yield Conflict(("aliases", name), taken[name.casefold()], is_in_key=True)
    taken = {name.casefold(): "is an alias; choose another name for the experiment" for name in aliases} | taken
    for index, experiment in enumerate(experiments):
        folded = experiment.id.casefold()
        if folded in taken:
            yield Conflict(("experiments", index, "id"), taken[folded])
        taken.setdefault(folded, f"must be unique, but {quote(experiment.id)} is taken by another experiment")


def _same_space_problem(model: ModelEntry, other: str, names: _Names) -> str | None:
    if other == model.id:
        return "is the model itself; name the other one that has the same weights"
    if other not in names.ids:
        return names.wrong_target(other)
    if other in names.same_space_ids:
        return f"must be a model with its own space, but {quote(other)} has the space of another model"
    return None


def _on_demand_conflicts(
    models: Sequence[ModelEntry], experiments: Sequence[Experiment], shadows: Sequence[Shadow]
) -> Iterator[Conflict]:
    """Yield the uses of on-demand models that require a loaded model."""
    on_demand = {model.id: model for model in models if model.is_on_demand}
    for index, experiment in enumerate(experiments):
        for arm_index, arm in enumerate(experiment.arms):
            if arm.model in on_demand:
                yield Conflict(
                    ("experiments", index, "arms", arm_index, "model"),
                    f"must be loaded at the start, but {quote(arm.model)} has `load: on_demand`: requests that wait for a "
                    "load would make the arm look slow",
                )
    for index, shadow in enumerate(shadows):
        if shadow.to in on_demand:
            yield Conflict(
                ("shadows", index, "to"),
                f"must be loaded at the start, but {quote(shadow.to)} has `load: on_demand`: copies would displace models "
                "that clients wait for",
            )
    for index, model in enumerate(models):
        other = on_demand.get(model.same_space_as or "")
        if other is not None and other.golden is None:
            yield Conflict(
                ("models", index, "same_space_as"),
                f"must be loaded at the start or have `golden` vectors to compare with, but {quote(other.id)} has `load: "
                "on_demand` and no `golden`",
            )


def _cache_conflicts(models: Sequence[ModelEntry]) -> Iterator[Conflict]:
    """Yield each cache that outlives the process, of a model that may be another one in the next process."""
    pinned = {model.id: model.is_pinned for model in models}
    for index, model in enumerate(models):
        is_known = model.is_pinned or (model.same_space_as is not None and pinned.get(model.same_space_as, True))
        if not is_known and model.cache is not None and model.cache.is_lasting:
            yield Conflict(
                ("models", index, "cache"),
                "has `disk` or `redis`, so the model needs `golden`: otherwise nothing tells after a restart whether its "
                "servers run other weights by then, and the cache would mix vectors of both. Set `golden`, and write the "
                f"file with `gateway verify {model.id} --record`",
            )


def _capture_conflicts(aliases: Mapping[str, Alias], experiments: Sequence[Experiment]) -> Iterator[Conflict]:
    """Yield each capture that shares a file with another: its `days` and `scrub` could not apply to the whole file."""
    captures: list[tuple[str, KeyPath, Capture | None]] = [
        *((alias.name, ("aliases", name), alias.capture) for name, alias in aliases.items()),
        *((experiment.id, ("experiments", index), experiment.capture) for index, experiment in enumerate(experiments)),
    ]
    owners: dict[str, str] = {}
    for name, path, capture in captures:
        if capture is None:
            continue
        file = os.path.normpath(Path(capture.to).expanduser())  # `./a.jsonl` is the file `a.jsonl`
        if file in owners:
            yield Conflict(
                (*path, "capture", "to"),
                f"must be a separate file, but {quote(owners[file])} and {quote(name)} have the same file",
            )
        owners.setdefault(file, name)


def _shadow_problems(shadow: Shadow, names: _Names) -> Iterator[tuple[str, str]]:
    known = [*names.ids, *names.aliases, *names.experiments]
    if shadow.of not in known:
        guess = did_you_mean(shadow.of, known) or ";"
        yield (
            "of",
            f"must be a model, alias or experiment, got {quote(shadow.of)}{guess} names: {enumerate_names(known)}",
        )
    if shadow.to not in names.ids:
        yield "to", names.wrong_target(shadow.to)
    elif shadow.to == names.aliases.get(shadow.of, shadow.of):
        yield "to", f"is the model that answers {quote(shadow.of)} itself; a shadow must be another model"
