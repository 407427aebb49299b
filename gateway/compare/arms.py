"""The arms of a comparison: names from the command line, and the gateway's info about their models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.api.openai_schema import ModelCard
from gateway.cli.client import GatewayClient, Refused
from gateway.compare.mixes import DENSE, Mix, parse_mix
from gateway.errors import CompareError
from gateway.precision import CALIBRATED, Precision
from gateway.routing.spaces import is_same_space
from gateway.types import Output

PROBE = "What is compared here?"
QUERY_TASK = "retrieval.query"
PASSAGE_TASK = "retrieval.passage"
_ARM = re.compile(
    rf"(?P<model>[^@]+?)(?:@(?P<size>[1-9]\d{{0,5}}))?(?::(?P<precision>{'|'.join(Precision)}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class ArmName:
    """An arm as written on the command line: ``MODEL``, ``MODEL@DIMENSIONS``, either with ``:PRECISION``, and ``+OUTPUT``.

    Attributes:
        mix: the named outputs; ``None`` for the model's first output.
    """

    text: str
    model: str
    dimensions: int | None
    precision: Precision = Precision.FLOAT
    mix: Mix | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """The embedding of one side of the search, queries or documents.

    Attributes:
        asked_task: the task in requests; ``None`` to use the task of the model's name.
        task: the task of the vectors; ``None`` for a model without tasks.
        native_space: the space of the vectors that are requested from the gateway.
        space: the space of the vectors that are compared.
    """

    asked_task: str | None
    task: str | None
    native_space: str
    space: str


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """An arm that can be embedded.

    Attributes:
        width: dimensions of the vectors that are requested from the gateway.
        dimensions: size of the compared vectors. They are embedded with native dimensions, and then cut. Only int8 and
            uint8 vectors are requested in their final form, because the gateway knows their ranges. 0 without dense
            vectors.
        mix: the outputs by which documents are ranked.
    """

    name: ArmName
    card: ModelCard
    width: int
    dimensions: int
    queries: Side
    passages: Side
    mix: Mix = DENSE

    @property
    def is_dense(self) -> bool:
        """Whether documents are ranked only by dense vectors."""
        return self.mix.outputs == DENSE.outputs

    @property
    def asked_dimensions(self) -> int | None:
        """The size that a user of the arm would request from the gateway; ``None`` without dense vectors."""
        return self.dimensions if Output.DENSE in self.mix.outputs else None

    @property
    def space(self) -> str:
        """The space of the vectors that are compared."""
        return self.queries.space

    @property
    def precision(self) -> Precision:
        """The number format of the compared vectors."""
        return self.name.precision

    @property
    def is_quantized(self) -> bool:
        """Whether the compared vectors have fewer bits than the model's own."""
        return self.precision is not Precision.FLOAT

    @property
    def asked_precision(self) -> Precision:
        """The precision in requests to the gateway, which knows the ranges of int8 and uint8 vectors."""
        return self.precision if self.precision in CALIBRATED else Precision.FLOAT

    @property
    def bytes_per_vector(self) -> int:
        """The size of a stored dense vector in bytes; 0 without dense vectors."""
        match self.precision:
            case Precision.FLOAT:
                return 4 * self.dimensions
            case Precision.INT8 | Precision.UINT8:
                return self.dimensions
            case Precision.BINARY | Precision.UBINARY:
                return -(-self.dimensions // 8)

    @property
    def is_normalized(self) -> bool:
        """Whether the model's vectors have L2 norm 1, so that cut vectors are normalized again."""
        return bool(self.card.normalized)


def parse_arms(names: Sequence[str]) -> list[ArmName]:
    """Read the names of the arms.

    Raises:
        CompareError: fewer than two arms are named, an arm is named twice, or a name has another form.
    """
    arms = [_parse_arm(text) for text in names]
    if len(arms) < 2:
        raise CompareError("a comparison needs at least two models: the baseline, and another one")
    for index, arm in enumerate(arms):
        if any(arm.text == other.text for other in arms[:index]):
            raise CompareError(f"{arm.text!r} is named twice")
    return arms


def _parse_arm(text: str) -> ArmName:
    base, *outputs = text.split("+")
    parts = _ARM.fullmatch(base)
    if parts is None:
        raise CompareError(
            f"{text!r}: must be MODEL, MODEL@DIMENSIONS, MODEL:PRECISION or MODEL@DIMENSIONS:PRECISION, such as "
            f"jina-embeddings-v3@256:binary, and may end with +OUTPUT; precisions are {', '.join(Precision)}"
        )
    size, precision = int(parts["size"]) if parts["size"] else None, Precision(parts["precision"] or "float")
    mix = parse_mix(text, outputs) if outputs else None
    if mix is not None and (size or parts["precision"]):
        if Output.DENSE not in mix.outputs:
            raise CompareError(f"{text!r}: only dense vectors have a size or a precision to choose")
        if precision in CALIBRATED and len(mix.outputs) > 1:
            raise CompareError(
                f"{text!r}: {precision} vectors cannot be combined with other outputs here; binary ones can"
            )
        if mix.weights and precision is not Precision.FLOAT:
            raise CompareError(
                f"{text!r}: {precision} vectors have similarities of another scale: leave out the weights"
            )
    return ArmName(text, parts["model"], size, precision, mix)


async def plan_arm(client: GatewayClient, name: ArmName) -> PlannedArm:
    """Plan the embedding of an arm, and wait while its model loads.

    Raises:
        CompareError: the model is not ready, does not return that size, or would put queries and documents into two
            spaces.
        StartError: the gateway does not know the model, or does not answer.
    """
    mix, card = await _plan_mix(client, name)
    dimensions = _plan_dimensions(name, card) if Output.DENSE in mix.outputs else 0
    queries = await _plan_side(client, name, card, QUERY_TASK, mix, dimensions)
    passages = await _plan_side(client, name, card, PASSAGE_TASK, mix, dimensions)
    # Many models have an instruction for queries but none for documents, which are then in a separate space.
    is_comparable = is_same_space(queries.space, passages.space) or passages.task is None
    if not is_comparable:
        raise CompareError(
            f"{name.text}: its queries would be in space {queries.space} (task {queries.task or 'none'}) and its documents "
            f"in {passages.space} (task {passages.task}): they cannot be compared; name a task, {name.model}:TASK"
        )
    width = dimensions if name.precision in CALIBRATED else card.width or 0
    return PlannedArm(name, card, width, dimensions, queries, passages, mix)


async def _plan_mix(client: GatewayClient, name: ArmName) -> tuple[Mix, ModelCard]:
    """Wait while the model loads, and determine the outputs by which the arm ranks."""
    try:
        await client.embed(name.model, [PROBE], outputs=name.mix.outputs if name.mix else DENSE.outputs)
        return name.mix or DENSE, await client.card(name.model)
    except Refused as refused:
        if refused.param != "outputs" or name.mix is not None:
            raise
        card = await client.card(name.model)
        if Output.DENSE in card.outputs or not card.outputs:
            raise
    if name.dimensions or name.precision is not Precision.FLOAT:
        raise CompareError(
            f"{name.text}: {name.model} has no dense vectors, so there is no size or precision to choose"
        )
    return Mix((Output(card.outputs[0]),)), card


def _plan_dimensions(name: ArmName, card: ModelCard) -> int:
    if card.width is None:
        raise CompareError(f"{name.text}: the model is {card.state}: {card.reason or 'unknown reason'}")
    dimensions = name.dimensions or card.width
    if dimensions not in card.dimensions:
        sizes = ", ".join(str(size) for size in card.dimensions)
        raise CompareError(
            f"{name.text}: {name.model} returns vectors of {sizes} dimensions, not of {dimensions}; if it was trained for "
            f"{dimensions}, list that under its `dimensions` in models.yaml"
        )
    return dimensions


async def _plan_side(
    client: GatewayClient, name: ArmName, card: ModelCard, wanted: str, mix: Mix, dimensions: int
) -> Side:
    task = wanted if wanted in card.tasks else None
    try:
        probe = await client.embed(name.model, [PROBE], task, outputs=mix.outputs)
    except Refused as refused:
        if refused.param != "task" or task is None:
            raise
        task = None  # the name already has a task
        probe = await client.embed(name.model, [PROBE], outputs=mix.outputs)
    if probe.is_experiment:
        raise CompareError(f"{name.text} is an experiment, which uses several models: name those")
    if not dimensions:
        return Side(task, probe.task, probe.space, probe.space)
    if name.precision in CALIBRATED:
        space = (await client.embed(name.model, [PROBE], task, dimensions, precision=name.precision)).space
        return Side(task, probe.task, space, space)
    cut = await client.embed(name.model, [PROBE], task, dimensions)
    return Side(task, probe.task, probe.space, cut.space)
