"""Change the weights of an experiment, end it, or count again, in ``models.yaml`` and at once; preview moving units."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field

from gateway.api.admin import ReloadAnswer, reload_answer, require_operator
from gateway.api.assignments import COST_OF_UNIT
from gateway.api.endpoint import Endpoint, add
from gateway.api.experiments import find_experiment
from gateway.api.json_body import Number, RequestBody
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.config.editing import Change, edit_experiment
from gateway.config.registry import Experiment
from gateway.config.traffic import MAX_WEIGHT
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import BadInput, ExperimentNotFound, Forbidden, ModelNotAllowed, ReloadRefused, StartError
from gateway.experiments.split import Split
from gateway.routing.changes import NUM_SAMPLED, Reloaded, moved_units


class WeightsBody(RequestBody):
    """New weights."""

    weights: dict[str, Number] = Field(
        title="an object of numbers by arm", description="Weights by arm; arms that are left out keep theirs."
    )


class Preview(AnswerBody):
    """The consequences of new weights."""

    object: Literal["preview"] = "preview"
    experiment: str
    weights: dict[str, float] = Field(description="Of all arms.")
    moves: dict[str, float] = Field(
        description="The share of all units that moves from an arm to another: `mini -> new`, to half a point. With kind "
        "`cross_space`, those units find the other arm's collection, which is empty unless it was filled."
    )
    counts_begin_again: bool


def reweighted(experiment: Experiment, weights: Mapping[str, float]) -> Experiment:
    """Return an experiment with other weights.

    Args:
        weights: by arm; the other arms keep theirs.

    Raises:
        BadInput: an arm does not exist, a weight is negative, infinite or too large, or all weights are 0.
    """
    labels = [arm.label for arm in experiment.arms]
    for label, weight in weights.items():
        if label not in labels:
            raise BadInput(
                f"{experiment.id!r} has no arm {cut(label)!r}; available: {', '.join(labels)}", param="weights"
            )
        if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
            raise BadInput(f"the weight of {label!r} must be a number from 0 to {MAX_WEIGHT:,.0f}", param="weights")
    changed = Change(weights).of(experiment)
    if not any(arm.weight for arm in changed.arms):
        raise BadInput("at least one arm needs a weight above 0", param="weights")
    return changed


async def change_experiment(deployment: Deployment, experiment: Experiment, change: Change) -> Reloaded:
    """Write a change into ``models.yaml``, and serve it. If it is refused, the old file is restored.

    Raises:
        BadInput: the file cannot be changed; the message describes the change to make by hand.
        ReloadRefused: the registry is not accepted with the change.
    """
    async with deployment.changing:
        try:
            edit = await asyncio.to_thread(edit_experiment, deployment.registry, experiment.id, change, os.environ)
        except StartError as error:
            raise BadInput(str(error)) from error
        try:
            return await deployment.reload()
        except BaseException:  # also a client that hangs up must not leave half of a change
            with suppress(OSError):
                await asyncio.shield(asyncio.to_thread(edit.undo))
            raise


class ExperimentChanges:
    """The handlers: preview new weights, apply them, end the experiment, or count again."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._deployment = endpoint.deployment

    async def preview(self, request: Request, experiment_id: str) -> Preview:
        """Show the units that new weights would move. Nothing is changed."""
        weights = (await self._endpoint.read(request, WeightsBody.parse)).weights
        experiment = find_experiment(self._deployment, request, experiment_id)
        changed = reweighted(experiment, weights)
        endpoint, work = self._endpoint, partial(moved_units, experiment, changed)
        return Preview(
            experiment=experiment.id,
            weights={arm.label: arm.weight for arm in changed.arms},
            moves=await endpoint.in_turn(request, NUM_SAMPLED * COST_OF_UNIT, work, endpoint.tokenizing),
            counts_begin_again=Split(experiment).generation != Split(changed).generation,
        )

    async def change_weights(self, request: Request, experiment_id: str) -> ReloadAnswer:
        """Write new weights into `models.yaml`, and serve them."""
        require_operator(request, self._deployment.settings.admin_key)
        weights = (await self._endpoint.read(request, WeightsBody.parse)).weights
        experiment = self._find(experiment_id)
        reweighted(experiment, weights)
        return reload_answer(await change_experiment(self._deployment, experiment, Change(weights)))

    async def end(self, request: Request, experiment_id: str) -> ReloadAnswer:
        """End an experiment now: write its `end` into `models.yaml`, and serve that. The first arm answers from then on."""
        require_operator(request, self._deployment.settings.admin_key)
        return reload_answer(await end_experiment(self._deployment, self._find(experiment_id)))

    async def count_again(self, request: Request, experiment_id: str) -> ReloadAnswer:
        """Begin the counts again: write `counts_from` into `models.yaml`, and serve that. Nothing is deleted.

        Units stay in their arms. Requests, units, outcomes and decisions from before are left out of all figures, and
        stay in the files.
        """
        require_operator(request, self._deployment.settings.admin_key)
        return reload_answer(await count_again(self._deployment, self._find(experiment_id)))

    def _find(self, experiment_id: str) -> Experiment:
        experiment = self._deployment.registry.experiment(experiment_id)
        if experiment is None:
            shown = cut(self._deployment.router.names.shown(experiment_id))
            raise ExperimentNotFound(f"no experiment is called {shown!r}")
        return experiment


async def end_experiment(deployment: Deployment, experiment: Experiment) -> Reloaded:
    """End an experiment now.

    Raises:
        BadInput: it has ended, or the file cannot be changed.
        ReloadRefused: the registry is not accepted with the change.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    if experiment.end is not None and experiment.end <= now:
        raise BadInput(f"{experiment.id!r} ended on {experiment.end:%Y-%m-%d}")
    return await change_experiment(deployment, experiment, Change({}, now))


async def count_again(deployment: Deployment, experiment: Experiment) -> Reloaded:
    """Begin the counts of an experiment again now.

    Raises:
        BadInput: the file cannot be changed.
        ReloadRefused: the registry is not accepted with the change.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    if experiment.counts_from is not None and experiment.counts_from >= now:
        raise BadInput(f"the counts of {experiment.id!r} begin at {experiment.counts_from.isoformat()}")
    return await change_experiment(deployment, experiment, Change({}, counts_from=now))


def experiment_changes_router(endpoint: Endpoint) -> APIRouter:
    """Return the route for clients, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    add(
        router,
        "/experiments/{experiment_id:path}/preview",
        ExperimentChanges(endpoint).preview,
        responses(Preview, BadInput, ModelNotAllowed, ExperimentNotFound),
        method="POST",
        request=request_body(WeightsBody),
    )
    return router


def operators_changes_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the operator."""
    router = APIRouter(tags=["Admin"])
    handlers = ExperimentChanges(endpoint)
    for name, handler, body in (
        ("weights", handlers.change_weights, WeightsBody),
        ("end", handlers.end, None),
        ("count-again", handlers.count_again, None),
    ):
        router.add_api_route(
            f"/admin/experiments/{{experiment_id:path}}/{name}",
            handler,
            methods=["POST"],
            responses=responses(ReloadAnswer, BadInput, ReloadRefused, Forbidden, ExperimentNotFound),
            openapi_extra=None if body is None else request_body(body),
        )
    return router
