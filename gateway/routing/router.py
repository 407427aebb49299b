"""From the ``model`` and ``task`` of a request to the target that answers it. Never a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.backends.base import Backend
from gateway.backends.fleet import Fleet, Model
from gateway.config.registry import Alias, Registry
from gateway.embedding import ModelInfo, ModelState, canonical_task, known_task_names
from gateway.errors import BadInput, ModelNotFound, ModelNotReady, ModelRecovering, ModelUnavailable

DEFAULT_ALIAS = "default"
_MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request: one model, with one task.

    Attributes:
        name: what the answer says in ``model``: the name that was asked for, or the model's id if that was an alias.
        task: one of the model's tasks, or ``None``.
    """

    name: str
    info: ModelInfo
    backend: Backend
    task: str | None


class Router:
    """Resolves names. Everything it knows is fixed by the registry; only the state of the models changes."""

    def __init__(self, registry: Registry, fleet: Fleet) -> None:
        self._fleet = fleet
        self._aliases = registry.aliases
        sources: dict[str, list[str]] = {}
        for entry in registry.models:
            sources.setdefault(entry.source, []).append(entry.id)
        # A source that two models share names neither of them.
        self._sources = {source: ids[0] for source, ids in sources.items() if len(ids) == 1}

    def names(self) -> list[str]:
        """Return every name that a request may use, except sources and tasks."""
        return [*(model.id for model in self._fleet), *self._aliases]

    def resolve(self, name: str | None, task: str | None) -> Target:
        """Find the target of a request.

        Args:
            name: an id, an alias, a model's source, or ``id:task``; ``None`` for the registry's default.
            task: a task by any of its names, or ``None``.

        Raises:
            ModelNotFound: nothing has that name, or the model is disabled.
            BadInput: no name and no default; an unknown task; or two tasks that differ.
            ModelNotReady: the model is loading.
            ModelUnavailable: the model failed to load.
        """
        if name is None:
            if DEFAULT_ALIAS not in self._aliases:
                raise BadInput(f"`model` is required; one of: {', '.join(self.names())}", param="model")
            name = DEFAULT_ALIAS
        model, task_of_name, is_alias = self._find(name)
        info = _require_ready(model)
        return Target(
            name=model.id if is_alias else name,
            info=info,
            backend=model.backend,
            task=_resolve_task(info, task_of_name, task),
        )

    def find(self, name: str) -> tuple[Model, str | None]:
        """Return the model of a name, ready or not, and the task that the name stands for.

        Args:
            name: as for ``resolve``.

        Raises:
            ModelNotFound: nothing has that name.
            BadInput: the name holds a task that the model does not know.
        """
        model, task, _is_alias = self._find(name)
        return model, _resolve_task(model.info, task, None) if model.info else None

    def _find(self, name: str) -> tuple[Model, str | None, bool]:
        """Return the model of a name, the task in the name, and whether the name is an alias."""
        alias: Alias | None = self._aliases.get(name)
        if alias is not None:
            model = self._fleet.get(alias.model)
            assert model is not None  # noqa: S101  the registry has checked it
            return model, alias.task, True
        for model_id, task in self._readings(name):
            # An id comes first: a model may be called like the repo that another one was made from.
            model = self._fleet.get(model_id) or self._fleet.get(self._sources.get(model_id, ""))
            if model is not None:
                return model, task, False
        raise ModelNotFound(f"no model is called {_cut(name)!r}; there are: {', '.join(self.names())}", param="model")

    @staticmethod
    def _readings(name: str) -> Sequence[tuple[str, str | None]]:
        """Return the ways to read a name: as it is (a source may hold a colon), or as ``id:task``."""
        model_id, colon, task = name.rpartition(":")
        return ((name, None), (model_id, task)) if colon else ((name, None),)


def _require_ready(model: Model) -> ModelInfo:
    match model.state:
        case ModelState.READY if model.info is not None:
            return model.info
        case ModelState.DISABLED:
            raise ModelNotFound(f"model {model.id!r} is disabled: {model.reason}", param="model")
        case ModelState.LOADING | ModelState.READY:
            raise ModelNotReady(f"model {model.id!r} is still loading", retry_after_s=5)
        case ModelState.RECOVERING:
            raise ModelRecovering(f"model {model.id!r} is being loaded anew: {model.reason}", retry_after_s=5)
        case ModelState.FAILED:
            raise ModelUnavailable(f"model {model.id!r} {model.reason}", is_permanent=True)
        case ModelState.STOPPED:
            raise ModelUnavailable(f"model {model.id!r} is stopped: {model.reason}", retry_after_s=5)


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
