"""Choose the outputs by which an embedding model scores texts against a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.config.registry import ModelEntry
from gateway.errors import LoadError
from gateway.types import Output


def choose_weights(entry: ModelEntry, outputs: Sequence[Output]) -> Mapping[Output, float]:
    """Return the outputs for scoring, with their weights: the registry's, or all if they are more than ``dense``.

    Args:
        outputs: the outputs that are served.

    Raises:
        LoadError: the registry names an output that is not served.
    """
    if missing := [output.value for output in entry.rerank if output not in outputs]:
        raise LoadError(f"rerank names {', '.join(missing)}, but the model's outputs are: {', '.join(outputs)}")
    if entry.rerank:
        return {Output(output): weight for output, weight in entry.rerank.items()}
    return {} if tuple(outputs) == (Output.DENSE,) else dict.fromkeys(outputs, 1.0)
