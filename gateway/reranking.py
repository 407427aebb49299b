"""Rerank: what is asked for, what comes back, and which model may do it. Knows no HTTP and no YAML."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gateway import vectors as vector_math
from gateway.errors import BadInput, ModelNotAllowed, ModelNotReady, UnsupportedOutput
from gateway.experiments.split import Assignment, UnitSource, no_unit_source
from gateway.fleet import Fleet
from gateway.routing.names import GATEWAY, Client
from gateway.routing.router import Choice, Router, Target
from gateway.types import TOKEN_BYTES, EmbedJob, ModelKind, Timings, Truncate, Vectors


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A request to score texts against a query, in the gateway's own terms.

    Attributes:
        model: public name, or ``None`` for the only model that reranks.
        timeout_s: seconds after which the caller no longer waits.
        caller: whom the work is for.
        truncate: what to do with a query and a text that are too long together; the end of the text is cut, if any.
        max_text_tokens: where each text is cut in any case; ``None`` for no such limit.
        client: the sender, who may use some names.
        unit_source: looks up the values that an experiment can make a unit from.
        reserve: told how many bytes the work needs, before it does; refuses what there is no room for.
    """

    task: ClassVar[None] = None
    encoding: ClassVar[None] = None

    query: str
    texts: Sequence[str]
    model: str | None
    timeout_s: float
    caller: str
    client: Client
    truncate: Truncate = Truncate.END
    max_text_tokens: int | None = None
    unit_source: UnitSource = no_unit_source
    reserve: Callable[[int], None] = lambda _num_bytes: None


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """Scores, and what they are.

    Attributes:
        scores: ``(n,)`` float32, checked, before any sigmoid, in input order: a larger one answers the query better.
        name: what to say in ``model``.
        model: id of the model that answered.
        num_tokens: tokens of all pairs together, after truncation: the query counts once with each text.
        truncated: indices of the texts that were cut.
        assignment: the arm that the request was in, if it asked for an experiment.
    """

    task: ClassVar[None] = None
    space: ClassVar[None] = None

    scores: Vectors
    name: str
    model: str
    num_tokens: int
    truncated: Sequence[int]
    timings: Timings
    assignment: Assignment | None = None

    @property
    def num_texts(self) -> int:
        return len(self.scores)

    @property
    def num_bytes(self) -> int:
        """The memory that the arrays take."""
        return self.scores.nbytes


def choose_reranker(router: Router, fleet: Fleet, request: RerankRequest) -> Choice:
    """Find the model that a request is for; without a name, the only one that reranks.

    Raises:
        ModelNotFound: nothing has that name.
        ModelNotAllowed: it is not for the caller; without a name, none of those that rerank is.
        ModelNotReady: no name, and the models that rerank are not known yet.
        BadInput: no name, and none or several that rerank.
    """
    if request.model is not None:
        return router.choose(request.model, request.client, request.unit_source)
    names = _names_of(router, ModelKind.RERANK, request.client)
    if len(names) == 1:
        return router.choose(names[0], request.client, request.unit_source)
    if not fleet.started.is_set():
        raise ModelNotReady("the models are still loading; try again, or name one in `model`", retry_after_s=5)
    if names:
        raise BadInput(f"`model` is required, as several models rerank: {', '.join(names)}", param="model")
    if _names_of(router, ModelKind.RERANK, GATEWAY):
        raise ModelNotAllowed("this API key is for no model that reranks", param="model")
    raise BadInput("no model here reranks: the registry has none that scores pairs of texts", param="model")


def check_kind(router: Router, choice: Choice, kind: ModelKind, client: Client) -> None:
    """Refuse a model that computes something else than what is asked for.

    Raises:
        UnsupportedOutput: names the models that would fit, of those that the caller may use.
    """
    info = choice.model.info
    if info is None or info.kind is kind:  # of a model that has not been read, the router knows what to say
        return
    others = ", ".join(_names_of(router, kind, client)) or "none"
    if kind is ModelKind.RERANK:
        message = f"model {choice.asked!r} embeds texts and does not rerank; models that rerank: {others}"
    else:
        message = f"model {choice.asked!r} reranks texts and does not embed; models that embed: {others}"
    raise UnsupportedOutput(message, param="model")


async def score_on(target: Target, choice: Choice, request: RerankRequest) -> RerankAnswer:
    """Have a target score the texts of a request, and check the scores.

    Raises:
        RequestError: the target refused or failed; one of the classes in ``gateway.errors``.
    """
    result = await target.model.embed(
        EmbedJob(
            texts=request.texts,
            task=None,
            truncate=request.truncate,
            deadline=time.monotonic() + request.timeout_s,
            caller=request.caller,
            query=request.query,
            max_text_tokens=request.max_text_tokens,
            on_tokens=lambda num_tokens: request.reserve(num_tokens * TOKEN_BYTES),
        )
    )
    scores = vector_math.finish(result.vectors, (len(request.texts), 1), 1, normalize=False)
    return RerankAnswer(
        scores=scores[:, 0],
        name=target.name,
        model=target.info.id,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        assignment=choice.assignment,
    )


def _names_of(router: Router, kind: ModelKind, client: Client) -> list[str]:
    """Return the names of the models of a kind that a caller may use, as far as they have been read."""
    return [
        choice.asked
        for choice in router.listed(client)
        if choice.experiment is None and choice.model.info is not None and choice.model.info.kind is kind
    ]
