"""Outcomes of experiments: results of the units, posted by the application."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field

from gateway.api.endpoint import Endpoint, add
from gateway.api.experiments import Experiments, find_experiment
from gateway.api.json_body import Json, describe
from gateway.api.wire import AnswerBody, responses
from gateway.errors import (
    BadInput,
    BodyTooLarge,
    ExperimentNotFound,
    ModelNotAllowed,
    NotFound,
    OutcomesUnavailable,
    RateLimited,
)
from gateway.experiments.outcome_report import OutcomesReport
from gateway.experiments.split import Split
from gateway.http.context import RequestContext
from gateway.outcomes.keeper import Keeper
from gateway.outcomes.reading import PostedOutcome, WrongOutcome, read_outcome
from gateway.outcomes.store import MAX_NAMES, MAX_PER_UNIT, NewOutcome

_MAX_OUTCOMES = 1_000
_MAX_BODY_BYTES = 1024 * 1024
_ROWS = "outcomes"
_ERRORS = (BadInput, ModelNotAllowed, ExperimentNotFound, NotFound, OutcomesUnavailable)


class OutcomesAnswer(AnswerBody):
    """The outcomes were read, and the counted ones are on disk."""

    object: Literal["outcomes.posted"] = "outcomes.posted"
    received: int
    stored: int
    unseen: int = Field(
        description="Stored, although their unit sent no request for embeddings here before. They count only if another "
        "replica got one. If there are many, the units may be written differently from those of the requests."
    )
    repeated: int = Field(description="Left out: the same outcome, with the same `id`, is already stored.")
    conflicting: int = Field(
        description="Left out: another unit or another value is already stored with their `id`. Give each outcome its own."
    )
    excluded: int = Field(description="Left out: the experiment excludes their unit.")
    too_many_of_unit: int = Field(
        description=f"Left out: their unit already has {MAX_PER_UNIT:,} outcomes of that name."
    )
    unknown_unit: int = Field(
        description="Left out: their unit sent no request for embeddings. Some are kept: another replica may have got it."
    )
    too_many_names: int = Field(
        description=f"Left out: the experiment already has outcomes of {MAX_NAMES} other names."
    )


class OutcomeRoutes:
    """The handlers: post outcomes, and compare the arms."""

    def __init__(self, endpoint: Endpoint, experiments: Experiments, keeper: Keeper | None) -> None:
        self._endpoint = endpoint
        self._experiments = experiments
        self._keeper = keeper

    async def create_outcomes(self, request: Request, experiment_id: str) -> OutcomesAnswer:
        """Post outcomes of units. A request is stored completely or not at all; repeating an `id` changes nothing."""
        now = time.time()
        RequestContext.of(request).body.limit(_MAX_BODY_BYTES)
        rows = await self._endpoint.receive(request, _rows, rows=_ROWS)
        experiment = find_experiment(self._endpoint.deployment, request, experiment_id)
        keeper = self._require_keeper()
        primary = experiment.outcome.name if experiment.outcome else None
        read = partial(_read, rows=rows, split=Split(experiment), primary=primary, now=now)
        outcomes = await self._endpoint.in_turn(request, _MAX_BODY_BYTES, read)
        kept = await keeper.post(experiment, outcomes)
        return OutcomesAnswer(
            received=len(rows),
            stored=kept.stored,
            unseen=kept.unseen,
            repeated=kept.repeated,
            conflicting=kept.conflicting,
            excluded=len(rows) - len(outcomes),
            too_many_of_unit=kept.too_many_of_unit,
            unknown_unit=kept.unknown_unit,
            too_many_names=kept.too_many_names,
        )

    async def retrieve_outcomes(self, request: Request, experiment_id: str) -> OutcomesReport:
        """Compare the arms by their outcomes, with intervals and a verdict that are valid at any time."""
        self._require_keeper()
        report = (await self._experiments.retrieve_experiment(request, experiment_id)).outcomes
        assert report is not None  # noqa: S101  outcomes are kept
        return report

    def _require_keeper(self) -> Keeper:
        if self._keeper is None:
            raise NotFound("outcomes are turned off: set GATEWAY_STATE_DIR to a folder on a local disk")
        return self._keeper


def _rows(content: dict[str, Json]) -> list[Json]:
    rows = content.get(_ROWS)
    if not isinstance(rows, list):
        raise BadInput(f"the body must be a list of outcomes, got {describe(rows)} in `{_ROWS}`", param=_ROWS)
    if not 0 < len(rows) <= _MAX_OUTCOMES:
        raise BadInput(f"the body has {len(rows):,} outcomes; 1 to {_MAX_OUTCOMES:,} are accepted", param=_ROWS)
    return rows


def _read(rows: list[Json], split: Split, primary: str | None, now: float) -> list[NewOutcome]:
    """Return the outcomes, without those of excluded units.

    Raises:
        BadInput: names the first that is wrong.
    """
    outcomes = []
    for index, row in enumerate(rows):
        try:
            outcome = read_outcome(row, split, primary, now)
        except WrongOutcome as error:
            param = f"[{index}].{error.field}" if error.field else f"[{index}]"
            raise BadInput(f"`{param}` {error.problem}", param=param) from None
        if outcome is not None:
            outcomes.append(outcome)
    return outcomes


def outcomes_router(endpoint: Endpoint, experiments: Experiments, keeper: Keeper | None) -> APIRouter:
    """Return the routes of the outcomes, with and without ``/v1``."""
    router = APIRouter(tags=["Experiments"])
    handlers = OutcomeRoutes(endpoint, experiments, keeper)
    path = "/experiments/{experiment_id:path}/outcomes"
    answers = responses(OutcomesAnswer, *_ERRORS, BodyTooLarge, RateLimited)
    answers[202] = answers.pop(200)
    schema = {"type": "array", "minItems": 1, "maxItems": _MAX_OUTCOMES, "items": PostedOutcome.model_json_schema()}
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    add(router, path, handlers.create_outcomes, answers, method="POST", request=body, status=202)
    add(router, path, handlers.retrieve_outcomes, responses(OutcomesReport, *_ERRORS))
    return router
