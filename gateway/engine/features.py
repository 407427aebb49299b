"""Read the features that a registry entry requests from its checkpoint, and check that the checkpoint has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.prompts import tasks_of
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.reranking import choose_weights
from gateway.errors import LoadError
from gateway.precision import Ranges
from gateway.ranges import read as read_ranges
from gateway.tasks import RETRIEVAL, canonical_task
from gateway.types import Output


@dataclass(frozen=True, slots=True)
class Features:
    """The served features of a model: those that its entry requests, or the checkpoint's own values.

    Attributes:
        outputs: the outputs that are served.
        dimensions: accepted sizes of a dense vector, largest first; empty for a model without dense vectors.
        tasks: instruction of each task, by canonical name.
        instruction: the instruction for a text without a task.
        ranges: ranges of the dimensions, by size, if the registry names a file.
    """

    outputs: tuple[Output, ...]
    max_tokens: int
    dimensions: tuple[int, ...]
    tasks: dict[str, str]
    instruction: str
    ranges: Mapping[int, Ranges]


def read_features(entry: ModelEntry, checkpoint: Checkpoint) -> Features:
    """Read an entry and its checkpoint together.

    Raises:
        LoadError: the checkpoint lacks a feature that the entry requests.
    """
    if checkpoint.classifier is not None:
        _require_no_vectors(entry)
    max_tokens = _max_tokens(entry, checkpoint)
    tasks = _tasks(entry, checkpoint)
    outputs = _outputs(entry, checkpoint)
    choose_weights(entry, outputs)
    dimensions = _dimensions(entry, checkpoint)
    ranges = read_ranges(entry.ranges, checkpoint.fingerprint, dimensions, is_normalized=checkpoint.is_normalized)
    return Features(outputs, max_tokens, dimensions, tasks, _instruction(checkpoint, tasks), ranges)


def _require_no_vectors(entry: ModelEntry) -> None:
    """Refuse registry keys that only an embedding model may have.

    Raises:
        LoadError: the entry has such keys; the message names them.
    """
    requested = [
        key for key in ("default_task", "prompts", "dimensions", "golden", "ranges", "rerank") if getattr(entry, key)
    ]
    requested += [] if entry.outputs == (Output.DENSE,) else ["outputs"]
    if requested:
        raise LoadError(f"{', '.join(requested)} cannot be set: this model scores texts and returns no vectors")


def _outputs(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Output, ...]:
    """Return the outputs to serve: the registry's; by default, a model without a dense output serves its own."""
    if Output.DENSE not in checkpoint.outputs:
        if named := [key for key in ("dimensions", "golden", "ranges") if getattr(entry, key)]:
            raise LoadError(
                f"{' and '.join(named)} cannot be set: this model has no dense vectors, only {', '.join(checkpoint.outputs)}"
            )
        if "outputs" not in entry.model_fields_set:
            return checkpoint.outputs
    missing = [output.value for output in entry.outputs if output not in checkpoint.outputs]
    if missing:
        raise LoadError(
            f"outputs {', '.join(missing)}: the checkpoint has no such head, only {', '.join(checkpoint.outputs)}"
        )
    return entry.outputs


def _max_tokens(entry: ModelEntry, checkpoint: Checkpoint) -> int:
    if entry.max_tokens is not None and entry.max_tokens > checkpoint.position_limit:
        raise LoadError(
            f"max_tokens is {entry.max_tokens}, but the model has positions for {checkpoint.position_limit}"
        )
    return entry.max_tokens or checkpoint.max_tokens


def _dimensions(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[int, ...]:
    too_wide = [size for size in entry.dimensions if size > checkpoint.width]
    if too_wide:
        raise LoadError(f"dimensions lists {too_wide[0]}, but the model's vectors have {checkpoint.width}")
    return tuple(sorted({checkpoint.width, *entry.dimensions} - {0}, reverse=True))


def _tasks(entry: ModelEntry, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the instruction of each task; the registry's ``prompts`` override the checkpoint's own."""
    tasks = tasks_of(checkpoint.prompts, entry.prompts, checkpoint.adapters)
    if checkpoint.has_sides:
        tasks = {**dict.fromkeys(RETRIEVAL, ""), **tasks}
        if others := [task for task in tasks if task not in RETRIEVAL]:
            raise LoadError(f"the task {others[0]!r} is not supported: this model has only queries and documents")
    if checkpoint.adapters:
        bare = [task for task in tasks if task not in checkpoint.adapters]
        if bare:  # without an adapter, its texts would be in a space that no task was trained for
            raise LoadError(f"the task {bare[0]!r} has no adapter; tasks with one: {', '.join(checkpoint.adapters)}")
    default = entry.default_task
    if default is None and checkpoint.layout is Layout.JINA_V5:
        raise LoadError(
            f"default_task must be set: Jina v5 has no vectors without a task. Choose one of {', '.join(tasks)}; "
            "text-matching treats all texts alike"
        )
    if default is not None and canonical_task(default) not in tasks:
        raise LoadError(f"default_task is {default!r}, but the model's tasks are: {', '.join(tasks) or 'none'}")
    return tasks


def _instruction(checkpoint: Checkpoint, tasks: Mapping[str, str]) -> str:
    """Return the instruction of a text without a task: the default prompt, which the registry may override."""
    name = checkpoint.default_prompt
    return "" if name is None else tasks.get(canonical_task(name), "")
