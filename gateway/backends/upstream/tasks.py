"""What a task does to a text that is embedded elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.config.model_entry import ModelEntry
from gateway.config.upstream import Upstream
from gateway.embedding import canonical_task
from gateway.errors import LoadError


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is done for each task: an instruction is put before the text here, or a name is sent.

    Attributes:
        instructions: as in :attr:`gateway.embedding.ModelInfo.tasks`.
        names: what the servers call the tasks, where they apply them.
    """

    instructions: Mapping[str, str]
    names: Mapping[str, str]

    def prepare(self, texts: Sequence[str], task: str | None) -> tuple[Sequence[str], str | None]:
        """Return what is sent for texts with a task: the texts, and the name of the task."""
        instruction = self.instructions.get(task, "") if task else ""
        return [instruction + text for text in texts] if instruction else texts, self.names.get(task or "")


def read_tasks(entry: ModelEntry, upstream: Upstream) -> Tasks:
    """Return the tasks of an entry.

    Raises:
        LoadError: its default task is none of them.
    """
    names = {canonical_task(task): name for task, name in upstream.tasks.items()}
    prompts = {canonical_task(task): text for task, text in entry.prompts.items()}
    tasks = Tasks(prompts or dict.fromkeys(names, ""), names)
    default = entry.default_task
    if default is not None and canonical_task(default) not in tasks.instructions:
        known = ", ".join(tasks.instructions) or "none"
        raise LoadError(f"default_task is {default!r}, but the model's tasks are: {known}")
    return tasks
