"""The arms of a comparison: names from the command line, and the gateway's info about their models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.api.openai_schema import ModelCard
from gateway.cli.client import GatewayClient, Refused
from gateway.errors import CompareError
from gateway.precision import CALIBRATED, Precision
from gateway.routing.spaces import is_same_space

_PROBE = "What is compared here?"
QUERY_TASK = "retrieval.query"
PASSAGE_TASK = "retrieval.passage"
_ARM = re.compile(
    rf"(?P<model>[^@]+?)(?:@(?P<size>[1-9]\d{{0,5}}))?(?::(?P<precision>{'|'.join(Precision)}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class ArmName:
    """An arm as written on the command line: ``MODEL``, ``MODEL@DIMENSIONS``, or either with ``:PRECISION``."""

    text: str
    model: str
    dimensions: int | None
    precision: Precision = Precision.FLOAT


@dataclass(frozen=True, slots=True)
class Side:
    """How one side of the search, queries or documents, is embedded.

    Attributes:
        asked_task: the task that requests name; ``None`` to use that of the model's name.
        task: the task of the vectors; ``None`` for a model without tasks.
        native_space: of the vectors that the gateway is asked for.
        space: of the vectors that are compared.
    """

    asked_task: str | None
    task: str | None
    native_space: str
    space: str


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """An arm that can be embedded.

    Attributes:
        width: dimensions of the vectors that the gateway is asked for.
        dimensions: size of the compared vectors. They are embedded with native dimensions, and then cut; only int8 and
            uint8 vectors are embedded as they are compared, since the gateway knows their ranges.
    """

    name: ArmName
    card: ModelCard
    width: int
    dimensions: int
    queries: Side
    passages: Side

    @property
    def space(self) -> str:
        """The space of the vectors that are compared."""
        return self.queries.space

    @property
    def precision(self) -> Precision:
        """The kind of numbers that are compared."""
        return self.name.precision

    @property
    def is_quantized(self) -> bool:
        """Whether the compared vectors have fewer bits than the model's own."""
        return self.precision is not Precision.FLOAT

    @property
    def asked_precision(self) -> Precision:
        """The precision that the gateway is asked for: it knows the ranges of int8 and uint8 vectors."""
        return self.precision if self.precision in CALIBRATED else Precision.FLOAT

    @property
    def bytes_per_vector(self) -> int:
        """The size of a stored vector."""
        match self.precision:
            case Precision.FLOAT:
                return 4 * self.dimensions
            case Precision.INT8 | Precision.UINT8:
                return self.dimensions
            case Precision.BINARY | Precision.UBINARY:
                return -(-self.dimensions // 8)

    @property
    def is_normalized(self) -> bool:
        """Whether the model's vectors have L2 norm 1, so that cut ones are normalized again."""
        return bool(self.card.normalized)


def parse_arms(names: Sequence[str]) -> list[ArmName]:
    """Read the names of the arms.

    Raises:
        CompareError: there are fewer than two, one is written twice, or one has another form.
    """
    arms = []
    for text in names:
        parts = _ARM.fullmatch(text)
        if parts is None:
            raise CompareError(
                f"{text!r}: must be MODEL, MODEL@DIMENSIONS, MODEL:PRECISION or MODEL@DIMENSIONS:PRECISION, such as "
                f"jina-embeddings-v3@256:binary; precisions are {', '.join(Precision)}"
            )
        size = int(parts["size"]) if parts["size"] else None
        arms.append(ArmName(text, parts["model"], size, Precision(parts["precision"] or "float")))
    if len(arms) < 2:
        raise CompareError("a comparison needs at least two models: the baseline, and another one")
    for index, arm in enumerate(arms):
        if any(arm.text == other.text for other in arms[:index]):
            raise CompareError(f"{arm.text!r} is named twice")
    return arms


async def plan_arm(client: GatewayClient, name: ArmName) -> PlannedArm:
    """Find out how an arm is embedded, and wait while its model loads.

    Raises:
        CompareError: the model is not ready, does not return that size, or would put queries and documents into two
            spaces.
        StartError: the gateway does not know the model, or does not answer.
    """
    await client.embed(name.model, [_PROBE])
    card = await client.card(name.model)
    if card.width is None:
        raise CompareError(f"{name.text}: the model is {card.state}: {card.reason or 'unknown reason'}")
    dimensions = name.dimensions or card.width
    if dimensions not in card.dimensions:
        sizes = ", ".join(str(size) for size in card.dimensions)
        raise CompareError(
            f"{name.text}: {name.model} returns vectors of {sizes} dimensions, not of {dimensions}; if it was trained for "
            f"{dimensions}, list that under its `dimensions` in models.yaml"
        )
    queries = await _plan_side(client, name, card, QUERY_TASK, dimensions)
    passages = await _plan_side(client, name, card, PASSAGE_TASK, dimensions)
    # Many models have an instruction for queries but not for documents, which are then in a separate space.
    is_comparable = is_same_space(queries.space, passages.space) or passages.task is None
    if not is_comparable:
        raise CompareError(
            f"{name.text}: its queries would be in space {queries.space} (task {queries.task or 'none'}) and its documents "
            f"in {passages.space} (task {passages.task}): they cannot be compared; name a task, {name.model}:TASK"
        )
    width = dimensions if name.precision in CALIBRATED else card.width
    return PlannedArm(name, card, width, dimensions, queries, passages)


async def _plan_side(client: GatewayClient, name: ArmName, card: ModelCard, wanted: str, dimensions: int) -> Side:
    task = wanted if wanted in card.tasks else None
    try:
        probe = await client.embed(name.model, [_PROBE], task)
    except Refused as refused:
        if refused.param != "task" or task is None:
            raise
        task = None  # the name already has a task
        probe = await client.embed(name.model, [_PROBE])
    if probe.is_experiment:
        raise CompareError(f"{name.text} is an experiment, which uses several models: name those")
    if name.precision in CALIBRATED:
        space = (await client.embed(name.model, [_PROBE], task, dimensions, precision=name.precision)).space
        return Side(task, probe.task, space, space)
    cut = await client.embed(name.model, [_PROBE], task, dimensions)
    return Side(task, probe.task, probe.space, cut.space)
