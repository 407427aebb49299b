"""Tasks of a model that runs on other servers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.backends.upstream.dialects import task_field
from gateway.config.model_entry import ModelEntry
from gateway.config.upstream import Upstream
from gateway.errors import LoadError
from gateway.tasks import RETRIEVAL, canonical_task


@dataclass(frozen=True, slots=True)
class Tasks:
    """The ways to apply each task: the gateway puts an instruction before the text, or sends the task's name.

    Attributes:
        instructions: as in :attr:`gateway.types.ModelInfo.tasks`.
        names: the servers' names for the tasks that the servers apply.
        field: the field of a request that holds the name.
    """

    instructions: Mapping[str, str]
    names: Mapping[str, str]
    field: str

    def prepare(self, texts: Sequence[str], task: str | None) -> tuple[Sequence[str], str | None]:
        """Return the texts to send for a task, and the server's name for the task."""
        instruction = self.instructions.get(task, "") if task else ""
        return [instruction + text for text in texts] if instruction else texts, self.names.get(task or "")


def read_tasks(entry: ModelEntry, upstream: Upstream) -> Tasks:
    """Return the tasks of an entry.

    A model with any task also accepts queries and passages, like a model in this process: without a prompt or a name
    for these tasks, texts are sent unchanged.

    Raises:
        LoadError: two names of one task have different values, or the default task is not one of the tasks.
    """
    names = _by_task(upstream.tasks, "upstream.tasks")
    prompts = _by_task(entry.prompts, "prompts")
    instructions = prompts or dict.fromkeys(names, "")
    if any(prompts.values()) or names:
        instructions |= {task: "" for task in RETRIEVAL if task not in instructions}
    tasks = Tasks(instructions, names, task_field(entry, upstream))
    default = entry.default_task
    if default is not None and canonical_task(default) not in tasks.instructions:
        known = ", ".join(tasks.instructions) or "none"
        raise LoadError(f"default_task is {default!r}, but the model's tasks are: {known}")
    return tasks


def _by_task(values: Mapping[str, str], key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        task = canonical_task(name)
        if found.setdefault(task, value) != value:
            raise LoadError(
                f"`{key}` has two different values for the task {task!r}, because {name!r} is another name of it"
            )
    return found
