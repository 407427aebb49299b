"""Blind duels for the operator: begin one, get the next pair, vote, and read the result and the judgments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from gateway.api.admin import OPERATOR, person_of, read_person, require_operator
from gateway.api.comparisons import required
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import RequestBody, Texts, whole_number
from gateway.api.wire import AnswerBody, error_responses, request_body, responses
from gateway.comparisons.dueling import Duels, Open
from gateway.comparisons.duels import CHOICES, TARGET, Choice, Shown, Standing, sides, verdict
from gateway.config.wording import cut
from gateway.errors import BadInput, Forbidden, NotFound
from gateway.experiments.preference import Ballot

MAX_LISTED = 10
_ERRORS = (BadInput, Forbidden, NotFound)
_Voter = Annotated[str, Query(description="Name of the voter. Each voter sees all pairs.")]


class DuelBody(RequestBody):
    """``POST /admin/duels``."""

    comparison: str = Field(title="a string", description="A comparison in GATEWAY_RUNS_DIR that has results.")
    baseline: str = Field(title="a string", description="One of its arms.")
    arm: str = Field(title="a string", description="Another one.")


class VoteBody(RequestBody):
    """``POST …/votes``."""

    turn: Annotated[int, Field(ge=0), BeforeValidator(whole_number)] = Field(
        title="a whole number from 0", description="The `turn` of the shown pair."
    )
    choice: str = Field(
        title=" or ".join(f'"{choice}"' for choice in CHOICES),
        description="The better list, or `tie`, `bad` (both lists are bad) or `skip`.",
        json_schema_extra={"enum": list(CHOICES)},
    )
    marked: Texts = Field([], title="a list of strings", description="Shown documents that answer the query.")
    voter: str = Field(OPERATOR, title="a string", description="Name of the voter. Each voter sees all pairs.")


class DuelText(BaseModel):
    """A document in a list."""

    document: str
    text: str = Field(description="The first 400 characters.")


class DuelPair(BaseModel):
    """Two lists with hidden arms."""

    turn: int = Field(description="Number of the pair, to send with the vote.")
    query: str
    left: Sequence[DuelText]
    right: Sequence[DuelText]


class DuelStanding(BaseModel):
    """The votes so far, without the names of the arms."""

    votes: int = Field(description="Number of votes, without skips and repeated pairs.")
    target: int = Field(description="Number of votes that is enough to find a preference of 70 %.")
    decided: int = Field(description="Votes for one list or the other; only these are evidence.")
    ties: int
    both_bad: int
    skipped: int
    share: float = Field(description="Share of the decided votes that the leading arm has.")
    low: float = Field(description="`low` and `high` are the ends of an interval that is valid at any look.")
    high: float
    shows_preference: bool


class DuelResult(BaseModel):
    """The result of the votes, once the duel has ended or the voter has seen all pairs."""

    verdict: str
    preferred: str | None = Field(description="The preferred arm; `null` if the votes do not decide.")
    baseline: str
    arm: str
    for_baseline: int
    for_arm: int
    share: float = Field(description="The baseline's share of the decided votes.")
    low: float = Field(description="`low` and `high` are the ends of an interval that is valid at any look.")
    high: float
    evidence: float = Field(description="The value of the e-process.")
    threshold: float = Field(description="Minimum evidence that shows a preference.")
    queries: int = Field(description="Number of queries of the comparison.")
    different: int = Field(description="Number of queries for which the arms' first five documents differ.")
    repeated: int = Field(description="Number of pairs that were shown again with the sides swapped.")
    consistent: int = Field(description="Number of repeated pairs that got the same vote.")
    left_share: float = Field(description="The share of the decided votes that went to the left list.")
    prefers_side: bool = Field(description="Whether the votes show a preference for one side.")
    voters: int
    voters_for_baseline: int = Field(description="Number of voters who preferred it more often than the other arm.")
    voters_for_arm: int
    general: bool = Field(
        description="Whether a preference shows beyond these voters: 15 or more voted, and it shows with one vote for each."
    )
    judgments: int = Field(description="Number of rows of the judgments, see `/qrels`.")


class DuelCard(AnswerBody):
    """A duel, as one voter sees it: either a pair or the result."""

    object: Literal["duel"] = "duel"
    comparison: str
    name: str
    created: str
    ended: bool
    standing: DuelStanding
    pair: DuelPair | None = Field(description="The next pair of the voter; `null` at the end.")
    result: DuelResult | None = Field(description="`null` before the end, because votes are blind.")
    counted: bool | None = Field(
        default=None,
        description="After a vote: `false` if the voter had already voted on this pair, or another pair is next.",
    )


class DuelEntry(BaseModel):
    """A duel in the list."""

    comparison: str
    name: str
    created: str | None
    votes: int | None = Field(description="`null` if its files cannot be read.")
    ended: bool = Field(description="Whether the reader has no pair left to vote on.")


class DuelList(AnswerBody):
    """The last duels, latest first."""

    object: Literal["list"] = "list"
    data: list[DuelEntry]


def duel_card(known: Open, *, counted: bool | None = None) -> DuelCard:
    """Return a duel as it looks to the voter who opened it."""
    standing = known.standing
    turn = standing.next_turn
    return DuelCard(
        comparison=known.run,
        name=known.name,
        created=known.duel.created,
        ended=standing.is_ended,
        standing=_standing(standing),
        pair=None if turn is None else _pair(known, turn),
        result=_result(known, standing) if turn is None else None,
        counted=counted,
    )


def duel_entry(found: Open | tuple[str, str]) -> DuelEntry:
    """Return the entry of a duel in the list."""
    if not isinstance(found, Open):
        return DuelEntry(comparison=found[0], name=found[1], created=None, votes=None, ended=False)
    standing = found.standing
    return DuelEntry(
        comparison=found.run,
        name=found.name,
        created=found.duel.created,
        votes=standing.num_votes,
        ended=standing.next_turn is None,
    )


def read_choice(text: str) -> Choice:
    """Return a vote's choice.

    Raises:
        BadInput: there is no such choice.
    """
    choice = next((known for known in CHOICES if known == text), None)
    if choice is None:
        raise BadInput(f"a vote is one of: {', '.join(CHOICES)}; got {cut(text)!r}", param="choice")
    return choice


def _pair(known: Open, turn: int) -> DuelPair:
    left, right = (list(map(_text, side)) for side in sides(known.duel, turn))
    return DuelPair(turn=turn, query=known.duel.pairs[known.duel.turns[turn].pair].text, left=left, right=right)


def _text(shown: Shown) -> DuelText:
    return DuelText(document=shown.document, text=shown.text)


def _standing(standing: Standing) -> DuelStanding:
    preference = standing.preference
    is_first = preference.share >= 0.5  # the leader's figures, so that they do not reveal which arm leads
    return DuelStanding(
        votes=standing.num_votes,
        target=TARGET,
        decided=preference.first + preference.second,
        ties=standing.num_ties,
        both_bad=standing.num_bad,
        skipped=standing.num_skipped,
        share=preference.share if is_first else 1 - preference.share,
        low=preference.low if is_first else 1 - preference.high,
        high=preference.high if is_first else 1 - preference.low,
        shows_preference=preference.preferred is not None,
    )


def _result(known: Open, standing: Standing) -> DuelResult:
    duel, preference = known.duel, standing.preference
    names = {Ballot.FIRST: duel.baseline, Ballot.SECOND: duel.arm}
    return DuelResult(
        verdict=verdict(duel, standing),
        preferred=None if preference.preferred is None else names[preference.preferred],
        baseline=duel.baseline,
        arm=duel.arm,
        for_baseline=preference.first,
        for_arm=preference.second,
        share=preference.share,
        low=preference.low,
        high=preference.high,
        evidence=preference.evidence,
        threshold=preference.threshold,
        queries=duel.num_queries,
        different=duel.num_different,
        repeated=standing.repeated,
        consistent=standing.consistent,
        left_share=standing.left.share,
        prefers_side=standing.left.preferred is not None,
        voters=standing.voters,
        voters_for_baseline=standing.by_voter.first,
        voters_for_arm=standing.by_voter.second,
        general=standing.is_general,
        judgments=known.qrels.count("\n") - 1,
    )


class DuelRoutes:
    """The handlers.

    Args:
        duels: ``None`` unless ``runs_dir`` names a folder for comparisons.
    """

    def __init__(self, endpoint: Endpoint, duels: Duels | None) -> None:
        self._endpoint = endpoint
        self._duels = duels

    async def list_duels(self, request: Request) -> DuelList:
        """List the last ten duels."""
        found = await self._require(request).latest(MAX_LISTED, OPERATOR)
        return DuelList(data=[duel_entry(known) for known in found])

    async def begin_duel(self, request: Request) -> DuelCard:
        """Begin a duel between two arms of a comparison."""
        duels = self._require(request)
        body = await self._endpoint.read(request, DuelBody.parse)
        name = await duels.begin(body.comparison, body.baseline, body.arm)
        return duel_card(await duels.open(body.comparison, name, OPERATOR))

    async def retrieve_duel(self, request: Request, comparison: str, duel: str, voter: _Voter = OPERATOR) -> DuelCard:
        """Return the next pair of a voter, or the result."""
        duels = self._require(request)
        return duel_card(await duels.open(comparison, duel, person_of(request, "voter")))

    async def vote(self, request: Request, comparison: str, duel: str) -> DuelCard:
        """Vote on the shown pair, and get the next one. Repeating a request changes nothing."""
        duels = self._require(request)
        body = await self._endpoint.read(request, VoteBody.parse)
        voter, choice = read_person(body.voter, "voter"), read_choice(body.choice)
        counted = await duels.vote((comparison, duel), voter, body.turn, choice, body.marked)
        return duel_card(await duels.open(comparison, duel, voter), counted=counted)

    async def undo_vote(self, request: Request, comparison: str, duel: str, voter: _Voter = OPERATOR) -> DuelCard:
        """Take back the last vote of a voter."""
        duels = self._require(request)
        voter = person_of(request, "voter")
        await duels.undo(comparison, duel, voter)
        return duel_card(await duels.open(comparison, duel, voter))

    async def end_duel(self, request: Request, comparison: str, duel: str, voter: _Voter = OPERATOR) -> DuelCard:
        """End a duel for all voters, and get the result."""
        duels = self._require(request)
        voter = person_of(request, "voter")
        await duels.end(comparison, duel, voter)
        return duel_card(await duels.open(comparison, duel, voter))

    async def qrels(self, request: Request, comparison: str, duel: str) -> Response:
        """Return the judgments that follow from the marks, as BEIR's `qrels`."""
        known = await self._require(request).open(comparison, duel, OPERATOR)
        return Response(known.qrels, media_type="text/tab-separated-values; charset=utf-8")

    def _require(self, request: Request) -> Duels:
        require_operator(request, self._endpoint.settings.admin_key)
        return required(self._duels)


def duels_router(endpoint: Endpoint, duels: Duels | None) -> APIRouter:
    """Return the routes of the operator."""
    router = APIRouter(tags=["Admin"])
    handlers = DuelRoutes(endpoint, duels)
    path = "/admin/duels"
    router.add_api_route(path, handlers.list_duels, responses=responses(DuelList, Forbidden, NotFound))
    place = f"{path}/{{comparison}}/{{duel}}"
    router.add_api_route(place, handlers.retrieve_duel, responses=responses(DuelCard, *_ERRORS))
    for where, handler, body in (
        (path, handlers.begin_duel, DuelBody),
        (f"{place}/votes", handlers.vote, VoteBody),
        (f"{place}/undo", handlers.undo_vote, None),
        (f"{place}/end", handlers.end_duel, None),
    ):
        router.add_api_route(
            where,
            handler,
            methods=["POST"],
            responses=responses(DuelCard, *_ERRORS),
            openapi_extra=None if body is None else request_body(body),
        )
    router.add_api_route(
        f"{place}/qrels",
        handlers.qrels,
        response_class=Response,
        responses={200: {"content": {"text/tab-separated-values": {}}}, **error_responses(*_ERRORS)},
    )
    return router
