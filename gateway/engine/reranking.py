"""Choose the outputs by which a model that embeds scores texts against a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.config.registry import ModelEntry
from gateway.errors import LoadError
from gateway.types import Output


def choose_weights(entry: ModelEntry, outputs: Sequence[Output]) -> Mapping[Output, float]:
    """Return the outputs to score by, with their weights: the registry's, or all where they are more than ``dense``.

    Args:
        outputs: those that are served.

    Raises:
        LoadError: the registry names another one.
    """
    if missing := [output.value for output in entry.rerank if output not in outputs]:
        raise LoadError(f"rerank names {', '.join(missing)}, but the model's outputs are: {', '.join(outputs)}")
    if entry.rerank:
        return {Output(output): weight for output, weight in entry.rerank.items()}
    return {} if tuple(outputs) == (Output.DENSE,) else dict.fromkeys(outputs, 1.0)
