"""The arms of units before anything is embedded, for clients that must first know their collection, such as Mem0."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from gateway.api.endpoint import EXPECT_SPACE, Endpoint, add, unit_source
from gateway.api.experiments import find_experiment
from gateway.api.json_body import RequestBody, Texts
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.config.fields import FROM_NAME
from gateway.config.registry import Experiment
from gateway.errors import BadInput, ExperimentNotFound, ModelNotAllowed
from gateway.experiments import split
from gateway.experiments.split import Reason, UnitSource, read_unit
from gateway.http.context import RequestContext
from gateway.http.parameters import read_query
from gateway.routing.router import Choice, Router
from gateway.routing.written import MAX_UNIT_BYTES, write_name
from gateway.types import ModelKind

_MAX_UNITS = 1_000
_FEW_UNITS = 50  # some milliseconds of the event loop
COST_OF_UNIT = 250
"""The work of hashing a unit, as the number of characters that take as long to tokenize."""


class Sending(AnswerBody):
    """The parts of a request for embeddings that counts for the experiment, and fails rather than mix two spaces."""

    model: str = Field(
        description="The value of `model`: the experiment, the unit if the experiment takes it from the name, and the hash "
        "of the space. Vectors of another space are a 412."
    )
    headers: dict[str, str] = Field(description="Headers with the same check, for clients that can send headers.")
    unit_from: list[str] = Field(description="Possible places of the unit; a request needs only one of them.")


class AssignmentCard(AnswerBody):
    """The current arm of a unit; a change of the weights may move the unit."""

    object: Literal["assignment"] = "assignment"
    experiment: str
    generation: str = Field(description="Hash of salt, arms and weights; if it changes, units may have moved.")
    unit: str | None = Field(description="The unit as sent; `null` if the unit is the API key or missing.")
    arm: str
    model: str
    task: str | None = Field(description="The task of a request without one; `null` for a model without tasks.")
    width: int | None = Field(description="Dimensions of a full vector; `null` while the model is not known yet.")
    space: str | None = Field(description="Space of full vectors in this task. Name the collection after it.")
    state: str = Field(description="`ready` if the model answers now.")
    reason: str = Field(
        description="`unit` if the unit chose the arm. Otherwise a request is not counted: `forced`, `excluded`, "
        "`no_unit`, `not_started` or `ended`."
    )
    counted: bool = Field(description="Whether a request for embeddings would count for the experiment.")
    send: Sending


class AssignmentList(AnswerBody):
    """The arms of several units, in the order of the request."""

    object: Literal["list"] = "list"
    data: list[AssignmentCard]


class UnitsBody(RequestBody):
    """``POST /v1/experiments/{id}/assignment``."""

    units: Texts = Field(title="a list of strings", description=f"The units: at most {_MAX_UNITS:,}.")


_ERRORS = (BadInput, ModelNotAllowed, ExperimentNotFound)


class Assignments:
    """The handlers: one unit, or several."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._deployment = endpoint.deployment

    async def retrieve_assignment(
        self,
        request: Request,
        experiment_id: str,
        unit: Annotated[
            str | None, Query(description="The unit. By default the request's own unit: its header or API key.")
        ] = None,
    ) -> AssignmentCard:
        """Return the arm of a unit, its model and its space. A unit counts only once texts are embedded."""
        experiment = find_experiment(self._deployment, request, experiment_id)
        if unit is not None:
            unit = read_query(request.scope["query_string"], "unit")
        return self._assign(request, experiment, self._deployment.router, unit, "unit")

    async def list_assignments(self, request: Request, experiment_id: str) -> AssignmentList:
        """Return the arms of several units, in their order."""
        units = (await self._endpoint.read(request, UnitsBody.parse)).units
        # Read once together with the router, because a reload may happen between two units.
        experiment, router = find_experiment(self._deployment, request, experiment_id), self._deployment.router
        if not 0 < len(units) <= _MAX_UNITS:
            raise BadInput(f"`units` has {len(units)} units; it must have 1 to {_MAX_UNITS}", param="units")

        def assign() -> list[AssignmentCard]:
            return [self._assign(request, experiment, router, unit, "units") for unit in units]

        if len(units) <= _FEW_UNITS:
            return AssignmentList(data=assign())
        endpoint = self._endpoint
        return AssignmentList(
            data=await endpoint.in_turn(request, len(units) * COST_OF_UNIT, assign, endpoint.tokenizing)
        )

    def _assign(
        self, request: Request, experiment: Experiment, router: Router, unit: str | None, field: str
    ) -> AssignmentCard:
        """Return the assignment of a unit.

        Args:
            unit: the unit; ``None`` for the request's own.
            field: the place of the unit, for error messages.

        Raises:
            BadInput: the unit is empty or too long, or the experiment has no units.
        """
        if unit is not None:
            _check_unit(unit, field, MAX_UNIT_BYTES if FROM_NAME in experiment.unit else split.MAX_UNIT_BYTES)
        own = unit_source(request, None)
        source = own if unit is None else _given(unit, experiment, own)
        choice = router.choose(experiment.id, RequestContext.of(request).client, source)
        return _card(experiment, choice, router, unit)


def assignments_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the assignments, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    handlers = Assignments(endpoint)
    path = "/experiments/{experiment_id:path}/assignment"
    add(router, path, handlers.retrieve_assignment, responses(AssignmentCard, *_ERRORS))
    add(
        router,
        path,
        handlers.list_assignments,
        responses(AssignmentList, *_ERRORS),
        method="POST",
        request=request_body(UnitsBody),
    )
    return router


def _check_unit(unit: str, field: str, max_bytes: int) -> None:
    """Reject a unit that no request for embeddings could have.

    Raises:
        BadInput: the unit is blank or too long. The message does not quote it, because messages are logged.
    """
    num_bytes = len(unit.encode(errors="replace"))
    if not 0 < num_bytes <= max_bytes:
        raise BadInput(f"a unit must have 1 to {max_bytes} bytes, got {num_bytes}", param=field)
    if read_unit(unit) is None:
        raise BadInput("a unit must not be blank", param=field)


def _given(unit: str, experiment: Experiment, own: UnitSource) -> UnitSource:
    """Return a lookup that finds the unit in every place, and the header that forces an arm where it is."""
    return lambda source: own(source) if source == experiment.force else unit


def _card(experiment: Experiment, choice: Choice, router: Router, unit: str | None) -> AssignmentCard:
    """Return the assignment that a choice holds.

    Raises:
        BadInput: no unit chose the arm, so the next request may get another arm.
    """
    assignment = choice.assignment
    assert assignment is not None  # noqa: S101  the name is that of an experiment
    if assignment.reason is Reason.RANDOM:
        takes = f"send one, as {', '.join(experiment.unit)}" if experiment.unit else "it has no `unit` in models.yaml"
        raise BadInput(
            f"experiment {experiment.id!r} assigns requests without a unit at random, each separately; {takes}",
            param="unit",
        )
    info, task = choice.model.info, router.task_of(choice)
    embeds = info is not None and info.kind is ModelKind.EMBED
    space = info.space(task) if info is not None and embeds else None
    in_name = unit if FROM_NAME in experiment.unit else None
    return AssignmentCard(
        experiment=experiment.id,
        generation=assignment.generation,
        unit=unit,
        arm=assignment.arm.label,
        model=choice.model.id,
        task=task,
        width=(info.width or None) if info is not None and embeds else None,
        space=space,
        state=choice.model.state.value,
        reason=assignment.reason.value,
        counted=assignment.is_counted,
        send=Sending(
            model=write_name(experiment.id, in_name, space),
            headers={} if space is None else {EXPECT_SPACE: space},
            unit_from=list(experiment.unit),
        ),
    )
