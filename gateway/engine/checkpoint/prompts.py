"""Prompts of a checkpoint and of the registry: the instruction put before a text, by task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError
from gateway.tasks import RETRIEVAL, canonical_task

# The instructions that Jina's own `encode` puts before a text (custom_st.py of jinaai/jina-embeddings-v3).
_JINA_PROMPTS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a checkpoint, by the checkpoint's own names.

    Attributes:
        default: name of the prompt for texts without a task, if the checkpoint names one.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


def read_prompts(config: Mapping[str, Json], path: Path) -> Prompts:
    """Read the prompts in ``config_sentence_transformers.json``; a prompt that is null is ignored.

    Raises:
        LoadError: a prompt is not text, or the default one does not exist.
    """
    prompts = config.get("prompts")
    if prompts is None:
        prompts = {}
    if not isinstance(prompts, dict):
        raise LoadError(f"{path}: prompts must be an object of texts by name, got {type(prompts).__name__}")
    texts: dict[str, str] = {}
    for name, text in prompts.items():
        if text is not None and not isinstance(text, str):
            raise LoadError(f"{path}: the prompt {name!r} must be text, got {text!r}")
        texts[name] = text or ""
    default = config.get("default_prompt_name")
    # sentence-transformers gives every model an empty `query` and `document`.
    if default is not None and default not in [*texts, "query", "document"]:
        raise LoadError(
            f"{path}: default_prompt_name is {default!r}, but the prompts are: {', '.join(texts) or 'none'}"
        )
    return Prompts(texts, default if isinstance(default, str) else None)


def jina_prompts(adapters: Collection[str], prompts: Mapping[str, str]) -> dict[str, str]:
    """Return the instructions of Jina's tasks; the checkpoint's own prompt wins for a task that has an adapter.

    sentence-transformers writes an empty ``query`` and ``document`` into every checkpoint that names no prompts. Such empty
    prompts are ignored.
    """
    own = {task: _JINA_PROMPTS.get(task, "") for task in adapters}
    named = {name: text for name, text in prompts.items() if canonical_task(name) in own}
    # A prompt under a task's canonical name may be empty on purpose. An empty prompt under another name is dropped.
    named = {name: text for name, text in named.items() if text or name in own}
    return {**{task: text for task, text in own.items() if task not in map(canonical_task, named)}, **named}


def tasks_of(prompts: Mapping[str, str], given: Mapping[str, str], adapters: Collection[str]) -> dict[str, str]:
    """Return the instruction of each task by its canonical name; the registry overrides the checkpoint.

    A model with a prompt for any task takes queries and passages too, as sentence-transformers' ``encode_query`` and
    ``encode_document`` do: without a prompt for one of them, the text gets no instruction. If all prompts are empty, the
    model has no tasks, because sentence-transformers writes empty prompts into every checkpoint.

    Args:
        prompts: the checkpoint's own prompts, by any name of a task.
        given: the registry's prompts.

    Raises:
        LoadError: two names of one task have different texts.
    """
    chosen = _by_task(given, "the registry's prompts")
    own = {name: text for name, text in prompts.items() if canonical_task(name) not in chosen}
    tasks = {**_by_task(own, "the checkpoint's prompts"), **chosen}
    if adapters:
        return tasks
    if not any(tasks.values()):
        return {}
    return {**tasks, **{task: "" for task in RETRIEVAL if task not in tasks}}


def _by_task(prompts: Mapping[str, str], whose: str) -> dict[str, str]:
    """Return the text of each task; an empty text is ignored if another name of the task has a text."""
    names: dict[str, str] = {}
    for name, text in prompts.items():
        task = canonical_task(name)
        before = names.get(task)
        if before is None or not prompts[before]:
            names[task] = name
        elif text and text != prompts[before]:
            raise LoadError(
                f"{whose} {before!r} and {name!r} are different texts for one task, {task}: {prompts[before]!r} and "
                f"{text!r}. Choose one in the registry: prompts: {{{task}: …}}"
            )
    return {task: prompts[name] for task, name in names.items()}
