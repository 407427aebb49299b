"""Every space that a request can get vectors of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gateway.api.schema import responses
from gateway.backends.fleet import Model
from gateway.config.registry import Registry
from gateway.deployment import Deployment
from gateway.embedding import ModelInfo, ModelKind, canonical_task
from gateway.middleware import RequestContext
from gateway.routing.spaces import space_id, spaces_by_task


class SpaceMember(BaseModel):
    """A model and task whose vectors are in the space."""

    model: str
    task: str | None
    state: str
    names: list[str] = Field(description="What a client can send as `model` to get there.")


class SpaceCard(BaseModel):
    """Vectors of one space can be compared with each other, and with those of no other one."""

    id: str = Field(description="`NAME@HASH`; two ids with the same hash are the same space.")
    object: Literal["space"]
    dimensions: int
    is_normalised: bool
    pooling: str
    fingerprint: str = Field(description="SHA-256 over the weights, the tokenizer and the kind of pooling.")
    members: list[SpaceMember]


class SpaceList(BaseModel):
    """Every space of the loaded models, those of smaller `dimensions` included."""

    object: Literal["list"]
    data: list[SpaceCard]


def spaces_router(deployment: Deployment) -> APIRouter:
    """Return the route that lists the spaces, with and without ``/v1``."""
    router = APIRouter(tags=["Spaces"])

    async def list_spaces(request: Request) -> SpaceList:
        """List the spaces that vectors can be in, and the names that lead there; of the models that the key is for."""
        client, registry = RequestContext.of(request).client, deployment.registry
        models = [model for model in deployment.fleet if client.may_use(model.id, *registry.aliases_of(model.id))]
        return SpaceList(object="list", data=space_cards(registry, models))

    for prefix, is_shown in (("/v1", True), ("", False)):
        router.add_api_route(
            f"{prefix}/spaces", list_spaces, responses=responses(SpaceList), include_in_schema=is_shown
        )
    return router


def space_cards(registry: Registry, models: Iterable[Model]) -> list[SpaceCard]:
    """Describe every space, in the order of the registry; with the vectors' usual normalisation."""
    cards: dict[str, SpaceCard] = {}  # by hash: what stands before it is for people
    for model in models:
        info = model.info
        if info is None or info.kind is not ModelKind.EMBED:
            continue
        for size in info.dimensions:
            for task in spaces_by_task(info):
                space = space_id(info, task, size, is_normalised=info.is_normalised)
                card = cards.setdefault(
                    space.rpartition("@")[2],
                    SpaceCard(
                        id=space,
                        object="space",
                        dimensions=size,
                        is_normalised=info.is_normalised,
                        pooling=info.pooling,
                        fingerprint=info.fingerprint,
                        members=[],
                    ),
                )
                names = _names(registry, info, task)
                card.members.append(SpaceMember(model=model.id, task=task, state=model.state.value, names=names))
    return list(cards.values())


def _names(registry: Registry, info: ModelInfo, task: str | None) -> list[str]:
    names = [info.id] if task == info.default_task else []
    names += [f"{info.id}:{task}"] if task is not None else []
    for alias in registry.aliases.values():
        if alias.model == info.id:
            # For a model without tasks, that of the alias has no effect.
            asked = canonical_task(alias.task) if alias.task and info.tasks else info.default_task
            names += [alias.name] if asked == task else []
    return names
