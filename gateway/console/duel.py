"""The duel pages: two unnamed lists for a query, a vote, and the current standing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import get_args
from urllib.parse import quote

from fastapi import Request, Response

from gateway.comparisons.runs import Run, Runs
from gateway.console.charts import Scale
from gateway.console.compare import Compare
from gateway.console.duels import TARGET, Choice, Duel, DuelFolder, Shown, Standing, Vote, draw, qrels, stand
from gateway.console.parts import Parts
from gateway.console.web import read_form, visitor_of
from gateway.errors import BadInput, NotFound
from gateway.experiments.preference import Ballot

_STEADY = 0.7
_MANY_VOTERS = 15
_MAX_SHOWN_DUELS = 10
_MOST_SECONDS = 86_400.0  # a longer time is not informative


@dataclass(frozen=True, slots=True)
class Begun:
    """A duel in the list."""

    run: str
    name: str
    num_votes: int
    is_over: bool


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two lists.

    Attributes:
        in_both: documents that are in both lists.
        first_key: the keyboard key that marks the first text.
    """

    shown: Sequence[Shown]
    in_both: frozenset[str]
    first_key: int


class DuelPages:
    """The handlers of the pages."""

    def __init__(self, parts: Parts, compare: Compare) -> None:
        self._parts = parts
        self._compare = compare
        # Votes are appended one after the other, so that two clicks count as one vote.
        self._writing = asyncio.Lock()

    async def begin_page(self, request: Request) -> Response:
        """Show the duels, and the form for a new duel."""
        runs = self._compare.runs(request)
        known: list[Run] = []
        begun: list[Begun] = []
        if runs is not None:
            known = [run for run in await asyncio.to_thread(runs.latest) if run.results is not None]
            begun = await asyncio.to_thread(self._begun, runs, known, visitor_of(request).client.name)
        chosen = request.query_params.get("run", "")
        run = next((one for one in known if one.name == chosen), known[0] if known else None)
        return self._parts.pages.render(
            request, "duel_begin.html.j2", runs=runs, known=known, run=run, begun=begun, target=TARGET
        )

    async def begin(self, request: Request) -> Response:
        """Draw the pairs of a duel."""
        form = await read_form(request)
        runs = self._runs(request)
        run = await asyncio.to_thread(runs.find, form.first("run"))
        names = [] if run.results is None else [arm.name for arm in run.results.arms]
        baseline, arm = form.first("baseline"), form.first("arm")
        if baseline not in names or arm not in names or baseline == arm:
            raise BadInput(f"choose two different arms of {run.name}: {', '.join(names)}")
        seed = secrets.randbits(32)
        duel = await asyncio.to_thread(lambda: draw(runs.queries(run.name), baseline, arm, seed))
        name = await asyncio.to_thread(DuelFolder(runs.path(run.name)).create, duel)
        return self._parts.pages.redirect(request, f"/duel/{quote(run.name)}/{name}")

    async def show(self, request: Request) -> Response:
        """Show the next pair, or the result."""
        _folder, duel, votes = await self._open(request)
        standing = stand(duel, votes, visitor_of(request).client.name)
        if standing.next_turn is None:
            return self._result(request, duel, votes, standing)
        return self._pair(request, duel, standing, standing.next_turn)

    def _pair(self, request: Request, duel: Duel, standing: Standing, turn: int) -> Response:
        preference, scale = standing.preference, Scale(0.0, 1.0)
        # Show the share of the leader without revealing which of the two leads.
        low, high = preference.low, preference.high
        if preference.share < 0.5:
            low, high = 1 - high, 1 - low
        share = max(preference.share, 1 - preference.share)
        return self._parts.pages.render(
            request,
            "duel.html.j2",
            standing=standing,
            here_duel=_place(request),
            target=TARGET,
            turn=turn,
            pair=duel.pairs[duel.turns[turn].pair],
            sides=_sides(duel, turn),
            share=share,
            low=low,
            high=high,
            start=scale.at(low),
            width=scale.length(low, high),
            point=scale.at(share),
            now=datetime.now(UTC).timestamp(),
        )

    def _result(self, request: Request, duel: Duel, votes: Sequence[Vote], standing: Standing) -> Response:
        preference, scale = standing.preference, Scale(0.0, 1.0)
        return self._parts.pages.render(
            request,
            "duel_done.html.j2",
            duel=duel,
            standing=standing,
            here_duel=_place(request),
            name=request.path_params["run"],
            verdict=verdict(duel, standing),
            start=scale.at(preference.low),
            width=scale.length(preference.low, preference.high),
            point=scale.at(preference.share),
            steady=_STEADY,
            num_marked=qrels(duel, votes).count("\n") - 1,
        )

    async def vote(self, request: Request) -> Response:
        """Count a vote; a second vote of the same voter for a turn is ignored."""
        form = await read_form(request)
        choice, marked = form.first("vote"), form.all("mark")
        voter = visitor_of(request).client.name
        async with self._writing:
            folder, duel, votes = await self._open(request)
            turn = stand(duel, votes, voter).next_turn
            if choice not in get_args(Choice):
                raise BadInput(f"a vote is one of: {', '.join(get_args(Choice))}")
            if turn is not None and form.first("turn") == str(turn):
                await asyncio.to_thread(
                    folder.add,
                    request.path_params["duel"],
                    _vote(duel, turn, choice, marked, voter, form.first("shown")),
                )
        return self._again(request)

    async def undo(self, request: Request) -> Response:
        """Take back the last vote of this voter."""
        return await self._note(request, undo=True)

    async def end(self, request: Request) -> Response:
        """End the duel, and show the names."""
        return await self._note(request, end=True)

    async def qrels(self, request: Request) -> Response:
        """Return the judgments that follow from the marks."""
        _folder, duel, votes = await self._open(request)
        return _download(qrels(duel, votes), "qrels.tsv")

    async def votes(self, request: Request) -> Response:
        """Return the votes."""
        _folder, _duel, votes = await self._open(request)
        return _download("".join(f"{vote.model_dump_json(exclude_defaults=True)}\n" for vote in votes), "votes.jsonl")

    # ---------------------------------------------------------------------------------------------------------- parts

    def _runs(self, request: Request) -> Runs:
        runs = self._compare.runs(request)
        if runs is None:
            raise NotFound("GATEWAY_RUNS_DIR is not set, so there are no comparisons and no duels")
        return runs

    async def _open(self, request: Request) -> tuple[DuelFolder, Duel, list[Vote]]:
        folder = DuelFolder(self._runs(request).path(request.path_params["run"]))
        duel, votes = await asyncio.to_thread(folder.read, request.path_params["duel"])
        return folder, duel, votes

    async def _note(self, request: Request, *, undo: bool = False, end: bool = False) -> Response:
        async with self._writing:
            folder, _duel, votes = await self._open(request)
            if not any(vote.end for vote in votes):
                vote = Vote(time=_now(), voter=visitor_of(request).client.name, undo=undo, end=end)
                await asyncio.to_thread(folder.add, request.path_params["duel"], vote)
        return self._again(request)

    def _again(self, request: Request) -> Response:
        return self._parts.pages.redirect(request, f"/duel/{_place(request)}")

    @staticmethod
    def _begun(runs: Runs, known: Sequence[Run], voter: str) -> list[Begun]:
        begun: list[Begun] = []
        for run in known:
            folder = DuelFolder(runs.path(run.name))
            for name in folder.names():
                if len(begun) >= _MAX_SHOWN_DUELS:
                    return begun
                try:
                    standing = stand(*folder.read(name), voter)
                except BadInput:  # its files are damaged, which its own page explains
                    begun.append(Begun(run.name, name, 0, is_over=False))
                    continue
                begun.append(Begun(run.name, name, standing.num_votes, standing.next_turn is None))
        return begun


def _place(request: Request) -> str:
    """Return the place of a duel, for links."""
    return f"{quote(request.path_params['run'])}/{request.path_params['duel']}"


def verdict(duel: Duel, standing: Standing) -> str:
    """Return the result of a duel in a sentence."""
    preference = standing.preference
    voters = f" for {standing.voters} voters" if 1 < standing.voters < _MANY_VOTERS else ""
    if preference.preferred is None:
        return f"Not decided: these votes do not tell {duel.arm} from {duel.baseline}{voters}"
    if preference.preferred is Ballot.FIRST:
        return f"{duel.baseline} is preferred to {duel.arm}{voters}"
    return f"{duel.arm} is preferred to {duel.baseline}{voters}"


def _sides(duel: Duel, turn: int) -> tuple[Side, Side]:
    shown = duel.turns[turn]
    pair = duel.pairs[shown.pair]
    left, right = (pair.arm, pair.baseline) if shown.is_swapped else (pair.baseline, pair.arm)
    both = frozenset(one.document for one in left) & frozenset(one.document for one in right)
    return Side(left, both, 1), Side(right, both, 6)


def _vote(duel: Duel, turn: int, choice: str, marked: Sequence[str], voter: str, shown_at: str) -> Vote:
    left, right = (duel.arm, duel.baseline) if duel.turns[turn].is_swapped else (duel.baseline, duel.arm)
    pair = duel.pairs[duel.turns[turn].pair]
    documents = {shown.document for shown in (*pair.baseline, *pair.arm)}
    seconds = _seconds_since(shown_at)
    return Vote.model_validate(
        {
            "time": _now(),
            "voter": voter,
            "turn": turn,
            "query": pair.query,
            "choice": choice,
            "preferred": {"left": left, "right": right}.get(choice),
            "marked": sorted(documents & set(marked)),
            "seconds": seconds,
        }
    )


def _seconds_since(shown_at: str) -> float | None:
    """Return how long a pair was shown; ``None`` if the form does not state the start."""
    try:
        seconds = datetime.now(UTC).timestamp() - float(shown_at)
    except ValueError:
        return None
    return round(max(0.0, seconds), 1) if abs(seconds) < _MOST_SECONDS else None


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _download(content: str, name: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
    return Response(content, headers=headers, media_type="text/plain; charset=utf-8")
