"""The tasks that texts are embedded for, and their names."""

from __future__ import annotations

from collections.abc import Collection

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
"""The canonical names of tasks, which are Jina's."""

RETRIEVAL = ("retrieval.query", "retrieval.passage")
"""The tasks of a query and of the texts that it is compared with."""

_TASK_SYNONYMS = {
    # Cohere's and Voyage's input types, and the usual names of prompts in sentence-transformers checkpoints.
    "query": "retrieval.query",
    "search_query": "retrieval.query",
    "document": "retrieval.passage",
    "passage": "retrieval.passage",
    "search_document": "retrieval.passage",
    "clustering": "separation",
    # Google's task types.
    "retrieval_query": "retrieval.query",
    "retrieval_document": "retrieval.passage",
    "semantic_similarity": "text-matching",
}

# A query and a passage are meant to be compared with each other: their tasks share a space.
_FAMILIES = {"retrieval.query": "retrieval", "retrieval.passage": "retrieval"}


def canonical_task(name: str) -> str:
    """Return the canonical name of a task; an unknown name is returned unchanged."""
    return _TASK_SYNONYMS.get(name, name)


def find_task(name: str, tasks: Collection[str]) -> str | None:
    """Return the task that a client means: one of ``tasks``, by its name or a synonym, in any case; ``None`` for none."""
    canonical = canonical_task(name)
    if canonical in tasks:
        return canonical
    written, in_lower_case = name.lower(), {task.lower(): task for task in tasks}
    return in_lower_case.get(canonical_task(written)) or in_lower_case.get(written)


def known_task_names() -> list[str]:
    """Return every name that :func:`canonical_task` knows."""
    return [*TASKS, *_TASK_SYNONYMS]


def task_family(name: str) -> str:
    """Return the family of a task, by its canonical name: tasks of one family share a space."""
    return _FAMILIES.get(name, name)
