"""The vectors that a user requests: a model by its name, a task, a size, outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.bulk.chunking import Chunking
from gateway.bulk.rows import BulkError
from gateway.config.wording import enumerate_names
from gateway.errors import ContextLengthExceeded, InvalidVectors, OutOfMemory
from gateway.types import Output, Truncate

PROBE = "Which text is this?"
PASSAGE_TASK = "retrieval.passage"
OF_A_TEXT = (ContextLengthExceeded, InvalidVectors, OutOfMemory)
"""The errors that concern one text: the other texts of its request can be embedded without it."""

OUTPUTS = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
_SIZED = re.compile(r"(?P<name>.+)@(?P<size>[1-9]\d{0,5})", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model, and the vectors to request from it.

    Attributes:
        name: the model's name, optionally with a task and a space: ``NAME:TASK@HASH``.
        dimensions: the size of the dense vectors; ``None`` for the model's full width.
        truncate: the treatment of texts that are too long.
        prefers_passages: without a task in the name, use the model's task for documents if it has one; otherwise its
            default task.
        chunking: the rules for cutting long texts into chunks first; ``None`` to embed whole texts.
    """

    name: str
    dimensions: int | None = None
    outputs: Sequence[Output] = (Output.DENSE,)
    truncate: Truncate = Truncate.END
    prefers_passages: bool = True
    chunking: Chunking | None = None


def read_spec(model: str, outputs: str | None, truncate: Truncate, chunking: Chunking | None = None) -> ModelSpec:
    """Read the options of a command.

    Args:
        model: ``NAME``, ``NAME:TASK``, either with ``@DIMENSIONS`` after it.
        outputs: names of outputs, separated by commas; ``None`` for dense vectors.

    Raises:
        BulkError: an output is unknown, or the size was given without dense vectors.
    """
    sized = _SIZED.fullmatch(model)
    name, size = (sized["name"], int(sized["size"])) if sized else (model, None)
    wanted = _outputs(outputs)
    if size is not None and Output.DENSE not in wanted:
        raise BulkError(
            f"--model {model}: only dense vectors have a choice of size, and --outputs does not include them"
        )
    return ModelSpec(name, size, wanted, truncate, chunking=chunking)


def _outputs(text: str | None) -> tuple[Output, ...]:
    if text is None:
        return (Output.DENSE,)
    names = [name.strip().lower() for name in text.split(",")]
    known = {output.value for output in OUTPUTS}
    if unknown := [name for name in names if name not in known]:
        raise BulkError(f"--outputs has {enumerate_names(unknown)}; the outputs are {enumerate_names(OUTPUTS)}")
    return tuple(output for output in OUTPUTS if output.value in names)


def without_place(message: str) -> str:
    """Return the message about a text, without the text's index in the request, which is not its row number."""
    return re.sub(r"^`?input\[\d+\]`?:? ?", "", message)
