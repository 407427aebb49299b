"""The arms of the playground: ``MODEL:task@dimensions:precision+output``; everything except the model is optional."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gateway.config.wording import cut
from gateway.errors import BadInput, UnsupportedOutput
from gateway.precision import Precision
from gateway.routing.names import Client
from gateway.routing.router import Router, Target
from gateway.types import ModelKind, Output

QUERY_TASK: Final = "retrieval.query"
PASSAGE_TASK: Final = "retrieval.passage"
OUTPUTS: Final = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
_ARM = re.compile(
    rf"(?P<name>.+?)(?:@(?P<size>[1-9]\d{{0,5}}))?(?::(?P<precision>{'|'.join(Precision)}))?"
    rf"(?:\+(?P<output>{'|'.join(OUTPUTS)}))?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class ArmText:
    """An arm as the reader writes it.

    Attributes:
        name: the value of ``model`` in a request.
        dimensions: the vector size; ``None`` for the model's native size.
    """

    text: str
    name: str
    dimensions: int | None
    precision: Precision
    output: Output


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """An arm whose model answers.

    Attributes:
        query_name, passage_name: the value of ``model`` for each side.
        query_task, passage_task: the task of each side; ``None`` for the task of the name, or for a model without tasks.
    """

    arm: ArmText
    target: Target
    query_name: str
    query_task: str | None
    passage_name: str
    passage_task: str | None
    space: str


def read_arm(text: str) -> ArmText:
    """Read an arm.

    Raises:
        BadInput: a size or a precision is given for sparse weights or token vectors.
    """
    read = _ARM.fullmatch(text)
    assert read is not None  # noqa: S101  the text is not empty, and the pattern fits every other
    size, precision, output = read["size"], read["precision"], Output(read["output"] or Output.DENSE)
    if output is not Output.DENSE and (size or precision):
        raise BadInput(f"{cut(text)!r}: only dense vectors have a size and a precision; leave out `+{output.value}`")
    return ArmText(text, read["name"], int(size) if size else None, Precision(precision or Precision.FLOAT), output)


def plan_arm(arm: ArmText, router: Router, client: Client, *, has_query: bool) -> PlannedArm:
    """Find the model of an arm, and the task of each side.

    A model with retrieval tasks uses them for a query and its candidates, unless the name has another task.

    Raises:
        RequestError: the name does not exist, the reader may not use it, or its model does not answer or does not embed.
    """
    choice = router.choose(arm.name, client)
    if choice.experiment is not None:
        labels = ", ".join(other.model for other in choice.experiment.arms)
        raise BadInput(f"{choice.asked!r} is an experiment, whose arms are chosen by unit; name a model: {labels}")
    target = router.targets(choice, None)[0]
    info = target.info
    if info.kind is not ModelKind.EMBED:
        raise UnsupportedOutput(f"{choice.asked!r} is a model that has no vectors ({info.kind.value})")
    pair = {QUERY_TASK, PASSAGE_TASK} <= info.tasks.keys()
    query_name = passage_name = arm.name
    query_task = passage_task = None
    if has_query and pair and choice.task in (None, QUERY_TASK):
        query_task, passage_task = QUERY_TASK, PASSAGE_TASK
        if choice.task is not None:  # the name is only for queries; the model's id has the other task
            if router.names.allows(client, choice.model.id):
                passage_name = choice.model.id
            else:
                passage_task = None
    task = query_task or target.task
    space = info.space(task, arm.dimensions if arm.dimensions in info.dimensions else None)
    return PlannedArm(arm, target, query_name, query_task, passage_name, passage_task, space)
