"""Checks whether the vectors of two models can be compared, and whether a model can replace another."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.types import ModelInfo


def is_same_space(one: str, other: str) -> bool:
    """Return whether two space ids name the same space, regardless of the part before the ``@``."""
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def why_not_interchangeable(info: ModelInfo, other: ModelInfo) -> str:
    """Return the reason why another model cannot replace a model with identical vectors; empty if it can."""
    return next(_differences(info, other), "")


def why_other_ranges(info: ModelInfo, other: ModelInfo) -> str:
    """Return the reason why the int8 and uint8 vectors of two models in one space cannot be compared, or nothing."""
    is_same = all(
        info.ranges.get(size) == other.ranges.get(size) for size in info.dimensions if size in other.dimensions
    )
    return "" if is_same else f"{info.id} and {other.id} have different `ranges` for int8 vectors"


def _differences(info: ModelInfo, other: ModelInfo) -> Iterator[str]:
    spaces, others = info.spaces_by_task(), other.spaces_by_task()
    for task, space in spaces.items():
        if task not in others:
            yield f"{other.id} has no task {task!r}" if task else f"{other.id} has tasks, and {info.id} has none"
        elif not is_same_space(space, others[task]):
            yield f"{info.id} is in space {space}, and {other.id} in {others[task]}" + (f" ({task})" if task else "")
    if reason := why_other_ranges(info, other):
        yield reason
    if info.default_task != other.default_task:
        yield f"the default task of {info.id} is {info.default_task}, and that of {other.id} is {other.default_task}"
    if other.max_tokens < info.max_tokens:
        yield f"{other.id} would cut texts to {other.max_tokens} tokens, and {info.id} to {info.max_tokens}"
    if missing := [str(size) for size in info.dimensions if size not in other.dimensions]:
        yield f"{other.id} does not allow vectors of {', '.join(missing)} dimensions"
    if missing := [output.value for output in info.outputs if output not in other.outputs]:
        yield f"{other.id} does not return {', '.join(missing)}"
