"""All captures of a registry, which select a sample of the queries among texts."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.capture.writer import Captured, CaptureWriter, load_scrub
from gateway.config.capture import QUERY_TASK, Capture
from gateway.config.registry import Registry
from gateway.experiments.split import UnitSource, read_unit
from gateway.routing.router import Choice
from gateway.tasks import TASKS, find_task
from gateway.telemetry import forgetting

# The sources of a sender's id if no experiment defines one; the first that a request has is used.
_SENDERS = ("body:user", "api_key")


class Captures:
    """The captures of a registry.

    Args:
        before: the captures before a reload; an unchanged capture continues its file.
    """

    def __init__(self, registry: Registry, before: Captures | None = None) -> None:
        known = before.writers if before else {}
        self.writers: Mapping[str, CaptureWriter] = {
            name: _writer(known.get(name), name, capture, _path(registry, capture))
            for name, capture in registry.captures().items()
        }

    def offer(self, choice: Choice, texts: Sequence[str], task: str | None, unit_source: UnitSource) -> None:
        """Record a sample of a request's texts if its name is captured; return immediately.

        Args:
            task: the request's task, by any of its names; ``None`` if it names no task.
        """
        writer = self.writers.get(choice.asked)
        if writer is None:
            return
        capture = writer.capture
        named = choice.task or task
        info = choice.model.info
        task = (find_task(named, TASKS) or named) if named else info.default_task if info is not None else None
        if task != QUERY_TASK and not capture.passages:
            return
        sampled = [text for text in texts if random.random() < capture.queries]  # noqa: S311  a sample, not a secret
        if not sampled:
            return
        unit = _unit(choice, unit_source)
        for text in sampled:
            writer.offer(Captured(text, choice.asked, choice.model.id, task, unit))

    def stop(self, successor: Captures | None = None) -> None:
        """Stop the writers that the successor does not continue, and wait for them."""
        kept = set(successor.writers.values()) if successor else set()
        for writer in self.writers.values():
            if writer not in kept:
                writer.stop()
            if successor is not None and writer.name not in successor.writers:
                forgetting.forget_capture(writer.name)


def capture_problems(registry: Registry) -> list[str]:
    """Return a message for each capture that cannot work here."""
    problems = scrub_problems(registry)
    for name, capture in registry.captures().items():
        path = _path(registry, capture)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"the folder of the capture of {name!r} cannot be created: {path.parent}: {error.strerror}")
        else:
            if not os.access(path.parent, os.W_OK):
                problems.append(f"the folder of the capture of {name!r} cannot be written to: {path.parent}")
    return problems


def scrub_problems(registry: Registry) -> list[str]:
    """Return a message for each scrub function that cannot be imported: no text may be recorded without it."""
    problems = []
    for name, capture in registry.captures().items():
        if capture.scrub is not None:
            try:
                load_scrub(capture.scrub)
            except Exception as error:  # a module can raise any error when imported
                problems.append(f"`scrub` of the capture of {name!r} cannot be imported: {error}")
    return problems


def _path(registry: Registry, capture: Capture) -> Path:
    return capture.path(registry.path.parent)


def _writer(known: CaptureWriter | None, name: str, capture: Capture, path: Path) -> CaptureWriter:
    is_same = known is not None and (known.capture, known.path) == (capture, path)
    return known if known is not None and is_same else CaptureWriter(name, capture, path)


def _unit(choice: Choice, unit_source: UnitSource) -> str | None:
    if choice.assignment is not None and choice.assignment.unit is not None:
        return choice.assignment.unit
    return next((value for source in _SENDERS if (value := read_unit(unit_source(source)))), None)
