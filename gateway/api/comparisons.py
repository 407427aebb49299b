"""Comparisons on the gateway's machine, for the operator: start one, follow it, stop it, and read the results."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gateway.access.keyring import Keyring
from gateway.api.admin import require_operator
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import Flag, Number, PositiveInteger, RequestBody, Texts
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.comparisons.dueling import Duels
from gateway.comparisons.jobs import Job, Jobs, Wanted
from gateway.comparisons.runs import Results, Run, Runs
from gateway.errors import BadInput, Forbidden, NotFound


class ComparisonBody(RequestBody):
    """``POST /admin/comparisons``."""

    name: str = Field(title="a string", description="Of the comparison, and of the folder with its results.")
    arms: Texts = Field(title="a list of strings", description="As for `gateway compare`, the baseline first.")
    data: str = Field(title="a string", description="A folder in GATEWAY_RUNS_DIR/data.")
    max_documents: PositiveInteger | None = Field(None, title="a whole number from 1", description="A sample.")
    margin: Number | None = Field(None, ge=0, le=1, title="a number from 0 to 1", description="By default 0.01.")
    cost: Flag = Field(True, title="true or false", description="Whether to measure latency and throughput.")


class ComparisonCard(BaseModel):
    """A comparison."""

    name: str
    state: Literal["running", "done", "failed", "stopped"]
    created: str | None = Field(description="When it was started here, or ended.")
    arms: list[str]
    step: str | None = Field(description="What a running one is doing; counted by `done` and `total`.")
    done: int | None
    total: int | None = Field(description="0 while it is not known.")
    problem: str | None = Field(description="Why it failed, or why its results cannot be read.")
    bottom_line: str | None
    results: Results | None = Field(default=None, description="Those of `results.json`; only of a single comparison.")


class ComparisonList(AnswerBody):
    """Those that were started here and have no results yet, then those with results, the latest first."""

    object: Literal["list"] = "list"
    data: list[ComparisonCard]
    data_sets: list[str] = Field(description="The values for `data`.")


class Comparisons:
    """The handlers, and the comparisons of the gateway.

    Attributes:
        runs, jobs, duels: ``None`` without a folder for them, ``runs_dir``.
    """

    def __init__(self, endpoint: Endpoint, runs: Runs | None, jobs: Jobs | None) -> None:
        self._endpoint = endpoint
        self.runs = runs
        self.jobs = jobs
        self.duels = None if runs is None else Duels(runs)

    def address(self, request: Request) -> str:
        """Return the address of the API, for a comparison that this gateway starts on its own machine."""
        settings = self._endpoint.settings
        host, port = request.scope.get("server") or (settings.host, settings.port)
        if settings.admin_port is not None and port == settings.admin_port:
            port = settings.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def list_comparisons(self, request: Request) -> ComparisonList:
        """List the comparisons, and the data sets for another one."""
        runs, jobs = self._require(request)
        known = await asyncio.to_thread(runs.latest)
        names = {run.name for run in known}
        cards = [_of_job(job) for job in jobs.all() if job.wanted.name not in names]
        cards += [_of_run(run) for run in known]
        return ComparisonList(data=cards, data_sets=await asyncio.to_thread(jobs.data_sets))

    async def start(self, request: Request) -> ComparisonCard:
        """Start a comparison. One runs at a time; look at its progress as often as you like."""
        _runs, jobs = self._require(request)
        body = await self._endpoint.read(request, ComparisonBody.parse)
        wanted = Wanted(body.name, body.arms, body.data, body.max_documents, body.margin, body.cost)
        return _of_job(await jobs.start(wanted, self.address(request)))

    async def retrieve(self, request: Request, name: str) -> ComparisonCard:
        """Return the progress of a comparison, or its results."""
        runs, jobs = self._require(request)
        job = jobs.find(name)
        if job is not None and job.state != "done":
            return _of_job(job)
        run = await asyncio.to_thread(runs.find, name)
        return _of_run(run).model_copy(update={"results": run.results})

    async def stop(self, request: Request, name: str) -> ComparisonCard:
        """Stop a comparison that is running. The vectors that it has are kept for the next one."""
        _runs, jobs = self._require(request)
        return _of_job(await jobs.stop(name))

    def _require(self, request: Request) -> tuple[Runs, Jobs]:
        require_operator(request, self._endpoint.settings.admin_key)
        if self.runs is None or self.jobs is None:
            raise NotFound("GATEWAY_RUNS_DIR is not set, so there is no place for comparisons")
        return self.runs, self.jobs


def _of_job(job: Job) -> ComparisonCard:
    is_running = job.state == "running"
    return ComparisonCard(
        name=job.wanted.name,
        state=job.state,
        created=f"{job.started:%Y-%m-%dT%H:%M:%SZ}",
        arms=list(job.wanted.arms),
        step=job.step if is_running else None,
        done=job.done if is_running else None,
        total=job.total if is_running else None,
        problem=job.problem or None,
        bottom_line=None,
    )


def _of_run(run: Run) -> ComparisonCard:
    results = run.results
    return ComparisonCard(
        name=run.name,
        state="failed" if results is None else "done",
        created=None if results is None else results.created,
        arms=[] if results is None else [arm.name for arm in results.arms],
        step=None,
        done=None,
        total=None,
        problem=run.problem or None,
        bottom_line=results.bottom_line.text if results is not None and results.bottom_line else None,
    )


def make_comparisons(endpoint: Endpoint, keyring: Keyring) -> Comparisons:
    """Return the comparisons of a gateway, which end with it."""
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
    for place, handler, method in (("", handlers.retrieve, "GET"), ("/stop", handlers.stop, "POST")):
        router.add_api_route(
            f"{path}/{{name}}{place}",
            handler,
            methods=[method],
            responses=responses(ComparisonCard, Forbidden, NotFound),
        )
    return router
