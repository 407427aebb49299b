"""Comparisons on the gateway's machine, for the operator: start one, follow it, stop it, and read the results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from gateway.access.keyring import Keyring
from gateway.api.admin import require_operator
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import Flag, Number, PositiveInteger, RequestBody, Texts
from gateway.api.wire import AnswerBody, error_responses, request_body, responses
from gateway.comparisons.dueling import Duels
from gateway.comparisons.grading import Grading
from gateway.comparisons.jobs import Captured, Job, Jobs, JudgeChoice, Wanted
from gateway.comparisons.runs import Results, Run, Runs
from gateway.config.wording import cut
from gateway.errors import BadInput, Forbidden, NotFound, RateLimited

_MAX_STREAMS = 100
_CHECK_EVERY_S = 1.0  # how often a stream checks whether the gateway is stopping
_HEARTBEAT_EVERY_S = 15.0

T = TypeVar("T")


class JudgeBody(RequestBody):
    """A chat model that grades the results."""

    url: str = Field(title="a string", description="The address of an OpenAI-style API.")
    model: str = Field(title="a string", description="The chat model, as its API names it.")
    key: str = Field(
        "", title="a string", description="The API's key; by default the gateway's variable JUDGE_API_KEY."
    )
    max_tokens: PositiveInteger | None = Field(
        None,
        title="a whole number from 1",
        description="The maximum price in tokens that you agree to; without it, `question` shows the price.",
    )


class ComparisonBody(RequestBody):
    """``POST /admin/comparisons``."""

    name: str = Field(title="a string", description="Name of the comparison, and of the folder with its results.")
    arms: Texts = Field(
        title="a list of strings", description="The arms, as for `gateway compare`, the baseline first."
    )
    data: str = Field(title="a string", description="A folder in GATEWAY_RUNS_DIR/data.")
    max_documents: PositiveInteger | None = Field(
        None, title="a whole number from 1", description="Number of documents to sample; by default all."
    )
    margin: Number | None = Field(None, ge=0, le=1, title="a number from 0 to 1", description="By default 0.01.")
    cost: Flag = Field(True, title="true or false", description="Whether to measure latency and throughput.")
    captured: str | None = Field(
        None,
        title="a string",
        description="An alias or experiment: its captured queries replace those of the data set.",
    )
    judge: JudgeBody | None = Field(None, title="an object", description="A judge, for data without judgments.")


class AgreementBody(RequestBody):
    """``POST …/answer``."""

    agree: Flag = Field(title="true or false", description="Whether the judge may be asked at this price.")


class ComparisonCard(BaseModel):
    """A comparison."""

    name: str
    state: Literal["running", "done", "failed", "stopped"]
    created: str | None = Field(description="Time when it was started here, or ended.")
    arms: list[str]
    step: str | None = Field(description="Current step of a running comparison; `done` and `total` count its progress.")
    done: int | None
    total: int | None = Field(description="Size of the step; 0 while it is unknown.")
    question: str | None = Field(description="The price of the judge, while the comparison waits for `POST …/answer`.")
    problem: str | None = Field(description="Reason why it failed, or why its results cannot be read.")
    bottom_line: str | None
    results: Results | None = Field(default=None, description="The contents of `results.json`; absent from lists.")


class ComparisonList(AnswerBody):
    """Comparisons that were started here and have no results yet, then those with results, the latest first."""

    object: Literal["list"] = "list"
    data: list[ComparisonCard]
    data_sets: list[str] = Field(description="Accepted values of `data`.")
    captured: list[str] = Field(description="Accepted values of `captured`.")


class Comparisons:
    """The handlers, and the comparisons of the gateway.

    Attributes:
        runs, jobs, duels, grading: ``None`` unless ``runs_dir`` names a folder for them.
    """

    def __init__(self, endpoint: Endpoint, runs: Runs | None, jobs: Jobs | None) -> None:
        self._endpoint = endpoint
        self.runs = runs
        self.jobs = jobs
        self.duels = None if runs is None else Duels(runs)
        self.grading = None if runs is None else Grading(runs)
        self._num_streams = 0

    def captured(self) -> dict[str, Captured]:
        """Return the captured queries by their alias or experiment."""
        registry = self._endpoint.deployment.registry
        return {
            name: Captured(name, capture.path(registry.path.parent)) for name, capture in registry.captures().items()
        }

    def find_captured(self, name: str) -> Captured:
        """Return the captured queries of an alias or experiment.

        Raises:
            BadInput: it has no `capture`.
        """
        captured = self.captured()
        if name not in captured:
            names = ", ".join(captured) or "none"
            raise BadInput(f"{cut(name)!r} has no `capture` in models.yaml; available: {names}", param="captured")
        return captured[name]

    def address(self, request: Request) -> str:
        """Return the address of the API, for a comparison that this gateway starts on its own machine."""
        settings = self._endpoint.settings
        host, port = request.scope.get("server") or (settings.host, settings.port)
        if settings.admin_port is not None and port == settings.admin_port:
            port = settings.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def list_comparisons(self, request: Request) -> ComparisonList:
        """List the comparisons, and the data sets for new ones."""
        runs, jobs = self.require(request)
        latest = await asyncio.to_thread(runs.latest)
        names = {run.name for run in latest}
        cards = [_job_card(job) for job in jobs.all() if job.wanted.name not in names]
        cards += [_run_card(run) for run in latest]
        data_sets = await asyncio.to_thread(jobs.data_sets)
        return ComparisonList(data=cards, data_sets=data_sets, captured=list(self.captured()))

    async def start(self, request: Request) -> ComparisonCard:
        """Start a comparison. Only one can run at a time."""
        _runs, jobs = self.require(request)
        body = await self._endpoint.read(request, ComparisonBody.parse)
        captured = None if body.captured is None else self.find_captured(body.captured)
        judge = None if body.judge is None else JudgeChoice(**body.judge.model_dump())
        wanted = Wanted(body.name, body.arms, body.data, body.max_documents, body.margin, body.cost, captured, judge)
        return _job_card(await jobs.start(wanted, self.address(request)))

    async def retrieve(self, request: Request, name: str) -> ComparisonCard:
        """Return the progress of a comparison, or its results."""
        runs, jobs = self.require(request)
        return await find_card(runs, jobs, name, has_results=True)

    async def events(self, request: Request, name: str) -> StreamingResponse:
        """Follow a comparison as server-sent events: `progress` at each change, then `end`; each with its card."""
        self.require(request)
        return await self.stream(name)

    async def answer(self, request: Request, name: str) -> ComparisonCard:
        """Agree to the price of the judge, or continue without the judge."""
        _runs, jobs = self.require(request)
        body = await self._endpoint.read(request, AgreementBody.parse)
        return _job_card(await jobs.answer(name, is_agreed=body.agree))

    async def stop(self, request: Request, name: str) -> ComparisonCard:
        """Stop a running comparison. Its vectors are kept for the next comparison."""
        _runs, jobs = self.require(request)
        return _job_card(await jobs.stop(name))

    async def stream(self, name: str) -> StreamingResponse:
        """Return the events of a comparison. The caller has checked the reader's permissions.

        Raises:
            NotFound: there is no such comparison.
            RateLimited: too many streams are open.
        """
        runs, jobs = required(self.runs), required(self.jobs)
        await find_card(runs, jobs, name)
        if self._num_streams >= _MAX_STREAMS:
            message = f"{_MAX_STREAMS} event streams are already open, which is the limit: poll the comparison instead"
            raise RateLimited(message, retry_after_s=5)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the second is for nginx
        events = self._events(runs, jobs, name)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, runs: Runs, jobs: Jobs, name: str) -> AsyncIterator[str]:
        self._num_streams += 1
        try:
            silent_s, seen = 0.0, -1
            while not self._endpoint.deployment.is_draining:
                job = jobs.find(name)
                is_running = job is not None and job.state == "running"
                version = 0 if job is None else job.version
                if version != seen or not is_running:
                    card = await find_card(runs, jobs, name)
                    yield f"event: {'progress' if is_running else 'end'}\ndata: {card.model_dump_json()}\n\n"
                    silent_s, seen = 0.0, version
                elif (silent_s := silent_s + _CHECK_EVERY_S) >= _HEARTBEAT_EVERY_S:
                    yield ": waiting\n\n"  # a proxy may close a silent connection
                    silent_s = 0.0
                if job is None or not is_running:
                    return
                await job.next_change(seen, _CHECK_EVERY_S)
        finally:
            self._num_streams -= 1

    def require(self, request: Request) -> tuple[Runs, Jobs]:
        """Return the results and the jobs, which every operation needs.

        Raises:
            Forbidden: the client is not the operator.
            NotFound: there is no folder for comparisons.
        """
        require_operator(request, self._endpoint.settings.admin_key)
        return required(self.runs), required(self.jobs)


def required(part: T | None) -> T:
    """Return a part of :class:`Comparisons`. The caller has checked the reader's permissions.

    Raises:
        NotFound: there is no folder for comparisons.
    """
    if part is None:
        raise NotFound("comparisons and duels are turned off: set GATEWAY_RUNS_DIR to a folder")
    return part


async def find_card(runs: Runs, jobs: Jobs, name: str, *, has_results: bool = False) -> ComparisonCard:
    """Return a comparison in its current state.

    Raises:
        NotFound: there is no such comparison.
    """
    job = jobs.find(name)
    if job is not None and (
        job.state == "running" or not (job.state == "done" or await asyncio.to_thread(runs.has, name))
    ):
        return _job_card(job)
    run = await asyncio.to_thread(runs.find, name)
    card = _run_card(run).model_copy(update={"results": run.results if has_results else None})
    # A comparison has results even if its judge failed.
    return (
        card if job is None or not job.problem else card.model_copy(update={"state": job.state, "problem": job.problem})
    )


def _job_card(job: Job) -> ComparisonCard:
    is_running = job.state == "running"
    return ComparisonCard(
        name=job.wanted.name,
        state=job.state,
        created=f"{job.started:%Y-%m-%dT%H:%M:%SZ}",
        arms=list(job.wanted.arms),
        step=job.step if is_running else None,
        done=job.done if is_running else None,
        total=job.total if is_running else None,
        question=job.question or None,
        problem=job.problem or None,
        bottom_line=None,
    )


def _run_card(run: Run) -> ComparisonCard:
    results = run.results
    return ComparisonCard(
        name=run.name,
        state="failed" if results is None else "done",
        created=None if results is None else results.created,
        arms=[] if results is None else [arm.name for arm in results.arms],
        step=None,
        done=None,
        total=None,
        question=None,
        problem=run.problem or None,
        bottom_line=None if results is None else results.verdict,
    )


def make_comparisons(endpoint: Endpoint, keyring: Keyring) -> Comparisons:
    """Return the comparisons of a gateway; running ones are stopped when the gateway stops."""
    folder = endpoint.settings.runs_dir
    if folder is None:
        return Comparisons(endpoint, None, None)
    runs = Runs(folder)
    jobs = Jobs(runs, lambda: keyring.lend("comparison"))
    endpoint.deployment.resources.push_async_callback(jobs.close)
    return Comparisons(endpoint, runs, jobs)


def comparisons_router(handlers: Comparisons) -> APIRouter:
    """Return the routes of the operator."""
    router = APIRouter(tags=["Admin"])
    path = "/admin/comparisons"
    router.add_api_route(path, handlers.list_comparisons, responses=responses(ComparisonList, Forbidden, NotFound))
    router.add_api_route(
        path,
        handlers.start,
        methods=["POST"],
        responses=responses(ComparisonCard, BadInput, Forbidden, NotFound),
        openapi_extra=request_body(ComparisonBody),
    )
    for place, handler, body in (
        ("", handlers.retrieve, None),
        ("/stop", handlers.stop, None),
        ("/answer", handlers.answer, AgreementBody),
    ):
        router.add_api_route(
            f"{path}/{{name}}{place}",
            handler,
            methods=["POST" if place else "GET"],
            responses=responses(ComparisonCard, *([BadInput] if body else []), Forbidden, NotFound),
            openapi_extra=None if body is None else request_body(body),
        )
    router.add_api_route(
        f"{path}/{{name}}/events",
        handlers.events,
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **error_responses(Forbidden, NotFound, RateLimited)},
    )
    return router
