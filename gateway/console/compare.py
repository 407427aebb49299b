"""The comparison pages: the verdict first, then the reasons, then example queries; and the form for a new comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import quote

from fastapi import Request, Response

from gateway.api.comparisons import Comparisons, required
from gateway.api.data_sets import read_data_form
from gateway.comparisons.jobs import Job, Jobs, JudgeChoice, Wanted
from gateway.comparisons.runs import (
    PRIMARY,
    Interval,
    JudgeContrast,
    JudgeResults,
    Query,
    Ratio,
    Results,
    Run,
    Runs,
)
from gateway.comparisons.scale import MIN_KAPPA
from gateway.config.wording import count
from gateway.console.charts import Scale
from gateway.console.parts import Parts
from gateway.console.web import Form, chosen, read_form, visitor_of
from gateway.errors import BadInput, RequestError
from gateway.http.context import RequestContext

_NUM_QUERIES = 10
_NUM_HITS = 5
_FORM_ARMS = 4
_ORDERS = ("lost", "gained")


@dataclass(frozen=True, slots=True)
class Whisker:
    """An interval to draw, in percent of the width; ``start`` is empty without an interval."""

    start: str
    width: str
    point: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Intervals on one axis.

    Attributes:
        zero: the position of "no difference".
    """

    zero: str
    whiskers: Sequence[Whisker | None]


class Compare:
    """The handlers of the pages."""

    def __init__(self, parts: Parts, comparisons: Comparisons) -> None:
        self._parts = parts
        self._comparisons = comparisons
        self.duels = comparisons.duels

    async def first(self, request: Request) -> Response:
        """Show the latest comparison, or explain how to make one."""
        runs = self.runs(request)
        known = [] if runs is None else await asyncio.to_thread(runs.latest)
        if not known:
            jobs = [] if runs is None else self._unfinished(known)
            return self._parts.pages.render(request, "compare_none.html.j2", runs=runs, jobs=jobs)
        return await self._page(request, known, known[0])

    async def show(self, request: Request) -> Response:
        """Show one comparison."""
        runs = required(self.runs(request))
        job = self._jobs().find(request.path_params["run"])
        # A comparison has results even if its judge failed.
        if job is not None and (job.state == "running" or not await asyncio.to_thread(runs.has, job.wanted.name)):
            known = await asyncio.to_thread(runs.latest)
            return self._parts.pages.render(
                request, "compare_running.html.j2", job=job, known=known, jobs=self._unfinished(known)
            )
        run = await asyncio.to_thread(runs.find, request.path_params["run"])
        return await self._page(request, await asyncio.to_thread(runs.latest), run, job.problem if job else "")

    async def ask(self, request: Request) -> Response:
        """Show the form for a comparison."""
        jobs = self._jobs()
        query = request.query_params
        arms = [arm for arm in query.getlist("arm") if arm] or self._parts.usual_arms(request)
        wanted = Wanted(_usual_name(), arms[:_FORM_ARMS], query.get("data", ""))
        return await self._form(request, jobs, wanted, done=self._parts.pages.gate.take_message(request))

    async def start(self, request: Request) -> Response:
        """Start a comparison, and show its progress."""
        jobs = self._jobs()
        form = await read_form(request)
        try:
            wanted = _wanted(form)
            if name := form.first("captured"):
                wanted = replace(wanted, queries=self._comparisons.find_captured(name))
            await jobs.start(wanted, self._comparisons.address(request))
        except BadInput as error:
            RequestContext.of(request).refuse(error)
            return await self._form(request, jobs, _form_texts(form), error, captured=form.first("captured"))
        return self._parts.pages.redirect(request, f"/compare/{quote(wanted.name)}")

    async def upload(self, request: Request) -> Response:
        """Store a data set from uploaded files, and show the form for a comparison on it."""
        jobs = self._jobs()
        try:
            stored = await (await read_data_form(request)).store(jobs.data_folder)
        except RequestError as error:
            RequestContext.of(request).refuse(error)
            arms = self._parts.usual_arms(request)
            return await self._form(request, jobs, Wanted(_usual_name(), arms, ""), error)
        texts = f"{count(stored.num_documents, 'document')}, {count(stored.num_queries, 'query', 'queries')}"
        message = f"{stored.name}: {texts} and {count(stored.num_judgments, 'judgment')} were stored."
        return self._parts.done(request, f"/new-comparison?data={quote(stored.name)}", message)

    async def answer(self, request: Request) -> Response:
        """Agree to the price of the judge, or continue without the judge."""
        name = request.path_params["run"]
        is_agreed = (await read_form(request)).first("agree") == "yes"
        await self._jobs().answer(name, is_agreed=is_agreed)
        return self._parts.pages.redirect(request, f"/compare/{quote(name)}")

    async def events(self, request: Request) -> Response:
        """Follow a comparison as server-sent events."""
        return await self._comparisons.stream(request.path_params["run"])

    async def stop(self, request: Request) -> Response:
        """Stop a running comparison."""
        name = request.path_params["run"]
        await self._jobs().stop(name)
        return self._parts.pages.redirect(request, f"/compare/{quote(name)}")

    async def _form(
        self,
        request: Request,
        jobs: Jobs,
        wanted: Wanted,
        problem: RequestError | None = None,
        *,
        captured: str = "",
        done: str = "",
    ) -> Response:
        return self._parts.pages.render(
            request,
            "compare_new.html.j2",
            200 if problem is None else problem.status,
            wanted=wanted,
            problem=problem,
            done=done,
            data_sets=await asyncio.to_thread(jobs.data_sets),
            captures=list(self._comparisons.captured()),
            captured=captured,
            runs=self._comparisons.runs,
            running=jobs.running,
            names=self._parts.arm_names(request),
            num_arms=_FORM_ARMS,
        )

    def _jobs(self) -> Jobs:
        return required(self._comparisons.jobs)

    def _unfinished(self, known: Sequence[Run]) -> list[Job]:
        """Return the comparisons that were started here and have no results yet."""
        names = {run.name for run in known}
        return (
            []
            if self._comparisons.jobs is None
            else [job for job in self._jobs().all() if job.wanted.name not in names]
        )

    def runs(self, request: Request) -> Runs | None:
        """Return the folder of the comparisons; ``None`` if no folder is set, or the reader is not the operator."""
        return self._comparisons.runs if visitor_of(request).is_operator else None

    async def _page(self, request: Request, known: Sequence[Run], run: Run, problem: str = "") -> Response:
        runs, results = self.runs(request), run.results
        assert runs is not None  # noqa: S101  the run is from there
        arms = [] if results is None else [arm.name for arm in results.arms[1:]]
        arm = chosen(request.query_params.get("arm", ""), arms, arms[0] if arms else "")
        order = chosen(request.query_params.get("order", ""), _ORDERS, "lost")
        queries: list[Query] = []
        if results is not None and results.dataset.num_judgments and arm:
            baseline = results.arms[0].name
            queries = await asyncio.to_thread(
                runs.worst, run.name, arm, baseline, _NUM_QUERIES, is_gained=order == "gained"
            )
        return self._parts.pages.render(
            request,
            "compare.html.j2",
            known=known,
            jobs=self._unfinished(known),
            run=run,
            results=results,
            primary=PRIMARY,
            quality=None if results is None else _quality(results),
            costs=None if results is None else _costs(results),
            judged=None if results is None or results.judge is None else _judged(results, results.judge),
            has_check=await asyncio.to_thread(runs.has_check, run.name),
            min_kappa=MIN_KAPPA,
            problem=problem,
            arms=arms,
            arm=arm,
            order=order,
            queries=queries,
            num_hits=_NUM_HITS,
        )


def _wanted(form: Form) -> Wanted:
    """Return the comparison that a form asks for.

    Raises:
        BadInput: a number is not valid.
    """
    number, margin = form.first("max_documents").strip().replace(",", ""), form.first("margin").strip()
    budget = form.first("judge_budget").strip().replace(",", "")
    written = _form_texts(form)
    judge = written.judge
    try:
        max_documents = int(number) if number else None
        if judge is not None and budget:
            judge = replace(judge, max_tokens=int(budget))
        wanted_margin = float(margin) if margin else None
    except ValueError:
        raise BadInput("the numbers of documents and tokens, and the margin must be numbers, or empty") from None
    if (max_documents is not None and max_documents < 1) or not 0 <= (wanted_margin or 0.0) <= 1:
        raise BadInput("the number of documents must be at least 1, and the margin from 0 to 1")
    if judge is not None and judge.max_tokens is not None and judge.max_tokens < 1:
        raise BadInput("the judge's tokens must be at least 1")
    return replace(written, max_documents=max_documents, margin=wanted_margin, judge=judge)


def _form_texts(form: Form) -> Wanted:
    """Return the texts of a form, so that they can be shown again."""
    arms = [arm.strip() for arm in form.all("arm")]
    name, data = form.first("name").strip(), form.first("data")
    url, model = form.first("judge").strip(), form.first("judge_model").strip()
    judge = JudgeChoice(url, model, form.first("judge_key").strip()) if url or model else None
    return Wanted(name, [arm for arm in arms if arm], data, measures_cost=bool(form.first("cost")), judge=judge)


def _usual_name() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H.%M}"


def _quality(results: Results) -> Forest | None:
    """Return the differences of the arms from the baseline in the primary measure; ``None`` without judgments."""
    found = {contrast.arm: contrast.difference for contrast in results.contrasts if contrast.measure == PRIMARY}
    return _forest([found.get(arm.name) for arm in results.arms], 0.0) if found else None


def _costs(results: Results) -> Forest | None:
    """Return the ratios of the times per query; ``None`` if they were not measured."""
    found = {contrast.arm: contrast.query_time for contrast in results.cost_contrasts if contrast.query_time}
    intervals = [_ratio_interval(found.get(arm.name)) for arm in results.arms]
    return _forest(intervals, 1.0) if found else None


def _judged(results: Results, judge: JudgeResults) -> list[tuple[JudgeContrast, Whisker | None, str]]:
    """Return the differences by a judge and its check, with the position of no difference."""
    found = {contrast.arm: contrast for contrast in judge.contrasts}
    known = [found[arm.name] for arm in results.arms if arm.name in found]
    figures = [contrast.figure for contrast in known]
    forest = _forest([Interval(mean=figure.mean, low=figure.low, high=figure.high) for figure in figures], 0.0)
    return [(contrast, whisker, forest.zero) for contrast, whisker in zip(known, forest.whiskers, strict=True)]


def _ratio_interval(ratio: Ratio | None) -> Interval | None:
    return None if ratio is None else Interval(mean=ratio.ratio, low=ratio.low, high=ratio.high)


def _forest(intervals: Sequence[Interval | None], zero: float) -> Forest:
    ends = [
        end
        for interval in intervals
        if interval
        for end in (interval.low, interval.high, interval.mean)
        if end is not None
    ]
    reach = max((abs(end - zero) for end in ends), default=0.0) * 1.1 or 1.0
    scale = Scale(zero - reach, zero + reach)
    return Forest(
        scale.at(zero),
        [
            None
            if interval is None
            else Whisker(
                "" if interval.low is None else scale.at(interval.low),
                "" if interval.low is None or interval.high is None else scale.length(interval.low, interval.high),
                scale.at(interval.mean),
            )
            for interval in intervals
        ],
    )
