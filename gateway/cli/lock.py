"""``models.lock.json``: the weights and spaces of a registry, so that no change to them goes unnoticed.

The file is next to the registry, and is committed with it. ``gateway check --locked`` fails if a change of the registry,
of an installed package that holds weights, or of the gateway itself would move a name to another space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.config.files import read_bounded, write_whole
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.errors import StartError
from gateway.precision import CALIBRATED
from gateway.routing.rules import broken_rules
from gateway.tasks import canonical_task
from gateway.types import PREPROCESSING_VERSION, ModelInfo

VERSION = 1
_MAX_BYTES = 16 * 1024 * 1024

ReadInfo: TypeAlias = Callable[[ModelEntry], ModelInfo | None]
"""Returns the info of a model, or ``None`` if its checkpoint is not on this machine."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedModel(_Frozen):
    """A model as it was when the lock was written.

    Attributes:
        prompts: the prompts in the registry. With the revision, they determine the spaces even without the checkpoint.
        fingerprint: the checkpoint's fingerprint; ``None`` if the checkpoint was not on the machine.
        spaces: the space of each task, with native dimensions. A model without tasks has one space, under the empty
            name. The spaces of int8 and uint8 vectors, which depend on the ranges, have the precision's name.
    """

    source: str
    revision: str | None
    prompts: dict[str, str]
    default_task: str | None
    fingerprint: str | None
    spaces: dict[str, str]


class Lock(_Frozen):
    """The content of the file.

    Attributes:
        preprocessing: version of the gateway's own changes to texts.
        aliases: the space of each alias, if the checkpoint of its model was on the machine.
    """

    version: int
    preprocessing: int
    models: dict[str, LockedModel]
    aliases: dict[str, str]


def lock_path(registry: Registry) -> Path:
    """Return the path of a registry's lock: ``models.lock.json`` next to ``models.yaml``."""
    return registry.path.with_suffix(".lock.json")


def read_checkpoint_info(entry: ModelEntry) -> ModelInfo | None:
    """Return the info of a model if its checkpoint is on this machine. Downloads nothing, and loads no weights.

    Raises:
        LoadError: the checkpoint cannot be served.
    """
    if entry.is_remote:  # it has no checkpoint, and a lock is made without asking other servers
        return None
    from gateway.engine.checkpoint.sources import is_whole
    from gateway.engine.loading import plan_load  # imports torch

    return plan_load(entry, may_download=False).info if is_whole(entry) else None


@dataclass(frozen=True, slots=True)
class _Read:
    info: ModelInfo | None


class CheckpointInfos:
    """The infos of the checkpoints on this machine, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, _Read] = {}

    def read(self, entry: ModelEntry) -> ModelInfo | None:
        """Return the info of a model; see :func:`read_checkpoint_info`."""
        if entry.id not in self._known:
            self._known[entry.id] = _Read(read_checkpoint_info(entry))
        return self._known[entry.id].info

    def get(self, model_id: str) -> _Read | None:
        """Return the info that was read for a model, as the rules need it; they leave out disabled models themselves."""
        return self._known.get(model_id)


def make_lock(registry: Registry, before: Lock | None, read_info: ReadInfo = read_checkpoint_info) -> Lock:
    """Return the lock of a registry as it is now.

    Args:
        before: the previous lock. A model whose checkpoint is not on this machine keeps its part of the previous lock,
            unless its entry has changed.

    Raises:
        LoadError: a checkpoint on this machine cannot be served.
    """
    infos = {entry.id: read_info(entry) for entry in registry.models}
    models = {}
    for entry in registry.models:
        locked = (before.models if before else {}).get(entry.id)
        info = infos[entry.id]
        is_still_right = locked is not None and not [*_changes(entry, locked, None)]
        models[entry.id] = locked if info is None and is_still_right and locked else _locked(entry, info)
    return Lock(
        version=VERSION,
        preprocessing=PREPROCESSING_VERSION,
        models=models,
        aliases={
            alias.name: space
            for alias in registry.aliases.values()
            if (space := _alias_space(alias, infos[alias.model], models[alias.model])) is not None
        },
    )


def _locked(entry: ModelEntry, info: ModelInfo | None) -> LockedModel:
    return LockedModel(
        source=entry.written_source,
        revision=entry.revision,
        prompts=dict(entry.prompts),
        default_task=entry.default_task,
        fingerprint=info.fingerprint if info else None,
        spaces=_spaces(info) if info else {},
    )


def _spaces(info: ModelInfo) -> dict[str, str]:
    quantized = {name.value: info.space(precision=name) for name in sorted(CALIBRATED) if info.ranges}
    return {task or "": space for task, space in info.spaces_by_task().items()} | quantized


def _alias_space(alias: Alias, info: ModelInfo | None, model: LockedModel) -> str | None:
    if info is None:
        task = canonical_task(alias.task or model.default_task or "")
        return model.spaces.get(task, model.spaces.get(""))
    return info.space(alias.task)


def differences(registry: Registry, lock: Lock, read_info: ReadInfo = read_checkpoint_info) -> list[str]:
    """Return each difference between a registry and its lock, as a message.

    Raises:
        LoadError: a checkpoint on this machine cannot be served.
    """
    now = make_lock(registry, lock, read_info)
    found = []
    if now.preprocessing != lock.preprocessing:
        found.append(
            f"this gateway preprocesses texts by version {now.preprocessing}, but the lock has version "
            f"{lock.preprocessing}: every space changes"
        )
    for entry in registry.models:
        locked = lock.models.get(entry.id)
        fingerprint = now.models[entry.id].fingerprint
        found += [f"models: {entry.id} is not in the lock"] if locked is None else _changes(entry, locked, fingerprint)
        if locked is not None and locked.fingerprint is not None:
            found += _moved(f"models: {entry.id}", locked.spaces, now.models[entry.id].spaces)
    known = {entry.id for entry in registry.models}
    found += [
        f"models: {name} is in the lock, but no longer in the registry" for name in lock.models if name not in known
    ]
    # A new alias of a model whose checkpoint was not there when the lock was written has not moved.
    unread = {name for name, model in lock.models.items() if model.fingerprint is None}
    aliases = {
        name: space
        for name, space in now.aliases.items()
        if name in lock.aliases or registry.aliases[name].model not in unread
    }
    found += _moved("aliases:", lock.aliases, aliases)
    return found


def check_rules(registry: Registry, infos: CheckpointInfos) -> None:
    """Check the rules between the models whose checkpoints have been read.

    Raises:
        StartError: a rule is broken, so the gateway would not start.
    """
    if broken := broken_rules(registry, infos):
        raise StartError("\n".join(f"{registry.path}: {problem}" for problem in broken))


def check_lock(registry: Registry) -> list[str]:
    """Check a registry against its lock and its rules, and return the models whose checkpoints are not on this machine.

    Raises:
        StartError: the registry differs from its lock, breaks a rule, or has no lock; or a checkpoint cannot be served.
    """
    path = lock_path(registry)
    lock = read_lock(path)
    if lock is None:
        raise StartError(f"{path} does not exist; write it with `gateway lock`")
    infos = CheckpointInfos()
    found = differences(registry, lock, infos.read)
    check_rules(registry, infos)
    if found:
        advice = (
            "Stored vectors of these names could not be compared with new ones. If that is intended: `gateway lock`."
        )
        raise StartError("\n".join([*found, advice]))
    return [entry.id for entry in registry.models if not entry.is_remote and infos.read(entry) is None]


def _changes(entry: ModelEntry, locked: LockedModel, fingerprint: str | None) -> Iterator[str]:
    """Yield each difference between a registry entry and its lock that can change the model's spaces.

    Args:
        fingerprint: the fingerprint of the checkpoint on this machine. If it equals the locked fingerprint, the weights
            are the same, wherever they came from.
    """
    # Older locks hold folders as absolute paths.
    has_moved = locked.source not in {entry.written_source, entry.source}
    is_same_checkpoint = fingerprint is not None and fingerprint == locked.fingerprint
    compared: list[tuple[str, object, object]] = []
    if has_moved and not is_same_checkpoint:
        compared.append(("source", locked.source, entry.written_source))
    if not (has_moved and is_same_checkpoint):
        compared.append(("revision", locked.revision, entry.revision))
    compared += [
        ("prompts", locked.prompts, dict(entry.prompts)),
        ("default_task", locked.default_task, entry.default_task),
    ]
    for name, was, is_now in compared:
        if was != is_now:
            yield f"models: {entry.id}: {name} is {is_now!r}, but the lock says {was!r}"


def _moved(where: str, locked: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(locked.keys() | now.keys()):
        was, is_now = locked.get(name), now.get(name)
        if was != is_now:
            what = f"{where} {name}".rstrip() + ":"
            yield f"{what} would be in {is_now or 'no space'}, but the lock {f'says {was}' if was else 'does not have it'}"


def read_lock(path: Path) -> Lock | None:
    """Read a lock; ``None`` if the file does not exist.

    Raises:
        StartError: the file is not a lock.
    """
    try:
        text = read_bounded(path, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        lock = Lock.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StartError(
            f"{path}: is not a lock: {where}: {first['msg']}; write it again with `gateway lock`"
        ) from error
    if lock.version != VERSION:
        raise StartError(f"{path}: is a lock of version {lock.version}, but this gateway reads version {VERSION}")
    return lock


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock, in a format in which a change to one model changes few lines.

    Raises:
        StartError: the lock cannot be written; the previous lock stays.
    """
    try:
        write_whole(path, json.dumps(lock.model_dump(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StartError(f"{path}: cannot be written: {error.strerror}") from error
