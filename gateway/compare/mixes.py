"""The outputs by which an arm searches: ``+sparse``, ``+multivector``, or several, as written after a model's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import CompareError
from gateway.types import Output

HYBRID = "hybrid"
_OUTPUTS = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
_PART = re.compile(rf"(?P<output>{'|'.join(_OUTPUTS)})(?:=(?P<weight>\d+(?:\.\d*)?|\.\d+))?", re.ASCII)
_FORM = (
    "after a model's name, + is followed by hybrid, dense, sparse or multivector, such as bge-m3+sparse or "
    "bge-m3+dense+sparse; either each of several outputs has a weight, such as bge-m3+dense=0.7+sparse=0.3, or none"
)


@dataclass(frozen=True, slots=True)
class Mix:
    """The outputs that rank the documents of an arm.

    Attributes:
        outputs: the outputs, at least one.
        weights: the weights of the outputs' similarities; empty to combine their ranks.
    """

    outputs: tuple[Output, ...]
    weights: tuple[float, ...] = ()


DENSE = Mix((Output.DENSE,))


def parse_mix(text: str, parts: Sequence[str]) -> Mix:
    """Read the parts of an arm's name after the model's name.

    ``hybrid`` means ``dense`` and ``sparse``.

    Args:
        text: the whole name, for the message.

    Raises:
        CompareError: a part has another form, or appears twice.
    """
    outputs: list[Output] = []
    weights: list[float] = []
    for part in [*parts] if list(parts) != [HYBRID] else [Output.DENSE, Output.SPARSE]:
        found = _PART.fullmatch(part)
        if found is None:
            raise CompareError(f"{text!r}: {_FORM}")
        outputs.append(Output(found["output"]))
        weights += [float(found["weight"])] if found["weight"] else []
    if len(set(outputs)) < len(outputs):
        raise CompareError(f"{text!r}: an output appears twice")
    if weights and (len(weights) < len(outputs) or len(outputs) == 1 or min(weights) <= 0):
        raise CompareError(f"{text!r}: {_FORM}; a weight must be above 0")
    return Mix(tuple(outputs), tuple(weights))
