"""The list of all spaces that a request can get vectors from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gateway.api.endpoint import add
from gateway.api.wire import AnswerBody, responses
from gateway.deployment import Deployment
from gateway.fleet import Model
from gateway.http.context import RequestContext
from gateway.precision import CALIBRATED, Precision
from gateway.routing.names import Client
from gateway.routing.router import Choice, Router
from gateway.tasks import canonical_task
from gateway.types import ModelInfo, ModelKind


class SpaceMember(BaseModel):
    """A model and task whose vectors are in the space."""

    model: str
    task: str | None
    state: str
    names: list[str] = Field(description="Values of `model` that return vectors of the space.")
    experiments: list[str] = Field(
        description="Experiments that return vectors of the space for some requests, depending on the arm or the task."
    )


class SpaceCard(AnswerBody):
    """Vectors of one space can be compared with each other, and not with those of another."""

    id: str = Field(description="`NAME@HASH`; two ids with the same hash are the same space.")
    object: Literal["space"] = "space"
    dimensions: int | None = Field(
        description="Dimensions of dense vectors; `null` for sparse vectors and multi-vectors alone."
    )
    outputs: list[str] = Field(description="The kind of vectors in the space.")
    precision: Precision = Field(
        description="Number type of the vectors. Binary vectors are the signs of float vectors, and in the same space."
    )
    normalized: bool
    pooling: str
    fingerprint: str = Field(description="SHA-256 over the weights, the tokenizer and the kind of pooling.")
    members: list[SpaceMember]


class SpaceList(AnswerBody):
    """Every space of the loaded models, including those of smaller `dimensions`."""

    object: Literal["list"] = "list"
    data: list[SpaceCard]


class Spaces:
    """The handler of the list."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    async def list_spaces(self, request: Request) -> SpaceList:
        """List the spaces that vectors can be in, and the names of each that the key may use."""
        client = RequestContext.of(request).client
        return SpaceList(data=space_cards(self._deployment.router, self._deployment.fleet, client))


def spaces_router(deployment: Deployment) -> APIRouter:
    """Return the route that lists the spaces, with and without ``/v1``."""
    router = APIRouter(tags=["Spaces"])
    add(router, "/spaces", Spaces(deployment).list_spaces, responses(SpaceList))
    return router


def space_cards(router: Router, models: Iterable[Model], client: Client) -> list[SpaceCard]:
    """Return the card of every space that a client can use, in the registry's order; with the default normalization."""
    choices = [router.choose(name, client) for name in router.names.usable_by(client)]
    cards: dict[str, SpaceCard] = {}  # by hash: the part before it is for people
    for model in models:
        info = model.info
        if info is None or info.kind is not ModelKind.EMBED:
            continue
        members = [
            member for task in info.spaces_by_task() if (member := _member(choices, router, model, task, client))
        ]
        precisions = [Precision.FLOAT, *sorted(CALIBRATED)] if info.ranges else [Precision.FLOAT]
        for size, precision, member in product(info.dimensions or (None,), precisions, members):
            space = info.space(member.task, size, precision=precision)
            card = cards.setdefault(space.rpartition("@")[2], _card(space, info, size, precision))
            card.members.append(member)
    return list(cards.values())


def _card(space: str, info: ModelInfo, size: int | None, precision: Precision) -> SpaceCard:
    return SpaceCard(
        id=space,
        dimensions=size,
        outputs=[output.value for output in info.outputs],
        precision=precision,
        normalized=info.is_normalized,
        pooling=info.pooling,
        fingerprint=info.fingerprint,
        members=[],
    )


def _member(
    choices: Sequence[Choice], router: Router, model: Model, task: str | None, client: Client
) -> SpaceMember | None:
    """Return a model with a task as a member, if any of the choices leads there."""
    names: list[str] = []
    experiments: list[str] = []
    for choice in choices:
        if choice.experiment is None:
            names += _names(choice, model, task, is_by_id=router.names.allows(client, model.id))
        elif _reaches(router, choice, model, task):
            # If its arms share a space, an experiment is a name for that space.
            is_name = choice.experiment.kind == "same_space" and task == router.task_of(choice)
            (names if is_name else experiments).append(choice.asked)
    if not names and not experiments:
        return None
    return SpaceMember(model=model.id, task=task, state=model.state.value, names=names, experiments=experiments)


def _names(choice: Choice, model: Model, task: str | None, *, is_by_id: bool) -> Iterator[str]:
    """Yield the values of ``model`` that lead to a model with a task; nothing if the name does not lead there.

    Args:
        is_by_id: the client may also use the model by its id.
    """
    if choice.model is not model or model.info is None:
        return
    pinned = _pinned(choice.task, model.info)
    if task == (pinned or model.info.default_task):
        yield choice.asked
    is_other_name = choice.asked != model.id and is_by_id
    if task is not None and pinned is None and not is_other_name:
        yield f"{choice.asked}:{task}"


def _reaches(router: Router, choice: Choice, model: Model, task: str | None) -> bool:
    """Return whether requests under an experiment's name can be answered by a model with a task."""
    pinned = [
        _pinned(arm.task, model.info)
        for arm, arm_model, _task in router.arms(choice)
        if arm_model is model and model.info is not None
    ]
    return any(task_of_name is None or task_of_name == task for task_of_name in pinned)


def _pinned(task: str | None, info: ModelInfo) -> str | None:
    """Return the task in a name; ``None`` for a model without tasks, where it has no effect."""
    return canonical_task(task) if task and info.tasks else None
