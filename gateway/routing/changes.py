"""The names that a reload changes: for the log, and for the answer to the reload."""

from __future__ import annotations

from gateway.config.registry import Alias, Experiment, Registry
from gateway.experiments.split import Split


def changed_aliases(old: Registry, new: Registry) -> dict[str, str]:
    """Return the change of each alias that is new, gone, or leads elsewhere: ``mini -> jina:retrieval.query``."""
    changes = {}
    for name in [*old.aliases, *(name for name in new.aliases if name not in old.aliases)]:
        before, after = _target(old.aliases.get(name)), _target(new.aliases.get(name))
        if before != after:
            changes[name] = f"{before} -> {after}"
    return changes


def changed_experiments(old: Registry, new: Registry) -> dict[str, str]:
    """Return the change of each experiment, and whether its counts begin again."""
    changes = {}
    for name in dict.fromkeys(experiment.id for experiment in (*old.experiments, *new.experiments)):
        before, after = old.experiment(name), new.experiment(name)
        if before == after:
            continue
        if before is None or after is None:
            changes[name] = "added" if after else "removed"
        elif Split(before).generation != Split(after).generation:
            changes[name] = f"{_arms(before)} -> {_arms(after)}; counts begin again"
        else:
            changes[name] = "changed; counts go on"
    return changes


def _target(alias: Alias | None) -> str:
    if alias is None:
        return "none"
    return f"{alias.model}:{alias.task}" if alias.task else alias.model


def _arms(experiment: Experiment) -> str:
    return ", ".join(f"{arm.label} {arm.weight:g}" for arm in experiment.arms)
