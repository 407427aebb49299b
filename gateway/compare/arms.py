"""What is compared: names from the command line, and what the gateway says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.compare.client import GatewayClient, ModelCard, Refused
from gateway.errors import CompareError
from gateway.routing.spaces import is_same_space

_PROBE = "What is compared here?"
QUERY_TASK = "retrieval.query"
PASSAGE_TASK = "retrieval.passage"


@dataclass(frozen=True, slots=True)
class ArmName:
    """An arm as it was given: ``MODEL`` or ``MODEL@DIMENSIONS``."""

    text: str
    model: str
    dimensions: int | None


@dataclass(frozen=True, slots=True)
class Side:
    """How one side of the search, queries or documents, is embedded.

    Attributes:
        asked_task: the task that requests say; ``None`` to leave it to the name.
        task: the task that it comes to; ``None`` for a model without tasks.
        space: of the vectors with native dimensions.
    """

    asked_task: str | None
    task: str | None
    space: str


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """An arm that can be embedded.

    Attributes:
        dimensions: size of the vectors that are compared; they are embedded with native dimensions and then cut.
        space: of the vectors that are compared.
    """

    name: ArmName
    card: ModelCard
    width: int
    dimensions: int
    space: str
    queries: Side
    passages: Side

    @property
    def is_normalised(self) -> bool:
        """Whether the model's vectors have L2 norm 1, and cut ones have to be given it again."""
        return bool(self.card.is_normalised)


def parse_arms(names: Sequence[str]) -> list[ArmName]:
    """Read the names of the arms.

    Raises:
        CompareError: there are fewer than two, one is given twice, or one is none.
    """
    arms = []
    for text in names:
        model, at, size = text.rpartition("@")
        if at and not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise CompareError(f"{text!r}: must be MODEL or MODEL@DIMENSIONS, such as jina-embeddings-v3@256")
        arms.append(ArmName(text, model, int(size)) if at else ArmName(text, text, None))
    if len(arms) < 2:
        raise CompareError("at least two models are needed to compare: the baseline, and another one")
    for index, arm in enumerate(arms):
        if any(arm.text == other.text for other in arms[:index]):
            raise CompareError(f"{arm.text!r} is given twice")
    return arms


async def plan_arm(client: GatewayClient, name: ArmName) -> PlannedArm:
    """Find out how an arm is embedded; waits while its model loads.

    Raises:
        CompareError: there is no such model, it is not ready, does not return that size, or would put queries and
            documents into two spaces.
    """
    await client.embed(name.model, [_PROBE])
    card = await client.card(name.model)
    if card.width is None:
        raise CompareError(f"{name.text}: the model is {card.state}: {card.reason or 'no reason is known'}")
    dimensions = name.dimensions or card.width
    if dimensions not in card.dimensions:
        sizes = ", ".join(str(size) for size in card.dimensions)
        raise CompareError(f"{name.text}: {name.model} returns vectors of {sizes} dimensions, not of {dimensions}")
    queries = await _plan_side(client, name, card, QUERY_TASK)
    passages = await _plan_side(client, name, card, PASSAGE_TASK)
    if not is_same_space(queries.space, passages.space):
        raise CompareError(
            f"{name.text}: its queries would be in space {queries.space} and its documents in {passages.space}: they "
            "cannot be compared"
        )
    cut = await client.embed(name.model, [_PROBE], queries.asked_task, dimensions)
    return PlannedArm(name, card, card.width, dimensions, cut.space, queries, passages)


async def _plan_side(client: GatewayClient, name: ArmName, card: ModelCard, wanted: str) -> Side:
    task = wanted if wanted in card.tasks else None
    try:
        probe = await client.embed(name.model, [_PROBE], task)
    except Refused as refused:
        if refused.param != "task" or task is None:
            raise
        task = None  # the name stands for a task of its own
        probe = await client.embed(name.model, [_PROBE])
    if probe.is_experiment:
        raise CompareError(f"{name.text} is an experiment, which answers with several models: name those")
    return Side(task, probe.task, probe.space)
