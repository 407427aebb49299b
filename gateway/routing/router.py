"""Resolve the ``model`` and ``task`` of a request to the target that answers it, without guessing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.config.fields import FROM_NAME
from gateway.config.registry import Arm, Experiment, Registry
from gateway.config.wording import cut
from gateway.errors import (
    BadInput,
    ModelDisabled,
    ModelNotAllowed,
    ModelNotFound,
    ModelNotReady,
    ModelRecovering,
    ModelUnavailable,
    UnsupportedOutput,
)
from gateway.experiments.split import Assignment, Split, UnitSource
from gateway.fleet import Fleet, Model
from gateway.routing.names import GATEWAY, Client, Names, one_task
from gateway.routing.spaces import why_not_interchangeable
from gateway.tasks import find_task, known_task_names
from gateway.types import DOES, ModelInfo, ModelKind, ModelState


@dataclass(frozen=True, slots=True)
class Choice:
    """The model that a name leads to, ready or not.

    Attributes:
        task: the task that the name, the alias or the arm fixes.
        asked: the model, alias or experiment that the request names, as the registry writes it.
        name: the value of ``model`` in the answer: the name in the request if it is a model's, else the model's id.
        space: the space that the name requires, or its hash alone.
        assignment: the arm of the request, if it names an experiment.
        experiment: the experiment that the request names; without an assignment, ``model`` is that of the control arm.
    """

    model: Model
    task: str | None
    asked: str
    name: str
    space: str | None = None
    assignment: Assignment | None = None
    experiment: Experiment | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One model that can answer a request, with one task.

    Attributes:
        choice: the choice that led here; ``model`` is its model or a fallback for it.
        task: one of the model's tasks, or ``None``.
    """

    choice: Choice
    model: Model
    info: ModelInfo
    task: str | None


class Router:
    """Resolves names to models. The registry fixes the names; only the state of the models changes."""

    def __init__(self, registry: Registry, fleet: Fleet) -> None:
        self.names = Names(registry)
        self._fleet = fleet
        self._splits = {experiment.id: Split(experiment) for experiment in registry.experiments}
        self._fallbacks = registry.fallbacks

    def listed(self, client: Client) -> list[Choice]:
        """Return every model and experiment that a client may use, each once.

        Models and experiments have their ids; an alias is listed only where the client may not use its model's id.
        """
        choices = [self.choose(name, client) for name in self.names.usable_by(client)]
        return [
            choice
            for choice in choices
            if choice.experiment or choice.asked == choice.model.id or not self.names.allows(client, choice.model.id)
        ]

    def choose(self, name: str | None, client: Client, unit_source: UnitSource | None = None) -> Choice:
        """Return the model that a name leads to.

        Args:
            name: see :meth:`gateway.routing.names.Names.find`.
            unit_source: looks up the values that an experiment can make a unit from; ``None`` for no request in particular,
                which gets the control arm and no assignment.

        Raises:
            ModelNotFound: no model, alias or experiment has that name.
            ModelNotAllowed: the client may not use it.
            BadInput: no name and no default, two tasks that differ, or a request that forces an unknown arm.
        """
        known = self.names.find(name, client)
        if known.experiment is None:
            return Choice(self._model(known.model), known.task, known.id, known.answer, known.space)
        assignment = None
        if unit_source is not None:
            source = unit_source if known.unit is None else _with_unit(known.unit, unit_source)
            assignment = self._splits[known.id].assign(source, datetime.now(UTC))
        arm = assignment.arm if assignment else known.experiment.control
        task = one_task(known.id, arm.task, known.task)
        return Choice(self._model(arm.model), task, known.id, arm.model, known.space, assignment, known.experiment)

    def choose_for(
        self, kind: ModelKind, name: str | None, client: Client, unit_source: UnitSource | None = None
    ) -> Choice:
        """Return the model that a name leads to, if it is of the kind that a request needs.

        Args:
            name, unit_source: see :meth:`choose`. A request to rerank or classify without a name gets the only model of
                that kind.

        Raises:
            UnsupportedOutput: the model is of another kind; the message names those of this kind that the client may
                use.
            RequestError: an error of :meth:`choose`; or a request to rerank or classify has no name, and no model or
                several models can do it, or the models are not known yet.
        """
        if name is None and kind is not ModelKind.EMBED:
            name = self._only_one(kind, client)
        choice = self.choose(name, client, unit_source)
        info = choice.model.info
        if info is None or _can(info, kind):  # `targets` raises the error for a model that has not been read
            if choice.space is not None and info is not None and info.kind is not ModelKind.EMBED:
                raise BadInput(
                    f"model {choice.asked!r} returns no vectors, so it has no space: remove `@{choice.space}`",
                    param="model",
                )
            return choice
        others = ", ".join(self._names_of(kind, client)) or "none"
        raise UnsupportedOutput(
            f"model {choice.asked!r} {DOES[info.kind]} texts and does not {kind}; models that {kind}: {others}",
            param="model",
        )

    def _only_one(self, kind: ModelKind, client: Client) -> str:
        """Return the name of the only model of a kind that a client may use."""
        names = self._names_of(kind, client)
        if len(names) > 1:  # a model of this kind precedes a model that does the work with its vectors
            names = [name for name in names if self._kind_of(name, client) is kind] or names
        if len(names) == 1:
            return names[0]
        if not self._fleet.started.is_set():
            raise ModelNotReady("the models are still loading; try again, or name one in `model`", retry_after_s=5)
        if names:
            raise BadInput(f"`model` is required, as several models {kind}: {', '.join(names)}", param="model")
        if self._names_of(kind, GATEWAY):
            raise ModelNotAllowed(f"this API key may not use any model that {DOES[kind]}", param="model")
        raise BadInput(f"no model in the registry {DOES[kind]}", param="model")

    def _names_of(self, kind: ModelKind, client: Client) -> list[str]:
        """Return the names of a kind's models that a client may use; a model that has not been read has no kind."""
        return [
            choice.asked
            for choice in self.listed(client)
            if choice.experiment is None and choice.model.info is not None and _can(choice.model.info, kind)
        ]

    def _kind_of(self, name: str, client: Client) -> ModelKind | None:
        info = self.choose(name, client).model.info
        return None if info is None else info.kind

    def targets(self, choice: Choice, task: str | None) -> list[Target]:
        """Return the targets that can answer a request: the chosen model and its fallbacks, if they take requests.

        All targets are in the same space.

        Args:
            task: the request's task by any of its names, or ``None``.

        Raises:
            ModelNotFound: the model is disabled.
            BadInput: the task is unknown, or differs from the one that the name fixes.
            ModelNotReady: the model is loading, and no fallback is ready.
            ModelUnavailable: the model failed to load, and no fallback is ready.
        """
        targets = [
            Target(choice, model, info, _resolve_task(info, choice.task, task))
            for model, info in self._candidates(choice.model)
        ]
        if not targets:
            raise _not_ready(choice.model)
        return targets

    def resolve(self, name: str | None, task: str | None, unit_source: UnitSource | None = None) -> Target:
        """Return the first of the :meth:`targets` of a name, for the gateway's own work, which may use every name."""
        return self.targets(self.choose(name, GATEWAY, unit_source), task)[0]

    def task_of(self, choice: Choice) -> str | None:
        """Return the task of a request without a task, for a chosen name; ``None`` before the model has been read.

        Raises:
            BadInput: the name fixes a task that the model does not know.
        """
        return _resolve_task(choice.model.info, choice.task, None) if choice.model.info else None

    def arms(self, choice: Choice) -> list[tuple[Arm, Model, str | None]]:
        """Return the arms of the experiment that a choice names, each with its model and its task.

        Raises:
            BadInput: the name fixes a task that an arm does not know, or that differs from the arm's own.
        """
        assert choice.experiment is not None  # noqa: S101  the caller has checked
        # The task of the choice is that of the name only if the control arm has none.
        of_name = None if choice.experiment.control.task else choice.task
        arms = []
        for arm in choice.experiment.arms:
            model = self._model(arm.model)
            arms.append((arm, model, _resolve_task(model.info, arm.task, of_name) if model.info else None))
        return arms

    def generation(self, experiment_id: str) -> str:
        """Return the generation of an experiment; see :class:`gateway.experiments.split.Assignment`."""
        return self._splits[experiment_id].generation

    def _candidates(self, model: Model) -> Iterator[tuple[Model, ModelInfo]]:
        """Yield the model, and the fallbacks with the same vectors, if they take requests."""
        if model.takes_requests and model.info is not None:
            yield model, model.info
        if model.state is ModelState.DISABLED or model.info is None:
            return
        for name in self._fallbacks.get(model.id, ()):
            other = self._fleet.get(name)
            if (
                other is not None
                and other.takes_requests
                and other.info is not None
                and not why_not_interchangeable(model.info, other.info)
            ):
                yield other, other.info

    def _model(self, model_id: str) -> Model:
        model = self._fleet.get(model_id)
        assert model is not None  # noqa: S101  the registry has checked it
        return model


def _with_unit(unit: str, unit_source: UnitSource) -> UnitSource:
    """Return the lookup of a request's values, with the unit written in its name."""
    return lambda source: unit if source == FROM_NAME else unit_source(source)


def _can(info: ModelInfo, kind: ModelKind) -> bool:
    """Return whether a model can do the work of a kind: some models that embed also rerank, by their vectors."""
    return info.kind is kind or (kind is ModelKind.RERANK and bool(info.rerank))


def _not_ready(model: Model) -> ModelNotFound | ModelNotReady:
    """Return the error with the reason why a model does not answer."""
    match model.state:
        case ModelState.DISABLED:
            return ModelDisabled(f"model {model.id!r} is disabled: {model.reason}", param="model")
        case ModelState.DOWNLOADING:
            return ModelNotReady(f"model {model.id!r} is still loading ({model.reason})", retry_after_s=30)
        case ModelState.LOADING | ModelState.UNLOADED | ModelState.READY:
            return ModelNotReady(f"model {model.id!r} is still loading", retry_after_s=5)
        case ModelState.RECOVERING:
            return ModelRecovering(f"model {model.id!r} is recovering: {model.reason}", retry_after_s=5)
        case ModelState.FAILED:
            return ModelUnavailable(f"model {model.id!r} {model.reason}", is_permanent=True)
        case ModelState.STOPPED:
            return ModelUnavailable(f"model {model.id!r} is stopped: {model.reason}", retry_after_s=5)


def _resolve_task(info: ModelInfo, task_of_name: str | None, task: str | None) -> str | None:
    """Return the task to use. A model without tasks accepts every known task and ignores it.

    An A/B test can therefore change ``model`` alone: the client sends the same task to both models.
    """
    written = [name for name in (task_of_name, task) if name is not None]
    allowed = list(info.tasks) or known_task_names()
    tasks = [find_task(name, allowed) for name in written]
    if len({found or name for found, name in zip(tasks, written, strict=True)}) > 1:
        raise BadInput(
            f"`model` names the task {cut(written[0])!r}, and `task` says {cut(written[1])!r}: leave one of them out",
            param="task",
        )
    if not tasks:
        return info.default_task
    if tasks[0] is None:
        raise BadInput(
            f"unknown task {cut(written[0])!r} for model {info.id!r}; one of: {', '.join(allowed)}", param="task"
        )
    return tasks[0] if info.tasks else None
