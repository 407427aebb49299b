"""Embed, score or classify texts with a model, chosen by its public name. Independent of HTTP and YAML."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from itertools import zip_longest
from typing import TypeAlias, TypeVar

from gateway import computing
from gateway.config.capture import QUERY_TASK
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import BadInput, InferenceFailed, ModelNotFound, ModelNotReady, OutOfMemory
from gateway.experiments.stats import ExperimentStats
from gateway.observation import Observer, observe_tokenizer
from gateway.requests import (
    Answer,
    ClassifyAnswer,
    ClassifyRequest,
    EmbedAnswer,
    EmbedRequest,
    Request,
    RerankAnswer,
    RerankRequest,
)
from gateway.routing.names import GATEWAY, Client
from gateway.routing.router import Choice, Router, Target
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelState, Vocabulary

R = TypeVar("R", bound=Request)
A = TypeVar("A", bound=Answer)

Compute: TypeAlias = Callable[[Target, R, EmbedJob], Awaitable[A]]
"""Has a target compute the answer to a request, with a job that has the request's texts."""


class EmbeddingService:
    """Turns texts into vectors or scores: choose a model, check, compute, finish."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats) -> None:
        self._deployment = deployment
        self._observer = Observer(stats, deployment.traffic)

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        """Embed the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        shadows = self._deployment.shadows  # now, because a reload may replace them while this request is answered
        choice, answer = await self._answer(request, computing.embed)
        shadows.offer(choice, request.texts, request.task, request.truncate, request.timeout_s, request.priority)
        self._capture(choice, request, request.texts, request.task)
        return answer

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Score the texts of a request against its query.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        choice, answer = await self._answer(request, computing.rerank)
        self._capture(choice, request, [request.query], QUERY_TASK)
        return answer

    async def classify(self, request: ClassifyRequest) -> ClassifyAnswer:
        """Score the labels of the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        _choice, answer = await self._answer(request, computing.classify)
        return answer

    async def _answer(self, request: R, compute: Compute[R, A]) -> tuple[Choice, A]:
        """Choose the model, have it compute the answer, and record the result."""
        router = self._deployment.router
        choice = router.choose_for(request.kind, request.model, request.client, request.unit_source)
        return choice, await self._observer.observe(choice, request, _try_targets(router, choice, request, compute))

    def _capture(self, choice: Choice, request: Request, texts: Sequence[str], task: str | None) -> None:
        """Keep a sample of the texts, if the registry captures this name."""
        if request.may_be_captured and (captures := self._deployment.captures) is not None:
            captures.offer(choice, texts, task, request.unit_source)

    def target(self, model: str | None, task: str | None, client: Client) -> Target:
        """Resolve a name to a ready target, for anything other than embedding.

        Args:
            model: public name, or ``None`` for the registry's default.
            task: the task, by any of its names; ``None`` for the model's default.
            client: the sender, who may use some names.

        Raises:
            BadInput: the name is that of an experiment between spaces, so it does not mean a single model.
            RequestError: no model has the name, the client may not use it, or it is not ready.
        """
        router = self._deployment.router
        choice = router.choose(model, client)
        if choice.experiment is not None and choice.experiment.kind == "cross_space":
            arms = ", ".join(f"{arm.label} (model {arm.model!r})" for arm in choice.experiment.arms)
            raise BadInput(
                f"{choice.asked!r} is an experiment between spaces, and its models differ in tokens and limits. Name a "
                f"model; the arms are: {arms}",
                param="model",
            )
        return router.targets(choice, task)[0]

    def check_ready(self, model: str) -> None:
        """Check that requests under a name can be answered; for an experiment, in each of its arms.

        Raises:
            RequestError: no model has the name, or a model that it leads to is not ready.
        """
        router = self._deployment.router
        try:
            choice = router.choose(model, GATEWAY)
        except ModelNotFound:  # whose message lists names, and a probe carries no key
            raise ModelNotFound(f"no model is called {cut(router.names.shown(model))!r}", param="model") from None
        if choice.experiment is None:
            router.targets(choice, None)
            return
        for arm, arm_model, task in router.arms(choice):
            if arm.weight or arm is choice.experiment.control:
                router.targets(Choice(arm_model, task, asked=arm.model, name=arm.model), None)

    @asynccontextmanager
    async def vocabulary(self, target: Target, operation: str) -> AsyncIterator[Vocabulary]:
        """Yield the vocabulary of a target's model, keep the model running until the context ends, and count the use.

        Args:
            operation: ``tokenize`` or ``decode``.

        Raises:
            ModelNotReady: the model is not loaded.
            UnsupportedOutput: the model runs elsewhere, and its vocabulary is not known here.
        """
        with observe_tokenizer(target.model.id, operation):
            async with target.model.vocabulary() as vocabulary:
                yield vocabulary


async def _try_targets(router: Router, choice: Choice, request: R, compute: Compute[R, A]) -> A:
    """Answer a request with the first target, or with the next one if it fails. All targets are in one space."""
    targets = router.targets(choice, request.task)
    deadline = time.monotonic() + request.timeout_s
    with ExitStack() as in_use:
        # Hold all targets, so that a reload does not stop one before its turn comes.
        for target in targets:
            in_use.enter_context(target.model.in_use())
        for target, alternative in zip_longest(targets, targets[1:]):
            job = EmbedJob(
                texts=request.texts,
                task=target.task,
                truncate=request.truncate,
                deadline=deadline,
                caller=request.caller,
                priority=request.priority,
                may_wait=alternative is None or alternative.model.state is not ModelState.READY,
            )
            try:
                return await compute(target, request, job)
            except (ModelNotReady, InferenceFailed, OutOfMemory) as error:
                if alternative is None:
                    raise
                metrics.FALLBACKS.labels(target.model.id, alternative.model.id, error.code).inc()
    raise AssertionError("there is always a target")
