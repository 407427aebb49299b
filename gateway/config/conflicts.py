"""What is wrong between entries of ``models.yaml`` that are right by themselves: names taken twice, targets that are none.

Works on the entries as they were read, so that a conflict is found also where another entry cannot be understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from gateway.config.wording import did_you_mean, enumerate_names, quote

KeyPath: TypeAlias = tuple[str | int, ...]


class Conflict(NamedTuple):
    """Something that is wrong at a place of the file.

    Attributes:
        is_in_key: the problem is with the key at ``path`` itself, rather than with its value.
    """

    path: KeyPath
    message: str
    is_in_key: bool = False


@dataclass(slots=True)
class _Names:
    """The names that are taken, by their folded form: two that differ only in case are a trap for clients."""

    ids: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # the model of each source
    aliases: dict[str, str] = field(default_factory=dict)  # as they are written, with their targets
    experiments: dict[str, str] = field(default_factory=dict)


def find_conflicts(entries: Mapping[str, object]) -> Iterator[Conflict]:
    """Find what is wrong between entries.

    Args:
        entries: the file's top level, read and not necessarily valid; what has another shape than it should is skipped.
    """
    names = _Names()
    yield from _take_model_names(entries, names)
    aliases = entries.get("aliases")
    for alias, entry in aliases.items() if isinstance(aliases, dict) else ():
        if isinstance(entry, dict) and isinstance(target := entry.get("model"), str):
            names.aliases[alias] = target
    for _index, experiment in _mappings(entries, "experiments"):
        if isinstance(name := experiment.get("id"), str):
            names.experiments.setdefault(name.casefold(), name)
    yield from _alias_conflicts(names)
    yield from _experiment_conflicts(entries, names)
    yield from _shadow_conflicts(entries, names)
    yield from _fallback_conflicts(entries, names)
    yield from _same_space_conflicts(entries, names)


def _take_model_names(entries: Mapping[str, object], names: _Names) -> Iterator[Conflict]:
    for index, entry in _mappings(entries, "models"):
        match entry:
            case {"id": str(model_id), **rest}:
                source = rest.get("source")
            case _:
                continue
        if model_id.casefold() in names.ids:
            taken = quote(names.ids[model_id.casefold()])
            yield Conflict(("models", index, "id"), f"must be unique, and {taken} is taken by another model")
        names.ids.setdefault(model_id.casefold(), model_id)
        names.owners.setdefault(source.casefold() if isinstance(source, str) else "", model_id)


def _alias_conflicts(names: _Names) -> Iterator[Conflict]:
    for alias, target in names.aliases.items():
        path = ("aliases", alias)
        if alias.casefold() in names.ids:
            yield Conflict(path, "is the id of a model; choose another name for the alias", is_in_key=True)
        elif alias.casefold() in names.owners:
            owner = quote(names.owners[alias.casefold()])
            yield Conflict(path, f"is the source of {owner}, which answers to it already", is_in_key=True)
        if target not in names.ids.values():
            yield Conflict((*path, "model"), _wrong_target(target, names))


def _experiment_conflicts(entries: Mapping[str, object], names: _Names) -> Iterator[Conflict]:
    folded_aliases = {alias.casefold() for alias in names.aliases}
    seen: set[str] = set()
    for index, entry in _mappings(entries, "experiments"):
        path = ("experiments", index)
        if isinstance(name := entry.get("id"), str):
            folded = name.casefold()
            if folded in names.ids:
                yield Conflict((*path, "id"), "is the id of a model; choose another name for the experiment")
            elif folded in names.owners:
                owner = quote(names.owners[folded])
                yield Conflict((*path, "id"), f"is the source of {owner}, which answers to it already")
            elif folded in folded_aliases:
                yield Conflict((*path, "id"), "is an alias; choose another name for the experiment")
            elif folded in seen:
                taken = quote(names.experiments[folded])
                yield Conflict((*path, "id"), f"must be unique, and {taken} is taken by another experiment")
            seen.add(folded)
        for arm_index, arm in _mappings(entry, "arms"):
            if isinstance(model := arm.get("model"), str) and model not in names.ids.values():
                yield Conflict((*path, "arms", arm_index, "model"), _wrong_target(model, names))


def _shadow_conflicts(entries: Mapping[str, object], names: _Names) -> Iterator[Conflict]:
    known = [*names.ids.values(), *names.aliases, *names.experiments.values()]
    for index, entry in _mappings(entries, "shadows"):
        path = ("shadows", index)
        of, to = entry.get("of"), entry.get("to")
        if isinstance(of, str) and of not in known:
            guess = did_you_mean(of, known) or ";"
            yield Conflict(
                (*path, "of"),
                f"is no model, alias or experiment, got {quote(of)}{guess} names: {enumerate_names(known)}",
            )
        if isinstance(to, str) and to not in names.ids.values():
            yield Conflict((*path, "to"), _wrong_target(to, names))
        elif isinstance(of, str) and to == names.aliases.get(of, of):
            yield Conflict((*path, "to"), f"is the model that answers {quote(of)} itself; a shadow is a second model")


def _fallback_conflicts(entries: Mapping[str, object], names: _Names) -> Iterator[Conflict]:
    fallbacks = entries.get("fallbacks")
    for model, others in fallbacks.items() if isinstance(fallbacks, dict) else ():
        path = ("fallbacks", model)
        if model not in names.ids.values():
            yield Conflict(path, _wrong_target(model, names), is_in_key=True)
        for index, other in enumerate(others if isinstance(others, tuple) else ()):
            if other == model:
                yield Conflict((*path, index), "is the model itself; a fallback is another one of the same space")
            elif isinstance(other, str) and other not in names.ids.values():
                yield Conflict((*path, index), _wrong_target(other, names))


def _same_space_conflicts(entries: Mapping[str, object], names: _Names) -> Iterator[Conflict]:
    chained = {entry.get("id") for _index, entry in _mappings(entries, "models") if entry.get("same_space_as")}
    for index, entry in _mappings(entries, "models"):
        other = entry.get("same_space_as")
        path = ("models", index, "same_space_as")
        if not isinstance(other, str):
            continue
        if other == entry.get("id"):
            yield Conflict(path, "is the model itself; name the other one that has the same weights")
        elif other not in names.ids.values():
            yield Conflict(path, _wrong_target(other, names))
        elif other in chained:
            yield Conflict(path, f"must be a model whose space is its own, and {quote(other)} has that of another one")


def _wrong_target(target: str, names: _Names) -> str:
    """Say what a name that should be a model's id is instead."""
    ids = names.ids.values()
    model_id, colon, task = target.partition(":")
    if colon and model_id in ids:
        return f"must be a model id alone, got {quote(target)}; write `{{model: {model_id}, task: {task}}}`"
    if target in names.aliases:
        right = f"; write {quote(names.aliases[target])}" if names.aliases[target] in ids else ""
        return f"must be a model id, and {quote(target)} is an alias{right}"
    if target in names.experiments.values():
        return f"must be a model id, and {quote(target)} is an experiment"
    if target.casefold() in names.owners:
        return f"must be a model id, and {quote(target)} is a source; write {quote(names.owners[target.casefold()])}"
    guess = did_you_mean(target, ids) or ";"
    return f"is not a model of this file, got {quote(target)}{guess} models: {enumerate_names(ids)}"


def _mappings(entries: Mapping[str, object], key: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the mappings in the list that stands under a key, with their indices."""
    values = entries.get(key)
    for index, value in enumerate(values if isinstance(values, tuple) else ()):
        if isinstance(value, dict):
            yield index, value
