"""Change an experiment in ``models.yaml`` as a person would: only a few characters, without touching the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gateway.config.files import Style, one_writer, style_of, write_whole
from gateway.config.registry import MODELS_FILE, Experiment, Registry, load_registry
from gateway.config.wording import quote
from gateway.config.yaml_source import MAX_FILE_BYTES, compose, read_text
from gateway.errors import StartError


@dataclass(frozen=True, slots=True)
class Change:
    """A change of an experiment.

    Attributes:
        weights: new weights by arm; other arms keep their weights.
        end: the time when the experiment ends; ``None`` for no change.
        counts_from: the time when its counts begin again; ``None`` for no change.
    """

    weights: Mapping[str, float]
    end: datetime | None = None
    counts_from: datetime | None = None

    @property
    def times(self) -> dict[str, datetime]:
        """The times to write, by field."""
        found = {"end": self.end, "counts_from": self.counts_from}
        return {name: time for name, time in found.items() if time is not None}

    def of(self, experiment: Experiment) -> Experiment:
        """Return the experiment after the change, unchecked."""
        arms = tuple(
            arm.model_copy(update={"weight": float(self.weights.get(arm.label, arm.weight))}) for arm in experiment.arms
        )
        return experiment.model_copy(update={"arms": arms, **self.times})


@dataclass(frozen=True, slots=True)
class Edit:
    """A file that was changed, and its text before and after."""

    path: Path
    style: Style
    before: str
    after: str

    def undo(self) -> None:
        """Restore the old text, unless the file was changed again in the meantime.

        Raises:
            OSError: the file cannot be written.
        """
        with one_writer(self.path):
            if read_text(self.path, MODELS_FILE) == self.after:
                write_whole(self.path, self.style.dress(self.before))


def edit_experiment(served: Registry, experiment_id: str, change: Change, environ: Mapping[str, str]) -> Edit:
    """Write a change of an experiment into the registry's file. Blocking: call it in a thread.

    Args:
        served: the registry as it is served; its file must have the same content.

    Raises:
        ConfigError: the file cannot be read, or would be wrong after the change.
        StartError: the file has changes that are not served yet, cannot be written, or is not plain enough to edit.
    """
    path = served.path
    try:
        with one_writer(path):
            text = read_text(path, MODELS_FILE)
            if load_registry(path, environ, text) != served:
                raise StartError(f"{path} has changes that are not served yet: read it again first")
            style = style_of(path, MAX_FILE_BYTES)
            edited = _edited(text, path, experiment_id, change, style.line_break)
            if edited is None or load_registry(path, environ, edited) != _changed(served, experiment_id, change):
                raise StartError(
                    f"{path}: {quote(experiment_id)} is not written plainly there (a variable or an anchor, for example): "
                    "change it by hand"
                )
            write_whole(path, style.dress(edited))
            return Edit(path, style, text, edited)
    except OSError as error:
        raise StartError(f"{path} cannot be written: {error.strerror}; change it by hand") from error


def _changed(registry: Registry, experiment_id: str, change: Change) -> Registry:
    experiments = (
        change.of(experiment) if experiment.id == experiment_id else experiment for experiment in registry.experiments
    )
    return registry.model_copy(update={"experiments": tuple(experiments)})


def _edited(text: str, path: Path, experiment_id: str, change: Change, line_break: str) -> str | None:
    """Return the text with a change; ``None`` if a value is not in the expected place."""
    _yaml, root = compose(text, str(path), MODELS_FILE)
    found = _value(root, "experiments")
    experiments = found.value if isinstance(found, SequenceNode) else ()
    experiment = next((one for one in experiments if _text(_value(one, "id")) == experiment_id), None)
    if not isinstance(experiment, MappingNode):
        return None
    pieces: dict[tuple[int, int], str] = {}
    arms = _value(experiment, "arms")
    for arm in arms.value if isinstance(arms, SequenceNode) else ():
        label = _text(_value(arm, "name")) or _text(_value(arm, "model"))
        weight = _value(arm, "weight")
        if label is not None and label in change.weights and weight is not None:
            pieces[weight.start_mark.index, weight.end_mark.index] = _number(change.weights[label])
    for name, time in change.times.items():
        written = f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        place, piece = _time_of(text, experiment, name, written, line_break)
        pieces[place] = piece
    # Replace from the last piece to the first, because a new piece may move the text after it.
    for (start, stop), piece in sorted(pieces.items(), reverse=True):
        if "${" in text[start:stop]:
            return None
        text = text[:start] + piece + text[stop:]
    return text


def _time_of(text: str, experiment: MappingNode, name: str, time: str, line_break: str) -> tuple[tuple[int, int], str]:
    """Return the current or future place of one of an experiment's times, and the text to write there."""
    if (known := _value(experiment, name)) is not None:
        return (known.start_mark.index, known.end_mark.index), time
    key, value = next(pair for pair in experiment.value if pair[0].value == "id")
    if experiment.flow_style:
        place = value.end_mark.index
        return (place, place), f", {name}: {time}"
    line_end = text.find("\n", value.end_mark.index)
    place = len(text) if line_end < 0 else line_end - (text[line_end - 1] == "\r")
    return (place, place), f"{line_break}{' ' * key.start_mark.column}{name}: {time}"


def _value(node: Node | None, name: str) -> Node | None:
    pairs = node.value if isinstance(node, MappingNode) else ()
    return next((value for key, value in pairs if key.value == name), None)


def _text(node: Node | None) -> str | None:
    return str(node.value) if isinstance(node, ScalarNode) else None


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
