"""From the ``model`` and ``task`` of a request to the target that answers it. Never a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TypeAlias

from gateway.config.registry import Arm, Experiment, Registry
from gateway.errors import (
    BadInput,
    ModelDisabled,
    ModelNotAllowed,
    ModelNotFound,
    ModelNotReady,
    ModelRecovering,
    ModelUnavailable,
)
from gateway.experiments.split import Assignment, Split, UnitSource
from gateway.fleet import Fleet, Model
from gateway.routing.spaces import why_no_stand_in
from gateway.types import ModelInfo, ModelState, canonical_task, known_task_names

DEFAULT_ALIAS = "default"
_MAX_SHOWN = 100

MayUse: TypeAlias = Callable[..., bool]
"""Tells whether a caller may use something that has these names."""


def everything(*_names: str) -> bool:
    """Allow every name: for the gateway's own work, which no client asks for."""
    return True


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request: one model, with one task.

    Attributes:
        name: what the answer says in ``model``.
        task: one of the model's tasks, or ``None``.
    """

    name: str
    model: Model
    info: ModelInfo
    task: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a name stands for, whether or not that is ready.

    Attributes:
        task: the task in the name or of the alias or arm, if there is one.
        asked: the model, alias or experiment that was asked for, as the registry calls it.
        name: what the answer says in ``model``: the name that was asked for if that is a model's, else the model's id.
        assignment: the arm that the request is in, if an experiment was asked for.
        experiment: what was asked for, if that is an experiment; without an assignment, ``model`` is the control arm's.
    """

    model: Model
    task: str | None
    asked: str
    name: str
    assignment: Assignment | None = None
    experiment: Experiment | None = None


# What Ollama's clients, and those of its OpenAI paths, add to a name without a tag; it is no task.
_DEFAULT_TAG = "latest"


class Router:
    """Resolves names. Everything it knows is fixed by the registry; only the state of the models changes."""

    def __init__(self, registry: Registry, fleet: Fleet) -> None:
        self._fleet = fleet
        self._aliases = registry.aliases
        self._splits = {experiment.id: Split(experiment) for experiment in registry.experiments}
        self._fallbacks = registry.fallbacks
        self._sources = registry.source_names()

    def names(self, may_use: MayUse) -> list[str]:
        """Return every name that a caller may use, except sources and tasks."""
        known = [*(model.id for model in self._fleet), *self._aliases, *self._splits]
        return [name for name in known if may_use(*self._granting(name))]

    def listed(self, may_use: MayUse) -> list[Choice]:
        """Return what a caller may use, each thing once.

        Models and experiments are under their ids; an alias is among them only where its model's id is not for the
        caller.
        """
        choices = [self.choose(name, may_use) for name in self.names(may_use)]
        return [one for one in choices if one.experiment or one.asked == one.model.id or not may_use(one.model.id)]

    def choose(self, name: str | None, may_use: MayUse, unit_source: UnitSource | None = None) -> Choice:
        """Find the model that a name stands for.

        Args:
            name: an id, an alias, an experiment, a model's source, or one of these with a task, ``name:task``; ``None``
                for the registry's default.
            may_use: whether the caller may use something that has these names.
            unit_source: looks up the values that an experiment can make a unit from; ``None`` for no request in particular,
                which gets the control arm and no assignment.

        Raises:
            ModelNotFound: nothing has that name.
            ModelNotAllowed: the caller may not use it.
            BadInput: no name and no default; two tasks that differ; or an arm is forced that there is not.
        """
        if name is None:
            if DEFAULT_ALIAS not in self._aliases:
                raise BadInput(f"`model` is required; one of: {', '.join(self.names(may_use))}", param="model")
            name = DEFAULT_ALIAS
        for known, task in _readings(name):
            choice = self._choose_known(known, may_use, unit_source)
            if choice is None:
                continue
            if task is None:
                return choice
            if choice.task is not None and canonical_task(choice.task) != canonical_task(task):
                raise BadInput(
                    f"`model` is {_cut(name)!r}, but {known!r} stands for the task {choice.task!r}: leave out "
                    f"`:{_cut(task)}`",
                    param="model",
                )
            return replace(choice, task=task, name=name if choice.name == known else choice.name)
        raise self._not_found(name, may_use)

    def targets(self, choice: Choice, task: str | None) -> list[Target]:
        """Return what can answer a request: the chosen model, and then its fallbacks, as far as they are ready.

        All are of the same space.

        Args:
            task: the request's task by any of its names, or ``None``.

        Raises:
            ModelNotFound: the model is disabled.
            BadInput: an unknown task, or another one than the name says.
            ModelNotReady: the model is loading, and so is all that could stand in for it.
            ModelUnavailable: the model failed to load, and nothing stands in for it.
        """
        targets = [
            Target(choice.name, model, info, _resolve_task(info, choice.task, task))
            for model, info in self._candidates(choice.model)
        ]
        if not targets:
            raise _not_ready(choice.model)
        return targets

    def resolve(self, name: str | None, task: str | None, unit_source: UnitSource | None = None) -> Target:
        """Return the first of the :meth:`targets` of a name, for the gateway's own work, which may use all of them."""
        return self.targets(self.choose(name, everything, unit_source), task)[0]

    def task_of(self, choice: Choice) -> str | None:
        """Return the task of a request under a name that says none itself; ``None`` before the model has been read.

        Raises:
            BadInput: the name holds a task that the model does not know.
        """
        return _resolve_task(choice.model.info, choice.task, None) if choice.model.info else None

    def arms(self, choice: Choice) -> list[tuple[Arm, Model, str | None]]:
        """Return the arms of the experiment that was asked for, each with its model and its task.

        Raises:
            BadInput: the name holds a task that an arm does not know, or that is not the arm's own.
        """
        assert choice.experiment is not None  # noqa: S101  the caller has looked
        # What the choice has as its task is the name's where the control arm has none.
        of_name = None if choice.experiment.control.task else choice.task
        found = []
        for arm in choice.experiment.arms:
            model = self._model(arm.model)
            found.append((arm, model, _resolve_task(model.info, arm.task, of_name) if model.info else None))
        return found

    def generation(self, experiment_id: str) -> str:
        """Return the generation of an experiment; see :class:`gateway.experiments.split.Assignment`."""
        return self._splits[experiment_id].generation

    def _candidates(self, model: Model) -> Iterator[tuple[Model, ModelInfo]]:
        """Yield what can answer for a model, itself first: all that is ready and of the same space."""
        if model.state is ModelState.READY and model.info is not None:
            yield model, model.info
        if model.state is ModelState.DISABLED or model.info is None:
            return
        for name in self._fallbacks.get(model.id, ()):
            other = self._fleet.get(name)
            if (
                other is not None
                and other.state is ModelState.READY
                and other.info is not None
                and not why_no_stand_in(model.info, other.info)
            ):
                yield other, other.info

    def _granting(self, asked: str) -> tuple[str, ...]:
        """Return the names of which a caller must have one: this is the rule on what a key is for.

        A key that has the id of a model may use it by all of its names. One that has an alias may use that alias alone,
        and one that has an experiment the experiment: which model answers is not for the caller to choose.
        """
        alias = self._aliases.get(asked)
        return (asked,) if alias is None else (asked, alias.model)

    def _choose_known(self, name: str, may_use: MayUse, unit_source: UnitSource | None) -> Choice | None:
        """Return what a name without a task stands for, if it is one."""
        alias, split = self._aliases.get(name), self._splits.get(name)
        # An id comes first: a model may be called like the repo that another one was made from.
        model = self._fleet.get(name) or self._fleet.get(self._sources.get(name, ""))
        if alias is None and split is None and model is None:
            return None
        asked = name if alias is not None or split is not None or model is None else model.id
        # Before an arm is chosen: the names of the arms are for those who may use the experiment.
        if not may_use(*self._granting(asked)):
            raise ModelNotAllowed(f"this API key is not for model {asked!r}", param="model")
        if alias is not None:
            return Choice(self._model(alias.model), alias.task, asked=name, name=alias.model)
        if split is not None:
            assignment = split.assign(unit_source, datetime.now(UTC)) if unit_source else None
            arm = assignment.arm if assignment else split.experiment.control
            return Choice(self._model(arm.model), arm.task, name, arm.model, assignment, split.experiment)
        return None if model is None else Choice(model, None, asked=model.id, name=name)

    def _not_found(self, name: str, may_use: MayUse) -> ModelNotFound:
        """Say that nothing has a name, and which one may be meant; of the names that the caller may use alone."""
        names = self.names(may_use)
        sources = [source for source, model_id in self._sources.items() if may_use(model_id)]
        guess = _similar(name, [*names, *sources])
        hint = f" (did you mean {guess!r}?)" if guess else ""
        return ModelNotFound(
            f"no model is called {_cut(name)!r}{hint}; there are: {', '.join(names) or 'none'}", param="model"
        )

    def _model(self, model_id: str) -> Model:
        model = self._fleet.get(model_id)
        assert model is not None  # noqa: S101  the registry has checked it
        return model


def _readings(name: str) -> Sequence[tuple[str, str | None]]:
    """Return the ways to read a name: as it is (a source may hold a colon), or as ``name:task``."""
    known, colon, task = name.rpartition(":")
    if not colon:
        return ((name, None),)
    return ((name, None), (known, None if task == _DEFAULT_TAG else task))


def _not_ready(model: Model) -> ModelNotFound | ModelNotReady:
    """Say why a model does not answer."""
    match model.state:
        case ModelState.DISABLED:
            return ModelDisabled(f"model {model.id!r} is disabled: {model.reason}", param="model")
        case ModelState.LOADING | ModelState.READY:
            return ModelNotReady(f"model {model.id!r} is still loading", retry_after_s=5)
        case ModelState.RECOVERING:
            return ModelRecovering(f"model {model.id!r} is being loaded anew: {model.reason}", retry_after_s=5)
        case ModelState.FAILED:
            return ModelUnavailable(f"model {model.id!r} {model.reason}", is_permanent=True)
        case ModelState.STOPPED:
            return ModelUnavailable(f"model {model.id!r} is stopped: {model.reason}", retry_after_s=5)


def _resolve_task(info: ModelInfo, task_of_name: str | None, task: str | None) -> str | None:
    """Choose the task; for a model that has none, any known task is accepted and has no effect.

    That is what makes an A/B by ``model`` alone work: the client sends the same task to either model.
    """
    given = [name for name in (task_of_name, task) if name is not None]
    asked = [canonical_task(name) for name in given]
    if len(set(asked)) > 1:
        raise BadInput(
            f"`model` names the task {_cut(given[0])!r}, and `task` says {_cut(given[1])!r}: leave one of them out",
            param="task",
        )
    if not asked:
        return info.default_task
    allowed = list(info.tasks) or known_task_names()
    if asked[0] not in allowed:
        raise BadInput(
            f"unknown task {_cut(given[0])!r} for model {info.id!r}; one of: {', '.join(allowed)}", param="task"
        )
    return asked[0] if info.tasks else None


def _similar(name: str, names: Sequence[str]) -> str | None:
    """Return the one of the names that another one may be meant for, if there is one.

    Clients of other servers write names in another case, put a provider before it, ``openai/NAME``, or a tag behind it,
    ``NAME:latest``.
    """
    if len(name) > _MAX_SHOWN:
        return None
    folded = {known.casefold(): known for known in reversed(names)}
    last_parts = {known.rpartition("/")[2]: whole for known, whole in folded.items()}
    asked = name.casefold()
    bare = asked.partition(":")[0]
    for form in (asked, bare, asked.partition("/")[2], bare.partition("/")[2], bare.rpartition("/")[2]):
        if (meant := folded.get(form) or last_parts.get(form)) is not None:
            return meant
    close = get_close_matches(bare, folded, n=1, cutoff=0.75)
    return folded[close[0]] if close else None


def _cut(name: str) -> str:
    """Shorten what a client sent, for a message: a name can be as long as a request body."""
    return name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"
