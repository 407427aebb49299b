"""Run one arm of the playground on its texts, with the API's requests in process, under the reader's rights and quotas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastapi import Request

from gateway.api.endpoint import Endpoint
from gateway.api.tokenize import BYTES_PER_TOKEN, instruction_of, place_of_cut
from gateway.console.arms import ArmText, PlannedArm, plan_arm, read_arm
from gateway.console.likeness import between, bytes_per_text, order
from gateway.console.web import visitor_of
from gateway.errors import RequestError
from gateway.http.context import RequestContext
from gateway.requests import EmbedAnswer
from gateway.types import Output, Timings, Token

# Heat maps of more texts, and lists of more tokens, would not be readable.
MAX_COMPARED = 20
_MAX_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Cut:
    """A text that is longer than the model's limit.

    Attributes:
        number: the number of the text, from 1.
        read, unread: the text before and after the cut.
    """

    number: int
    num_tokens: int
    limit: int
    read: str
    unread: str


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens of the first text.

    Attributes:
        tokens: the first tokens, instruction included, at most ``_MAX_TOKENS``.
        num_tokens: number of all tokens.
        num_instruction: number of the instruction's tokens.
    """

    tokens: Sequence[Token]
    num_tokens: int
    num_instruction: int
    cuts: Sequence[Cut]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """An arm that answered.

    Attributes:
        scores: score of each candidate for the query; empty without a query.
        order: indices of the candidates, best first.
        likeness: similarity of each pair of the first texts, query first; empty if it cannot be drawn.
        query_times, texts_times: the stages of the two requests; ``None`` without a query.
        reading: the tokens of the first text; ``None`` if the model's vocabulary is not known here.
    """

    plan: PlannedArm
    space: str
    task: str | None
    scores: Sequence[float]
    order: Sequence[int]
    likeness: Sequence[Sequence[float]]
    query_times: Timings | None
    texts_times: Timings
    query_tokens: int
    texts_tokens: int
    truncated: Sequence[int]
    bytes_per_text: int
    reading: Reading | None

    @property
    def arm(self) -> ArmText:
        return self.plan.arm


@dataclass(frozen=True, slots=True)
class ArmFailure:
    """An arm that did not answer."""

    text: str
    error: RequestError


async def run_arm(
    endpoint: Endpoint, request: Request, text: str, query: str, candidates: Sequence[str]
) -> ArmResult | ArmFailure:
    """Have an arm embed the texts; an error becomes the arm's result, so that it does not affect other arms.

    Args:
        query: the query; empty to compare the candidates only with each other.
    """
    try:
        arm = read_arm(text)
        plan = plan_arm(arm, endpoint.deployment.router, visitor_of(request).client, has_query=bool(query))
        return await _run(endpoint, request, plan, query, candidates)
    except RequestError as error:
        return ArmFailure(text, error)


async def _run(
    endpoint: Endpoint, request: Request, plan: PlannedArm, query: str, candidates: Sequence[str]
) -> ArmResult:
    texts = await _embed(endpoint, request, plan, plan.passage_name, plan.passage_task, candidates)
    query_answer = None
    if query:
        query_answer = await _embed(endpoint, request, plan, plan.query_name, plan.query_task, [query])
    output = plan.arm.output
    scores = [] if query_answer is None else [float(score) for score in between(query_answer, texts, output)[0]]
    reading = await _read(endpoint, request, plan, query, candidates)
    return ArmResult(
        plan=plan,
        space=(query_answer or texts).space or plan.space,
        task=(query_answer or texts).task,
        scores=scores,
        order=order(scores) if scores else range(len(candidates)),
        likeness=[] if output is Output.MULTIVECTOR else _likeness(query_answer, texts, output),
        query_times=None if query_answer is None else query_answer.timings,
        texts_times=texts.timings,
        query_tokens=0 if query_answer is None else query_answer.num_tokens,
        texts_tokens=texts.num_tokens,
        truncated=texts.truncated,
        bytes_per_text=bytes_per_text(texts, output),
        reading=reading,
    )


async def _embed(
    endpoint: Endpoint, request: Request, plan: PlannedArm, name: str, task: str | None, texts: Sequence[str]
) -> EmbedAnswer:
    embed_request = endpoint.embed_request(request, texts, name)
    arm = plan.arm
    return await endpoint.embed(
        request,
        replace(
            embed_request,
            task=task,
            dimensions=arm.dimensions,
            precision=arm.precision,
            outputs=(arm.output,),
            may_be_captured=False,  # the reader's texts, not those of users
        ),
    )


def _likeness(query_answer: EmbedAnswer | None, texts: EmbedAnswer, output: Output) -> list[list[float]]:
    few = replace(texts, vectors=texts.vectors[:MAX_COMPARED], sparse=texts.sparse and texts.sparse[:MAX_COMPARED])
    among = between(few, few, output)
    rows = [[float(value) for value in row] for row in among]
    if query_answer is None:
        return rows
    of_query = [float(value) for value in between(query_answer, few, output)[0]]
    return [[1.0, *of_query], *([score, *row] for score, row in zip(of_query, rows, strict=True))]


async def _read(
    endpoint: Endpoint, request: Request, plan: PlannedArm, query: str, candidates: Sequence[str]
) -> Reading | None:
    """Return the tokens of the first text, and the cuts of the candidates."""
    info = plan.target.info

    shown = instruction_of(plan.target, plan.query_task) if query else ""
    before = instruction_of(plan.target, plan.passage_task or plan.target.task)
    texts = [shown + (query or candidates[0]), shown, *(before + text for text in candidates)]
    num_characters = sum(map(len, texts))
    try:
        RequestContext.of(request).memory.resize(BYTES_PER_TOKEN * num_characters)
        async with endpoint.service.vocabulary(plan.target, "tokenize") as vocabulary:
            split = partial(vocabulary.split, texts, add_special_tokens=True)
            rows = await endpoint.in_turn(request, num_characters, split, endpoint.tokenizing)
    except RequestError:  # the model runs elsewhere, and its vocabulary is not known here
        return None
    finally:
        RequestContext.of(request).memory.shrink(0)
    first, alone, *others = rows
    cuts = [
        cut
        for number, (text, tokens) in enumerate(zip(candidates, others, strict=True), start=1)
        if (cut := _cut(number, text, tokens, info.max_tokens, len(before)))
    ]
    num_instruction = sum(not token.is_special for token in alone) if shown else 0
    return Reading(first[:_MAX_TOKENS], len(first), num_instruction, cuts)


def _cut(number: int, text: str, tokens: Sequence[Token], limit: int, num_before: int) -> Cut | None:
    """Return the cut of a text that is too long; ``None`` for other texts."""
    place = place_of_cut(tokens, limit, num_before)
    if place is None:
        return None
    return Cut(number, len(tokens), limit, text[max(0, place - 60) : place], text[place : place + 60])
