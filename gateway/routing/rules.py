"""Rules between the models of a registry that can be checked only once the models have been read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from gateway.config.registry import Experiment, Registry
from gateway.fleet import Fleet
from gateway.precision import CALIBRATED
from gateway.routing.names import Name, Names
from gateway.routing.spaces import is_same_space, why_not_interchangeable, why_other_ranges
from gateway.tasks import canonical_task, known_task_names
from gateway.types import DOES, ModelInfo, ModelKind


class Described(Protocol):
    """A model whose checkpoint may have been read."""

    @property
    def info(self) -> ModelInfo | None: ...


class Models(Protocol):
    """A fleet, or the known part of a fleet that is not loaded."""

    def get(self, model_id: str) -> Described | None: ...


def broken_rules(registry: Registry, fleet: Models) -> list[str]:
    """Return a message for each rule that a registry breaks.

    A model that is disabled, or whose checkpoint cannot be read, breaks no rule: it is checked when it is loaded,
    before it is used.
    """
    return [
        *_unknown_tasks(registry, fleet),
        *_foreign_fallbacks(registry, fleet),
        *(problem for experiment in registry.experiments for problem in _foreign_arms(experiment, fleet)),
        *_mixed_kinds(registry, fleet),
    ]


def _unknown_tasks(registry: Registry, fleet: Models) -> Iterator[str]:
    named = [(f"the alias {alias.name!r}", alias.model, alias.task) for alias in registry.aliases.values()]
    named += [
        (f"arm {arm.label!r} of the experiment {experiment.id!r}", arm.model, arm.task)
        for experiment in registry.experiments
        for arm in experiment.arms
    ]
    for what, model, task in named:
        info = _info(fleet, model)
        if info is None or task is None:
            continue
        allowed = list(info.tasks) or known_task_names()
        if canonical_task(task) not in allowed:
            yield f"{what} names the task {task!r}, but model {model!r} knows only: {', '.join(allowed)}"


def _foreign_fallbacks(registry: Registry, fleet: Models) -> Iterator[str]:
    for model, others in registry.fallbacks.items():
        for other in others:
            info, other_info = _info(fleet, model), _info(fleet, other)
            if info is not None and other_info is not None and (reason := why_not_interchangeable(info, other_info)):
                yield f"{other!r} cannot be a fallback of {model!r}: {reason}"


def _foreign_arms(experiment: Experiment, fleet: Models) -> Iterator[str]:
    if experiment.kind != "same_space":
        return
    control = experiment.control
    info = _info(fleet, control.model)
    for arm in experiment.arms[1:]:
        arm_info = _info(fleet, arm.model)
        if info is None or arm_info is None:
            continue
        if (arm.model, arm.task) == (control.model, control.task):
            continue
        if control.task is None and arm.task is None:
            reason = why_not_interchangeable(info, arm_info)
        else:
            space, arm_space = info.space(control.task), arm_info.space(arm.task)
            reason = (
                ""
                if is_same_space(space, arm_space)
                else f"{control.label} is in space {space}, and {arm.label} in {arm_space}"
            ) or why_other_ranges(info, arm_info)
        if reason:
            yield (
                f"the arms of experiment {experiment.id!r} are not in one space: {reason}; if that is intended, "
                "set `kind: cross_space`"
            )


def _mixed_kinds(registry: Registry, fleet: Models) -> Iterator[str]:
    """Yield a message for each mix of models of different kinds, which no single request could use."""
    for experiment in registry.experiments:
        kinds = {arm.model: info.kind.value for arm in experiment.arms if (info := _info(fleet, arm.model)) is not None}
        if len(set(kinds.values())) > 1:
            what = ", ".join(f"{model!r} is for {kind}" for model, kind in kinds.items())
            yield f"the arms of experiment {experiment.id!r} compute different things: {what}"
    for shadow in registry.shadows:
        info = _info(fleet, shadow.to)
        if info is not None and info.kind is not ModelKind.EMBED:
            yield f"{shadow.to!r} cannot be a shadow of {shadow.of!r}: it {DOES[info.kind]}, and only embeddings are copied"


def name_spaces(registry: Registry, fleet: Fleet) -> dict[str, dict[str, str]]:
    """Return the spaces of each name, by task; only of names whose model has been read.

    The space of a request without a task has the key ``""``; the spaces of its int8 and uint8 vectors have the
    precision's name.
    """
    named = {name: _spaces(fleet, meaning.model, task) for name, meaning, task in _one_space_names(registry)}
    return {name: spaces for name, spaces in named.items() if spaces}


def moved_names(known: Mapping[str, Mapping[str, str]], registry: Registry, fleet: Fleet) -> list[str]:
    """Return a message for each name that a reload would move to another space without permission.

    Vectors that were stored under such a name would silently be compared with vectors of another space.

    Args:
        known: the spaces of each name so far; see :func:`name_spaces`.
    """
    moved = []
    for name, meaning, task in _one_space_names(registry):
        if meaning.allow_space_change:
            continue
        old, new = known.get(name, {}), _spaces(fleet, meaning.model, task)
        for key in sorted(old.keys() & new.keys()):
            if not is_same_space(old[key], new[key]):
                what = f" ({'' if key in CALIBRATED else 'task '}{key})" if key else ""
                moved.append(
                    f"{name!r} would move from space {old[key]} to {new[key]}{what}: vectors stored under this name could "
                    "not be compared with new ones; set `allow_space_change: true` on it if none are"
                )
                break
    return moved


def _one_space_names(registry: Registry) -> Iterator[tuple[str, Name, str | None]]:
    """Yield each name whose vectors are in one space, with its meaning and the task that it fixes."""
    for name, meaning in Names(registry):
        if meaning.experiment is None:
            yield name, meaning, meaning.task
        elif meaning.experiment.kind == "same_space":
            yield name, meaning, meaning.experiment.control.task


def _spaces(fleet: Fleet, model: str, task: str | None) -> dict[str, str]:
    """Return the spaces of a name by task; see :func:`name_spaces`."""
    info = _info(fleet, model)
    if info is None or info.kind is not ModelKind.EMBED:  # clients do not store scores to compare them later
        return {}
    quantized = {precision.value: info.space(task, precision=precision) for precision in CALIBRATED if info.ranges}
    by_task = {} if task else {key: space for key, space in info.spaces_by_task().items() if key}
    return {"": info.space(task)} | quantized | by_task


def _info(fleet: Models, model_id: str) -> ModelInfo | None:
    model = fleet.get(model_id)
    return None if model is None else model.info
