"""The duel pages: two unnamed lists for a query, a vote, and the current standing; all as the API returns them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from fastapi import Request, Response

from gateway.api.comparisons import required
from gateway.api.duels import MAX_LISTED, DuelCard, DuelText, duel_card, duel_entry, read_choice
from gateway.comparisons.dueling import Duels, Open
from gateway.comparisons.duels import TARGET
from gateway.comparisons.runs import Run
from gateway.console.charts import Scale
from gateway.console.compare import Compare
from gateway.console.parts import Parts
from gateway.console.web import read_form, visitor_of

_STEADY = 0.7
_MOST_SECONDS = 86_400.0  # a longer time is not informative


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two lists.

    Attributes:
        in_both: documents that are in both lists.
        first_key: the keyboard key that marks the first text.
    """

    shown: Sequence[DuelText]
    in_both: frozenset[str]
    first_key: int


class DuelPages:
    """The handlers of the pages."""

    def __init__(self, parts: Parts, compare: Compare) -> None:
        self._parts = parts
        self._compare = compare

    async def begin_page(self, request: Request) -> Response:
        """Show the duels, and the form for a new duel."""
        runs, duels = self._compare.runs(request), self._compare.duels
        known: list[Run] = []
        begun = []
        if runs is not None and duels is not None:
            known = [run for run in await asyncio.to_thread(runs.latest) if run.results is not None]
            voter = visitor_of(request).client.name
            begun = [duel_entry(found) for found in await duels.latest(MAX_LISTED, voter)]
        chosen = request.query_params.get("run", "")
        run = next((candidate for candidate in known if candidate.name == chosen), known[0] if known else None)
        return self._parts.pages.render(
            request, "duel_begin.html.j2", runs=runs, known=known, run=run, begun=begun, target=TARGET
        )

    async def begin(self, request: Request) -> Response:
        """Draw the pairs of a duel."""
        form = await read_form(request)
        run = form.first("run")
        name = await self._duels(request).begin(run, form.first("baseline"), form.first("arm"))
        return self._parts.pages.redirect(request, f"/duel/{quote(run)}/{name}")

    async def show(self, request: Request) -> Response:
        """Show the next pair, or the result."""
        card = duel_card(await self._open(request))
        return self._result(request, card) if card.pair is None else self._pair(request, card)

    def _pair(self, request: Request, card: DuelCard) -> Response:
        scale, standing, pair = Scale(0.0, 1.0), card.standing, card.pair
        assert pair is not None  # noqa: S101  the page of a pair
        in_both = frozenset(text.document for text in pair.left) & frozenset(text.document for text in pair.right)
        return self._parts.pages.render(
            request,
            "duel.html.j2",
            standing=standing,
            here_duel=_place(request),
            pair=pair,
            sides=(Side(pair.left, in_both, 1), Side(pair.right, in_both, 6)),
            start=scale.at(standing.low),
            width=scale.length(standing.low, standing.high),
            point=scale.at(standing.share),
            now=datetime.now(UTC).timestamp(),
        )

    def _result(self, request: Request, card: DuelCard) -> Response:
        scale, result = Scale(0.0, 1.0), card.result
        assert result is not None  # noqa: S101  no pair is left
        return self._parts.pages.render(
            request,
            "duel_done.html.j2",
            card=card,
            result=result,
            here_duel=_place(request),
            start=scale.at(result.low),
            width=scale.length(result.low, result.high),
            point=scale.at(result.share),
            steady=_STEADY,
        )

    async def vote(self, request: Request) -> Response:
        """Count a vote; a second vote of the same voter for a turn is ignored."""
        form = await read_form(request)
        choice, turn = read_choice(form.first("vote")), form.first("turn")
        duels, voter = self._duels(request), visitor_of(request).client.name
        if turn.isdecimal() and turn.isascii():
            place = request.path_params["run"], request.path_params["duel"]
            shown_s = _seconds_since(form.first("shown"))
            await duels.vote(place, voter, int(turn[:9]), choice, form.all("mark"), shown_s)
        return self._again(request)

    async def undo(self, request: Request) -> Response:
        """Take back the last vote of this voter."""
        params = request.path_params
        await self._duels(request).undo(params["run"], params["duel"], visitor_of(request).client.name)
        return self._again(request)

    async def end(self, request: Request) -> Response:
        """End the duel, and show the names."""
        params = request.path_params
        await self._duels(request).end(params["run"], params["duel"], visitor_of(request).client.name)
        return self._again(request)

    async def qrels(self, request: Request) -> Response:
        """Return the judgments that follow from the marks."""
        known = await self._open(request)
        return _download(known.qrels, "qrels.tsv")

    async def votes(self, request: Request) -> Response:
        """Return the votes."""
        known = await self._open(request)
        lines = await asyncio.to_thread(
            lambda: [f"{vote.model_dump_json(exclude_defaults=True)}\n" for vote in known.votes]
        )
        return _download("".join(lines), "votes.jsonl")

    # ---------------------------------------------------------------------------------------------------------- parts

    def _duels(self, request: Request) -> Duels:
        return required(self._compare.duels)

    async def _open(self, request: Request) -> Open:
        params = request.path_params
        return await self._duels(request).open(params["run"], params["duel"], visitor_of(request).client.name)

    def _again(self, request: Request) -> Response:
        return self._parts.pages.redirect(request, f"/duel/{_place(request)}")


def _place(request: Request) -> str:
    """Return the place of a duel, for links."""
    return f"{quote(request.path_params['run'])}/{request.path_params['duel']}"


def _seconds_since(shown_at: str) -> float | None:
    """Return the seconds that a pair was shown; ``None`` if the form does not state the start."""
    try:
        seconds = datetime.now(UTC).timestamp() - float(shown_at)
    except ValueError:
        return None
    return round(max(0.0, seconds), 1) if abs(seconds) < _MOST_SECONDS else None


def _download(content: str, name: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
    return Response(content, headers=headers, media_type="text/plain; charset=utf-8")
