"""The names that a request may send as ``model``, the meaning of each, and the clients that may use it.

The registry alone decides this, so a name can be looked up before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Protocol

from gateway.config.fields import FROM_NAME
from gateway.config.registry import Experiment, Registry
from gateway.config.wording import cut
from gateway.errors import BadInput, ModelNotAllowed, ModelNotFound
from gateway.routing.written import Written, decode_unit, read_after, readings
from gateway.tasks import canonical_task, known_task_names

DEFAULT_ALIAS = "default"
_MAX_SHOWN = 100
_HIDDEN = "…"


class Client(Protocol):
    """The sender of a request, which may use some of the names."""

    def may_use(self, *names: str) -> bool:
        """Return whether the client may use at least one of these names."""


class _Gateway:
    def may_use(self, *_names: str) -> bool:
        return True


GATEWAY: Client = _Gateway()
"""The gateway itself, which may use every name: for its own work, and for probes, which carry no key."""


@dataclass(frozen=True, slots=True)
class Name:
    """The meaning of a name.

    Attributes:
        id: the name as the registry writes it; for a source, the id of its model.
        model: id of the model; for an experiment, the model of its control arm.
        answer: the value of ``model`` in an answer: the name itself if it is a model's id or source, else the model's
            id.
        task: the task that the alias, or a task written after the name, fixes.
        unit: the unit written after the name of an experiment.
        space: the space that the name requires, or its hash alone.
        allow_space_change: a reload may move the name to another space.
    """

    id: str
    model: str
    answer: str
    task: str | None = None
    unit: str | None = None
    space: str | None = None
    experiment: Experiment | None = None
    allow_space_change: bool = False


class Names:
    """Every name of a registry."""

    def __init__(self, registry: Registry) -> None:
        # The later one wins: a model may have the id of the repo from which another model was made.
        self._known = {
            source: Name(model, model, answer=source, allow_space_change=registry.model(model).allow_space_change)
            for source, model in registry.source_names().items()
        }
        self._sources = dict(self._known)
        self._known |= {
            entry.id: Name(entry.id, entry.id, answer=entry.id, allow_space_change=entry.allow_space_change)
            for entry in registry.models
        }
        for experiment in registry.experiments:
            control = experiment.control.model
            self._known[experiment.id] = Name(
                experiment.id,
                control,
                control,
                experiment=experiment,
                allow_space_change=experiment.allow_space_change,
            )
        # A model that may change its space may do so only under its own id, not under its aliases.
        for alias in registry.aliases.values():
            self._known[alias.name] = Name(
                alias.name, alias.model, alias.model, alias.task, allow_space_change=alias.allow_space_change
            )
        self._listed = registry.names()
        self._written_sources = {entry.source for entry in registry.models}
        # The longest first, because the id of an experiment may begin with the id of another and a slash.
        self._experiments = sorted((experiment.id for experiment in registry.experiments), key=len, reverse=True)

    def __iter__(self) -> Iterator[tuple[str, Name]]:
        """Yield every name, sources included, with its meaning."""
        return iter(self._known.items())

    def allows(self, client: Client, name: str) -> bool:
        """Return whether a client may use a name. This is the only rule for the scope of an API key.

        A key for the id of a model may use the model by all of its names. A key for an alias or an experiment may use
        only that alias or experiment: its client does not choose which model answers.
        """
        known = self._known.get(name)
        if known is None:
            return False
        return client.may_use(known.id) if known.experiment else client.may_use(known.id, known.model)

    def usable_by(self, client: Client) -> list[str]:
        """Return every name that a client may use, except sources and tasks."""
        return [name for name in self._listed if self.allows(client, name)]

    def find(self, name: str | None, client: Client) -> Name:
        """Return the meaning of a name.

        Args:
            name: an id, an alias, an experiment, a model's source, or one of these with parts after it, see
                :mod:`gateway.routing.written`; ``None`` for the registry's default.

        Raises:
            ModelNotFound: the registry has no such name.
            ModelNotAllowed: the client may not use it.
            BadInput: no name and no default, a task after an alias for another task, or a unit that the experiment does
                not take or that is not encoded.
        """
        if name is None:
            if DEFAULT_ALIAS not in self._known:
                raise BadInput(f"`model` is required; one of: {', '.join(self.usable_by(client))}", param="model")
            name = DEFAULT_ALIAS
        written = self._read(name)
        if written is None:
            raise self._not_found(name, client)
        known = self._known[written.name]
        if not self.allows(client, written.name):
            # Not the id: a client that knows a source does not therefore know the id of its model.
            raise ModelNotAllowed(f"this API key may not use model {written.name!r}", param="model")
        return known if written == Written(written.name) else _with_parts(known, written, name)

    def shown(self, name: str) -> str:
        """Return a name in a form that may be logged: without a unit, which identifies a person.

        In an unknown name, everything after a slash may be a unit of a removed or misspelled experiment.
        """
        written = self._read(name)
        if written is not None:
            return name if written.unit is None else f"{written.name}/{_HIDDEN}"
        head, slash, _unit = name.partition("/")
        return f"{head}/{_HIDDEN}" if slash and not self._resembles_model(name) else name

    def _read(self, name: str) -> Written | None:
        """Return the parts of a name; ``None`` if the registry does not have it."""
        known = (written for written in readings(name) if written.name in self._known)
        of_units = (written for experiment in self._experiments if (written := read_after(experiment, name)))
        return next(known, None) or next(of_units, None)

    def _resembles_model(self, name: str) -> bool:
        if name in self._written_sources:  # of two models, so that it names neither
            return True
        guess = _similar(name, [*self._known])
        if guess is None or self._known[guess].experiment is not None:
            return False
        return "/" in guess or guess.casefold() == name.rpartition("/")[2].partition(":")[0].casefold()

    def _not_found(self, name: str, client: Client) -> ModelNotFound:
        """Return the error for an unknown name, with a similar name that the client may use as a suggestion."""
        names = self.usable_by(client)
        guess = _similar(name, [*names, *(source for source in self._sources if self.allows(client, source))])
        hint = f" (did you mean {guess!r}?)" if guess else ""
        return ModelNotFound(
            f"no model is called {cut(self.shown(name))!r}{hint}; available: {', '.join(names) or 'none'}",
            param="model",
        )


def _with_parts(known: Name, written: Written, name: str) -> Name:
    """Return the meaning of a name, including the parts written after it.

    Raises:
        BadInput: a task that differs from the fixed one, or a unit that the experiment does not take or that is not encoded.
    """
    unit = None
    if written.unit is not None and known.experiment is not None:
        unit = _unit(known.experiment, written)
    task = known.task if written.task is None else one_task(known.id, known.task, written.task)
    answer = name if known.answer == written.name else known.answer
    return replace(known, task=task, answer=answer, unit=unit, space=written.space_hash)


def _unit(experiment: Experiment, written: Written) -> str:
    if FROM_NAME not in experiment.unit:
        sources = ", ".join(experiment.unit) or "nothing"
        raise BadInput(
            f"experiment {experiment.id!r} takes its unit from {sources}, not from the name: send "
            f"`model` = {experiment.id!r}, or add `{FROM_NAME}` to its `unit` in models.yaml",
            param="model",
        )
    if written.task is not None and written.task not in known_task_names():
        # The apparent task may be a part of the unit.
        raise BadInput(
            f"the text after the colon in `model` is not a task; if it belongs to the unit after {experiment.id + '/'!r}, "
            "write the colon as %3A",
            param="model",
        )
    return decode_unit(experiment.id, written.unit or "")


def one_task(name: str, fixed: str | None, written: str | None) -> str | None:
    """Return the task of a name: the task written after it, or else the task that the registry fixes for it.

    Raises:
        BadInput: the two differ.
    """
    if fixed is not None and written is not None and canonical_task(fixed) != canonical_task(written):
        raise BadInput(
            f"`model` is {cut(f'{name}:{written}')!r}, but {name!r} already means the task {fixed!r}: remove "
            f"`:{cut(written)}`",
            param="model",
        )
    return fixed if written is None else written


def _similar(name: str, names: Sequence[str]) -> str | None:
    """Return the name that a client may have meant, if one is similar.

    Clients of other servers change the case of a name, put a provider before it (``openai/NAME``) or a tag after it
    (``NAME:latest``).
    """
    if len(name) > _MAX_SHOWN:
        return None
    folded = {known.casefold(): known for known in reversed(names)}
    last_parts = {known.rpartition("/")[2]: whole for known, whole in folded.items()}
    wanted = name.casefold()
    bare = wanted.partition(":")[0]
    for form in (wanted, bare, wanted.partition("/")[2], bare.partition("/")[2], bare.rpartition("/")[2]):
        if (meant := folded.get(form) or last_parts.get(form)) is not None:
            return meant
    close = get_close_matches(bare, folded, n=1, cutoff=0.75)
    return folded[close[0]] if close else None
