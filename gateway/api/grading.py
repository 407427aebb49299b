"""People's grades for the check of a judge, for the operator: get a pair, grade it, and compute the verdict again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, BeforeValidator, Field

from gateway.api.admin import OPERATOR, person_of, read_person, require_operator
from gateway.api.comparisons import ComparisonCard, Comparisons, find_card, required
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import RequestBody, whole_number
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.comparisons.grading import Grading, Standing
from gateway.comparisons.scale import MAX_GRADE, SCALE
from gateway.config.wording import cut
from gateway.errors import BadInput, Forbidden, NotFound

_MAX_DIGITS = 9
_ERRORS = (BadInput, Forbidden, NotFound)
# Not a parameter of the handler, so that a wrong value gets this API's own error.
_AFTER = {
    "name": "after",
    "in": "query",
    "required": False,
    "description": "Look for the next pair after this `place` first. To skip a pair, send its `place`.",
    "schema": {"type": "integer", "minimum": 0, "default": 0},
}
_Grader = Annotated[str, Query(description="Name of the grader. Several people get pairs of different queries.")]


class GradeBody(RequestBody):
    """``POST …/grades``."""

    query: str = Field(title="a string", description="The query's id.")
    document: str = Field(title="a string", description="The document's id.")
    grade: Annotated[int, Field(ge=0, le=MAX_GRADE), BeforeValidator(whole_number)] = Field(
        title=f"a whole number from 0 to {MAX_GRADE}", description="A grade of the `scale`."
    )
    grader: str = Field(OPERATOR, title="a string", description="Name of the grader.")


class PairToGrade(BaseModel):
    """A query and a document, without the arm and the judge's grade."""

    place: int = Field(description="Number of the pair in the file, from 1.")
    query: str
    document: str
    query_text: str
    document_text: str = Field(description="The document's text on one line, cut as for the judge.")


class GradeMeaning(BaseModel):
    """A grade of the scale."""

    grade: int
    meaning: str


class GradingCard(AnswerBody):
    """The progress of the grading of a comparison, and the next pair of a person."""

    object: Literal["grading"] = "grading"
    comparison: str
    scale: Sequence[GradeMeaning] = Field(description="The grades; the judge uses the same definitions.")
    graded: int = Field(description="Number of documents with a grade.")
    documents: int
    whole_queries: int = Field(description="Number of completely graded queries. Only these count.")
    queries: int
    needed: int = Field(
        description="Number of completely graded queries for a verdict: all of them, since some of them would not be a "
        "random sample."
    )
    next: PairToGrade | None = Field(description="The next pair; `null` if all documents have a grade.")
    can_undo: bool = Field(description="Whether `POST …/grades/undo` can take back a grade of this person.")
    counted: bool | None = Field(
        default=None, description="After a grade or an undo: `false` if the file has another grade for the pair."
    )


def grading_card(standing: Standing) -> GradingCard:
    """Return the card of a grading."""
    row = standing.next
    return GradingCard(
        comparison=standing.comparison,
        scale=[GradeMeaning(grade=grade, meaning=meaning) for grade, meaning in enumerate(SCALE)],
        graded=standing.num_graded,
        documents=standing.num_pairs,
        whole_queries=standing.num_whole,
        queries=standing.num_queries,
        needed=standing.num_needed,
        next=None
        if row is None
        else PairToGrade(
            place=standing.place,
            query=row.query,
            document=row.document,
            query_text=row.query_text,
            document_text=row.document_text,
        ),
        can_undo=standing.can_undo,
        counted=standing.is_counted,
    )


def read_place(text: str) -> int:
    """Return a place in the file, which may be after its last pair.

    Raises:
        BadInput: it is not a whole number from 0.
    """
    if not (text.isdecimal() and text.isascii()):
        raise BadInput(f"`after` must be a whole number from 0, got {cut(text)!r}", param="after")
    return int(text) if len(text) <= _MAX_DIGITS else 10**_MAX_DIGITS


class GradingRoutes:
    """The handlers."""

    def __init__(self, endpoint: Endpoint, comparisons: Comparisons) -> None:
        self._endpoint = endpoint
        self._comparisons = comparisons

    async def next_pair(self, request: Request, name: str, grader: _Grader = OPERATOR) -> GradingCard:
        """Return the next query and document to grade, and how many are graded."""
        grading, after = self._require(request), read_place(request.query_params.get("after", "0"))
        return grading_card(await grading.show(name, person_of(request, "grader"), after))

    async def grade(self, request: Request, name: str) -> GradingCard:
        """Grade a document, and get the next one. The first grade of a document counts."""
        grading = self._require(request)
        body = await self._endpoint.read(request, GradeBody.parse)
        pair = body.query, body.document
        return grading_card(await grading.grade(name, read_person(body.grader, "grader"), pair, body.grade))

    async def undo_grade(self, request: Request, name: str, grader: _Grader = OPERATOR) -> GradingCard:
        """Take back the last grade that a person gave since the gateway started, and get its pair again."""
        return grading_card(await self._require(request).undo(name, person_of(request, "grader")))

    async def conclude(self, request: Request, name: str) -> ComparisonCard:
        """Compute the verdict again with people's grades. Needs neither the models nor the judge."""
        await self._require(request).conclude(name)
        runs, jobs = self._comparisons.require(request)
        return await find_card(runs, jobs, name, has_results=True)

    def _require(self, request: Request) -> Grading:
        require_operator(request, self._endpoint.settings.admin_key)
        return required(self._comparisons.grading)


def grading_router(endpoint: Endpoint, comparisons: Comparisons) -> APIRouter:
    """Return the routes of the operator."""
    router = APIRouter(tags=["Admin"])
    handlers = GradingRoutes(endpoint, comparisons)
    path = "/admin/comparisons/{name}"
    router.add_api_route(
        f"{path}/grading",
        handlers.next_pair,
        responses=responses(GradingCard, *_ERRORS),
        openapi_extra={"parameters": [_AFTER]},
    )
    router.add_api_route(
        f"{path}/grades",
        handlers.grade,
        methods=["POST"],
        responses=responses(GradingCard, *_ERRORS),
        openapi_extra=request_body(GradeBody),
    )
    for place, handler, card in (
        ("grades/undo", handlers.undo_grade, GradingCard),
        ("verdict", handlers.conclude, ComparisonCard),
    ):
        router.add_api_route(f"{path}/{place}", handler, methods=["POST"], responses=responses(card, *_ERRORS))
    return router
