"""From the ``model`` and ``task`` of a request to the target that answers it. Never a guess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from gateway.backends.fleet import Fleet, Model
from gateway.config.registry import Registry
from gateway.embedding import ModelInfo, ModelState, canonical_task, known_task_names
from gateway.errors import BadInput, ModelNotFound, ModelNotReady, ModelRecovering, ModelUnavailable
from gateway.routing.experiments import Assignment, Attribute, Split
from gateway.routing.spaces import why_no_stand_in

DEFAULT_ALIAS = "default"
_MAX_SHOWN = 100


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
    """

    model: Model
    task: str | None
    asked: str
    name: str
    assignment: Assignment | None = None


# What Ollama's clients, and those of its OpenAI paths, add to a name without a tag; it is no task.
_DEFAULT_TAG = "latest"


class Router:
    """Resolves names. Everything it knows is fixed by the registry; only the state of the models changes."""

    def __init__(self, registry: Registry, fleet: Fleet) -> None:
        self._fleet = fleet
        self._aliases = registry.aliases
        self._splits = {experiment.id: Split(experiment) for experiment in registry.experiments}
        self._fallbacks = registry.fallbacks
        sources: dict[str, list[str]] = {}
        for entry in registry.models:
            sources.setdefault(entry.source, []).append(entry.id)
        # A source that two models share names neither of them.
        self._sources = {source: ids[0] for source, ids in sources.items() if len(ids) == 1}

    def names(self) -> list[str]:
        """Return every name that a request may use, except sources and tasks."""
        return [*(model.id for model in self._fleet), *self._aliases, *self._splits]

    def choose(self, name: str | None, attribute: Attribute | None = None) -> Choice:
        """Find the model that a name stands for.

        Args:
            name: an id, an alias, an experiment, a model's source, or one of these with a task, ``name:task``; ``None``
                for the registry's default.
            attribute: looks up what the unit of an experiment can be made from; ``None`` when nobody in particular asks,
                who gets the control arm.

        Raises:
            ModelNotFound: nothing has that name.
            BadInput: no name and no default; two tasks that differ; or an arm is forced that there is not.
        """
        if name is None:
            if DEFAULT_ALIAS not in self._aliases:
                raise BadInput(f"`model` is required; one of: {', '.join(self.names())}", param="model")
            name = DEFAULT_ALIAS
        for known, task in _readings(name):
            choice = self._choose_known(known, attribute)
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
        raise ModelNotFound(f"no model is called {_cut(name)!r}; there are: {', '.join(self.names())}", param="model")

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

    def resolve(self, name: str | None, task: str | None, attribute: Attribute | None = None) -> Target:
        """Return the first of the :meth:`targets` of a name; for its arguments and errors see :meth:`choose` as well."""
        return self.targets(self.choose(name, attribute), task)[0]

    def find(self, name: str) -> tuple[Model, str | None]:
        """Return the model of a name, ready or not, and the task that the name stands for.

        Args:
            name: as for ``resolve``; an experiment's stands for its control arm.

        Raises:
            ModelNotFound: nothing has that name.
            BadInput: the name holds a task that the model does not know.
        """
        choice = self.choose(name)
        return choice.model, _resolve_task(choice.model.info, choice.task, None) if choice.model.info else None

    def generation(self, experiment_id: str) -> str:
        """Return the generation of an experiment; see :class:`gateway.routing.experiments.Assignment`."""
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

    def _choose_known(self, name: str, attribute: Attribute | None) -> Choice | None:
        """Return what a name without a task stands for, if it is one."""
        if (alias := self._aliases.get(name)) is not None:
            return Choice(self._model(alias.model), alias.task, asked=name, name=alias.model)
        if (split := self._splits.get(name)) is not None:
            assignment = split.assign(attribute, datetime.now(UTC)) if attribute else None
            arm = assignment.arm if assignment else split.experiment.control
            return Choice(self._model(arm.model), arm.task, asked=name, name=arm.model, assignment=assignment)
        # An id comes first: a model may be called like the repo that another one was made from.
        model = self._fleet.get(name) or self._fleet.get(self._sources.get(name, ""))
        return None if model is None else Choice(model, None, asked=model.id, name=name)

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
            return ModelNotFound(f"model {model.id!r} is disabled: {model.reason}", param="model")
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


def _cut(name: str) -> str:
    """Shorten what a client sent, for a message: a name can be as long as a request body."""
    return name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"
