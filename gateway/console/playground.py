"""The playground: two or three arms on the same texts, side by side."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from gateway.console.arms import PASSAGE_TASK, QUERY_TASK
from gateway.console.charts import NUM_SHADES
from gateway.console.likeness import ranks
from gateway.console.parts import Parts
from gateway.console.snippets import Snippet, snippets
from gateway.console.trial import MAX_COMPARED, ArmFailure, ArmResult, run_arm
from gateway.console.web import Form, read_form
from gateway.console.words import signed
from gateway.errors import BadInput, RequestError
from gateway.http.context import RequestContext
from gateway.types import Timings

MAX_ARMS = 3
MAX_TEXTS = 50
_MAX_ARM = 200
_TOP = 5
_FAR = 3
_MOVE_SHADES = 4
_FULL_SHADE = 0.8  # cosines of different texts rarely exceed this
_KINDS = ("query", "texts")
_EXAMPLE = (
    "How does Ada like to travel?",
    (
        "Prefers trains to planes, even when it takes a day longer",
        "Afraid of flying since the storm over Lyon in 2019",
        "Booked a window seat on the night train to Vienna, 14 March",
        "Rides her bicycle along the canal to the office",
        "Flies to London for work once a quarter",
        "Travel insurance, policy 88-2041, ends on 30 June",
        "Does not eat meat; fish is fine",
        "Her sister Mary lives in Lisbon",
    ),
)


@dataclass(frozen=True, slots=True)
class Question:
    """The submitted form."""

    kind: str
    query: str
    candidates: Sequence[str]
    arms: Sequence[str]

    @property
    def texts(self) -> Sequence[str]:
        """The candidates, one per line."""
        return self.candidates


@dataclass(frozen=True, slots=True)
class Line:
    """A line from a text's rank in one arm to its rank in the next, in percent of the height."""

    text: int
    start: str
    end: str
    is_far: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a heat map: a pair of texts.

    Attributes:
        shade, own_shade: the shade of its value, on the common scale of all arms and on the scale of this arm.
        moved: the number of ranks that the pair has moved up from the first arm, among all pairs; empty in that arm.
        move_shade: from -4 (much less similar) to 4 (much more similar).
    """

    value: str
    shade: int
    own_shade: int
    moved: str = ""
    move_shade: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """An arm with its drawings.

    Attributes:
        index: index of the arm, which determines its shape and color.
        lines: the lines to the next arm; empty without a next arm, or if one of the two failed.
        heat: the lower triangle of the heat map, row by row.
        query_bars, texts_bars: name, start and width of each stage, in percent of the longest request.
    """

    index: int
    result: ArmResult
    lines: Sequence[Line]
    heat: Sequence[Sequence[Cell]]
    query_bars: Sequence[tuple[str, str, str]]
    texts_bars: Sequence[tuple[str, str, str]]
    snippets: Sequence[Snippet]


class Playground:
    """The handlers: the form, and its results."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def show(self, request: Request) -> Response:
        """Show the form, with the arms from the link, or the texts of an example."""
        arms = [arm[:_MAX_ARM] for arm in request.query_params.getlist("arm") if arm][:MAX_ARMS]
        query, candidates = _EXAMPLE if "example" in request.query_params else ("", ())
        return self._page(request, Question("query", query, candidates, arms or self._parts.usual_arms(request)))

    async def run(self, request: Request) -> Response:
        """Run the arms one after the other, so that they do not slow each other down, and show the results."""
        # Work in threads, because a megabyte of texts makes a page of four megabytes.
        asked = await asyncio.to_thread(_read, await read_form(request))
        problem = _problem(asked)
        if problem is not None:
            RequestContext.of(request).refuse(problem)
            return await asyncio.to_thread(self._page, request, asked, problem=problem)
        query = asked.query if asked.kind == "query" else ""
        results = [await run_arm(self._parts.endpoint, request, arm, query, asked.candidates) for arm in asked.arms]
        return await asyncio.to_thread(self._page, request, asked, results)

    def _page(
        self,
        request: Request,
        asked: Question,
        results: Sequence[ArmResult | ArmFailure] = (),
        problem: RequestError | None = None,
    ) -> Response:
        pages = self._parts.pages
        api = pages.api(request)
        shown = asked.query if asked.kind == "query" else next(iter(asked.candidates), "")
        columns = list(_columns(results, api, shown, needs_key=pages.gate.api_needs_key))
        return pages.render(
            request,
            "playground.html.j2",
            200 if problem is None else problem.status,
            asked=asked,
            names=self._parts.arm_names(request),
            problem=problem,
            results=results,
            columns=columns,
            has_rankings=bool(columns) and asked.kind == "query",
            summary=_summary(columns) if asked.kind == "query" else "",
            max_arms=MAX_ARMS,
            max_texts=MAX_TEXTS,
            max_compared=MAX_COMPARED,
            side_note=side_note,
        )


def _read(form: Form) -> Question:
    lines = [line.strip() for line in form.first("candidates").splitlines()]
    arms = [arm.strip()[:_MAX_ARM] for arm in form.all("arm")]
    kind = form.first("kind")
    return Question(
        kind if kind in _KINDS else "query",
        form.first("query").strip(),
        [line for line in lines if line],
        [arm for arm in arms if arm],
    )


def _problem(asked: Question) -> BadInput | None:
    """Return the error of a form, without the form's texts."""
    if asked.kind == "query" and not asked.query:
        return BadInput("the query is empty: write a question", param="query")
    least = 1 if asked.kind == "query" else 2
    if not least <= len(asked.candidates) <= MAX_TEXTS:
        return BadInput(
            f"{len(asked.candidates)} texts were sent; {least} to {MAX_TEXTS} are accepted", param="candidates"
        )
    if not 1 <= len(asked.arms) <= MAX_ARMS:
        return BadInput(f"{len(asked.arms)} arms were sent; 1 to {MAX_ARMS} are accepted", param="arm")
    return None


# ------------------------------------------------------------------------------------------------------------ drawing


def _columns(results: Sequence[ArmResult | ArmFailure], api: str, text: str, *, needs_key: bool) -> Iterator[Column]:
    answered = [result for result in results if isinstance(result, ArmResult)]
    longest = max(
        (_total(times) for result in answered for times in (result.query_times, result.texts_times)), default=0
    )
    # Cosines of two models cannot be compared, but the order of the pairs can.
    first = next((_pairs(result) for result in answered if result.likeness), [])
    for index, result in enumerate(results):
        if isinstance(result, ArmFailure):
            continue
        after = results[index + 1] if index + 1 < len(results) else None
        yield Column(
            index=index,
            result=result,
            lines=list(_lines(result, after)) if isinstance(after, ArmResult) and result.scores else [],
            heat=list(_heat(result, first)),
            query_bars=_bars(result.query_times, longest),
            texts_bars=_bars(result.texts_times, longest),
            snippets=snippets(result, api, text, needs_key=needs_key),
        )


def _lines(one: ArmResult, other: ArmResult) -> Iterator[Line]:
    num = len(one.order)
    ranks = {text: rank for rank, text in enumerate(other.order)}
    for rank, text in enumerate(one.order):
        places = [f"{100 * (place + 0.5) / num:.3f}%" for place in (rank, ranks[text])]
        yield Line(text, places[0], places[1], abs(rank - ranks[text]) >= _FAR)


def _pairs(result: ArmResult) -> list[float]:
    """Return the similarity of each pair of texts: the lower triangle, row by row."""
    return [value for number, row in enumerate(result.likeness) for value in row[:number]]


def _heat(result: ArmResult, first: Sequence[float]) -> Iterator[list[Cell]]:
    """Yield the rows of a heat map.

    Args:
        first: the similarities of the pairs in the first arm that has any.
    """
    values = _pairs(result)
    if not values:
        return
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    moves = [before - now for before, now in zip(ranks(first), ranks(values), strict=True)]
    cells = (
        Cell(_short(value), _shade(value / _FULL_SHADE), _shade((value - low) / span), *_moved(move, len(values)))
        for value, move in zip(values, moves, strict=True)
    )
    for length in range(1, len(result.likeness)):
        yield [next(cells) for _column in range(length)]


def _moved(move: float, num_pairs: int) -> tuple[str, int]:
    """Return the change of a rank as text, and its shade; from a third of all pairs on, the shade is darkest."""
    step = min(_MOVE_SHADES, math.ceil(_MOVE_SHADES * abs(move) / (num_pairs / 3)))
    return ("·", 0) if abs(move) < 1 else (signed(move, 0), step if move > 0 else -step)


def _shade(share: float) -> int:
    return min(NUM_SHADES - 1, max(0, int(share * NUM_SHADES)))


def _short(value: float) -> str:
    """Return a similarity with two digits and without the leading 0; a dot for 0."""
    text = f"{value:.2f}"
    if text in ("0.00", "-0.00"):
        return "·"
    return text[:3] if abs(value) >= 0.995 else text.replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")


def _total(times: Timings | None) -> float:
    return sum(times.stages.values()) if times else 0.0


def _bars(times: Timings | None, longest: float) -> list[tuple[str, str, str]]:
    """Return the name, the start and the width of each stage, in percent of the longest request."""
    bars, start = [], 0.0
    for name, seconds in times.stages.items() if times else ():
        width = 100 * seconds / longest if longest else 0.0
        bars.append((name, f"{start:.2f}%", f"{width:.2f}%"))
        start += width
    return bars


def _summary(columns: Sequence[Column]) -> str:
    """Return a sentence on the similarity of the first two arms' rankings."""
    if len(columns) < 2:
        return ""
    one, other = columns[0].result, columns[1].result
    top = min(_TOP, len(one.order))
    shared = len(set(one.order[:top]) & set(other.order[:top]))
    first = "put the same text first" if one.order[0] == other.order[0] else "put different texts first"
    return f"{one.arm.text} and {other.arm.text} {first} and share {shared} of their first {top}."


def side_note(result: ArmResult) -> str:
    """Return the tasks of the two sides."""
    if result.plan.query_task == QUERY_TASK:
        passages = result.plan.passage_task or "the same task"
        return f"query: {QUERY_TASK}, candidates: {passages if passages != PASSAGE_TASK else PASSAGE_TASK}"
    return f"task: {result.task}" if result.task else "no tasks"
