"""The comparisons: the verdict first, then the reasons, then the queries to look at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from gateway.console.charts import Scale
from gateway.console.parts import Parts
from gateway.console.runs import PRIMARY, Interval, Query, Ratio, Results, Run, Runs
from gateway.console.web import chosen, visitor_of
from gateway.errors import Forbidden

_NUM_QUERIES = 10
_NUM_HITS = 5
_ORDERS = ("lost", "gained")


@dataclass(frozen=True, slots=True)
class Whisker:
    """An interval to draw, in percent of the width; ``start`` is empty where there is no interval."""

    start: str
    width: str
    point: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Intervals on one axis.

    Attributes:
        zero: the place of "no difference".
    """

    zero: str
    whiskers: Sequence[Whisker | None]


class Compare:
    """The handlers of the pages."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def first(self, request: Request) -> Response:
        """Show the latest comparison, or how to make one."""
        runs = self.runs(request)
        known = [] if runs is None else await asyncio.to_thread(runs.latest)
        if not known:
            return self._parts.pages.render(request, "compare_none.html.j2", runs=runs)
        return await self._page(request, known, known[0])

    async def show(self, request: Request) -> Response:
        """Show one comparison."""
        runs = self.runs(request)
        if runs is None:
            return await self.first(request)
        run = await asyncio.to_thread(runs.find, request.path_params["run"])
        return await self._page(request, await asyncio.to_thread(runs.latest), run)

    def runs(self, request: Request) -> Runs | None:
        """Return the folder of the comparisons, which hold texts; ``None`` if none is set.

        Raises:
            Forbidden: the reader has a client's key.
        """
        if not visitor_of(request).sees_all:
            raise Forbidden("comparisons hold texts, so they are for the operator: sign in with GATEWAY_ADMIN_KEY")
        folder = self._parts.deployment.settings.runs_dir
        return None if folder is None else Runs(folder)

    async def _page(self, request: Request, known: Sequence[Run], run: Run) -> Response:
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
            run=run,
            results=results,
            primary=PRIMARY,
            quality=None if results is None else _quality(results),
            costs=None if results is None else _costs(results),
            arms=arms,
            arm=arm,
            order=order,
            queries=queries,
            num_hits=_NUM_HITS,
        )


def _quality(results: Results) -> Forest | None:
    """Return the differences of the arms from the baseline in the primary measure; ``None`` without judgments."""
    found = {one.arm: one.difference for one in results.contrasts if one.measure == PRIMARY}
    return _forest([found.get(arm.name) for arm in results.arms], 0.0) if found else None


def _costs(results: Results) -> Forest | None:
    """Return the ratios of the times of one query; ``None`` if they were not measured."""
    found = {one.arm: one.query_time for one in results.cost_contrasts if one.query_time}
    intervals = [_of_ratio(found.get(arm.name)) for arm in results.arms]
    return _forest(intervals, 1.0) if found else None


def _of_ratio(ratio: Ratio | None) -> Interval | None:
    return None if ratio is None else Interval(mean=ratio.ratio, low=ratio.low, high=ratio.high)


def _forest(intervals: Sequence[Interval | None], zero: float) -> Forest:
    ends = [end for one in intervals if one for end in (one.low, one.high, one.mean) if end is not None]
    reach = max((abs(end - zero) for end in ends), default=0.0) * 1.1 or 1.0
    scale = Scale(zero - reach, zero + reach)
    return Forest(
        scale.at(zero),
        [
            None
            if one is None
            else Whisker(
                "" if one.low is None else scale.at(one.low),
                "" if one.low is None or one.high is None else scale.length(one.low, one.high),
                scale.at(one.mean),
            )
            for one in intervals
        ],
    )
