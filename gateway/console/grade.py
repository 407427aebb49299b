"""The grading page: one query, one document and the judge's scale, for the check of a judge by people."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from fastapi import Request, Response

from gateway.api.admin import read_person
from gateway.api.comparisons import Comparisons, required
from gateway.api.grading import grading_card, read_place
from gateway.comparisons.grading import Grading, Standing
from gateway.comparisons.scale import MAX_GRADE, SCALE, WHAT_COUNTS
from gateway.config.wording import cut
from gateway.console.compare import Compare
from gateway.console.parts import Parts
from gateway.console.web import read_form, visitor_of
from gateway.errors import BadInput
from gateway.http.parameters import read_query

_LATE = "This document already had a grade, and keeps it."
_NOT_UNDONE = "Nothing was taken back: the file has another grade now."


class GradePages:
    """The handlers of the page."""

    def __init__(self, parts: Parts, compare: Compare, comparisons: Comparisons) -> None:
        self._parts = parts
        self._compare = compare
        self._comparisons = comparisons

    async def show(self, request: Request) -> Response:
        """Show the next document to grade."""
        query, name = request.query_params, request.path_params["run"]
        grader = read_query(request.scope["query_string"], "grader") if "grader" in query else ""
        after = read_place(query.get("after", "0"))
        standing = await self._grading(request).show(name, self._grader(request, grader), after)
        return self._page(
            request, standing, grader, {"late": _LATE, "undo": _NOT_UNDONE}.get(query.get("note", ""), "")
        )

    async def grade(self, request: Request) -> Response:
        """Keep a grade, and show the next document."""
        form = await read_form(request)
        grader, name, grade = form.first("grader"), request.path_params["run"], form.first("grade")
        if grade not in map(str, range(MAX_GRADE + 1)):
            raise BadInput(f"a grade is a whole number from 0 to {MAX_GRADE}, got {cut(grade)!r}", param="grade")
        pair = form.first("query"), form.first("document")
        standing = await self._grading(request).grade(name, self._grader(request, grader), pair, int(grade))
        return self._next(request, standing, grader, "" if standing.is_counted else "late")

    async def undo(self, request: Request) -> Response:
        """Take back the last grade of this person, and show its document."""
        grader, name = (await read_form(request)).first("grader"), request.path_params["run"]
        standing = await self._grading(request).undo(name, self._grader(request, grader))
        return self._next(request, standing, grader, "" if standing.is_counted else "undo")

    async def conclude(self, request: Request) -> Response:
        """Compute the verdict with people's grades, and show the comparison."""
        name = request.path_params["run"]
        await self._grading(request).conclude(name)
        return self._parts.pages.redirect(request, f"/compare/{quote(name)}")

    # ---------------------------------------------------------------------------------------------------------- parts

    def _grading(self, request: Request) -> Grading:
        return required(self._comparisons.grading)

    def _grader(self, request: Request, name: str) -> str:
        """Return the name that the reader has entered, or else the name of the key."""
        return read_person(name, "grader") if name else visitor_of(request).client.name

    def _next(self, request: Request, standing: Standing, grader: str, note: str) -> Response:
        # The page looks again: from the place before the pair that it should show.
        place = {"after": str(standing.place - 1)} if standing.next is not None else {}
        query = {**place, **({"grader": grader} if grader else {}), **({"note": note} if note else {})}
        path = f"/compare/{quote(standing.comparison)}/grade"
        return self._parts.pages.redirect(request, f"{path}?{urlencode(query)}" if query else path)

    def _page(self, request: Request, standing: Standing, grader: str, note: str) -> Response:
        return self._parts.pages.render(
            request,
            "grade.html.j2",
            card=grading_card(standing),
            is_enough=standing.is_enough,
            what_counts=WHAT_COUNTS,
            meanings=[meaning.removeprefix("The document ").removesuffix(".") for meaning in SCALE],
            grader=grader,
            note=note,
        )
