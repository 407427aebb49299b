"""The paths of the console."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route, Router
from starlette.types import Scope

from gateway.access.keyring import Keyring
from gateway.api.comparisons import Comparisons
from gateway.api.endpoint import Endpoint
from gateway.api.experiments import Experiments as Reports
from gateway.console.access import Gate, Right
from gateway.console.compare import Compare
from gateway.console.duel import DuelPages
from gateway.console.experiments import Experiments
from gateway.console.grade import GradePages
from gateway.console.overview import Overview
from gateway.console.parts import Parts
from gateway.console.playground import Playground
from gateway.console.web import ROOT, THEME_COOKIE, THEMES, Handler, Pages, chosen, read_form
from gateway.errors import RequestError, Unauthorized
from gateway.experiments.stats import ExperimentStats
from gateway.http.context import RequestContext

_THEME_S = 365 * 86_400


class Site:
    """The pages that are not views: sign-in, the theme, static files."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._gate = pages.gate

    async def root(self, request: Request) -> Response:
        """Redirect a browser to the console; for an API client, the path does not exist."""
        if "text/html" not in request.headers.get("accept", ""):
            raise HTTPException(404)
        response = self._pages.redirect(request, "")
        response.headers["vary"] = "accept"
        return response

    async def file(self, request: Request) -> Response:
        """Return a static file."""
        response = self._pages.file(request.path_params["name"])
        if response is None:
            raise HTTPException(404)
        return response

    async def sign_in_page(self, request: Request) -> Response:
        """Ask for a key."""
        return self._sign_in_page(request, _local(request.query_params.get("next", "")))

    async def sign_in(self, request: Request) -> Response:
        """Exchange a key for a cookie."""
        form = await read_form(request)
        to = _local(form.first("next"))
        try:
            token = await self._gate.sign_in(form.first("key"), RequestContext.of(request).client.name)
        except Unauthorized as error:
            RequestContext.of(request).refuse(error)
            return self._sign_in_page(request, to, error)
        response = self._pages.redirect(request, to)
        _set_cookie(request, response, self._gate.cookie, token)
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the session."""
        self._gate.sign_out(request)
        response = self._pages.redirect(request, "")
        _set_cookie(request, response, self._gate.cookie, "", 0)
        return response

    async def theme(self, request: Request) -> Response:
        """Remember the theme of this browser."""
        form = await read_form(request)
        response = self._pages.redirect(request, _local(form.first("back")))
        theme = chosen(form.first("theme"), THEMES, "auto")
        _set_cookie(request, response, THEME_COOKIE, theme, _THEME_S)
        return response

    def _sign_in_page(self, request: Request, to: str, error: RequestError | None = None) -> Response:
        status = 200 if error is None else error.status
        return self._pages.render(request, "sign_in.html.j2", status, to=ROOT + to, error=error)


def _set_cookie(request: Request, response: Response, name: str, value: str, max_age: int | None = None) -> None:
    """Set a cookie that no script and no other site can read; without ``max_age``, it lasts until the browser closes."""
    path = request.scope.get("root_path", "") + ROOT
    is_secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age, path=path, httponly=True, samesite="strict", secure=is_secure)


def _local(path: str) -> str:
    """Return the part of a path after the console's root; empty for any other place, such as another site."""
    is_own = path == ROOT or path.startswith((f"{ROOT}/", f"{ROOT}?"))
    return path.removeprefix(ROOT) if is_own and "\\" not in path and path.isprintable() else ""


class _Page(Route):
    """A path of the console: a plain route of Starlette.

    FastAPI inspects the handler of each of its routes, which took half of the time that an application takes to make.
    """

    def __init__(self, path: str, handler: Handler, method: str) -> None:
        super().__init__(path, handler, methods=[method], include_in_schema=False)
        self.methods = {method}  # the middleware has already turned each HEAD into a GET

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return the match, with this route in the scope: its path is a label of metrics. FastAPI adds only its own."""
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def console_router(
    endpoint: Endpoint,
    stats: ExperimentStats,
    reports: Reports,
    comparisons: Comparisons,
    keyring: Keyring,
    port: int,
) -> Router:
    """Return the paths of the console.

    Args:
        reports, comparisons: the handlers of the API, which know the outcomes and the running comparisons.
        port: the port that serves the console.
    """
    pages = Pages(Gate(endpoint.settings, keyring, port))
    parts = Parts(endpoint.deployment, endpoint, stats, reports, pages)
    site, overview, playground = Site(pages), Overview(parts), Playground(parts)
    experiments, compare = Experiments(parts), Compare(parts, comparisons)
    duel, grade = DuelPages(parts, compare), GradePages(parts, compare, comparisons)

    routes = [_Page("/", site.root, "GET"), _Page(f"{ROOT}/static/{{name}}", site.file, "GET")]
    for path, handler, method, right in (
        ("/sign-in", site.sign_in_page, "GET", Right.ANYONE),
        ("/sign-in", site.sign_in, "POST", Right.ANYONE),
        ("/sign-out", site.sign_out, "POST", Right.ANYONE),
        ("/theme", site.theme, "POST", Right.ANYONE),
        ("", overview.show, "GET", Right.READER),
        ("/reload", overview.reload, "POST", Right.OPERATOR),
        ("/models/{model:path}/load", overview.load, "POST", Right.OPERATOR),
        ("/models/{model:path}/unload", overview.unload, "POST", Right.OPERATOR),
        ("/models/{model:path}/verify", overview.verify, "POST", Right.OPERATOR),
        ("/playground", playground.show, "GET", Right.READER),
        ("/playground", playground.run, "POST", Right.READER),
        ("/duel", duel.begin_page, "GET", Right.READER),
        ("/duel", duel.begin, "POST", Right.OPERATOR),
        ("/duel/{run}/{duel}", duel.show, "GET", Right.OPERATOR),
        ("/duel/{run}/{duel}/vote", duel.vote, "POST", Right.OPERATOR),
        ("/duel/{run}/{duel}/undo", duel.undo, "POST", Right.OPERATOR),
        ("/duel/{run}/{duel}/end", duel.end, "POST", Right.OPERATOR),
        ("/duel/{run}/{duel}/qrels.tsv", duel.qrels, "GET", Right.OPERATOR),
        ("/duel/{run}/{duel}/votes.jsonl", duel.votes, "GET", Right.OPERATOR),
        *_compare_paths(compare, grade),
        *_experiment_paths(experiments),
    ):
        routes.append(_Page(ROOT + path, pages.guard(handler, right), method))
    return Router(routes)


_Path = tuple[str, Handler, str, Right]


def _compare_paths(compare: Compare, grade: GradePages) -> tuple[_Path, ...]:
    return (
        ("/compare", compare.first, "GET", Right.READER),
        ("/compare/{run}", compare.show, "GET", Right.OPERATOR),
        ("/compare/{run}/stop", compare.stop, "POST", Right.OPERATOR),
        ("/compare/{run}/answer", compare.answer, "POST", Right.OPERATOR),
        ("/compare/{run}/events", compare.events, "GET", Right.OPERATOR),
        ("/compare/{run}/grade", grade.show, "GET", Right.OPERATOR),
        ("/compare/{run}/grade", grade.grade, "POST", Right.OPERATOR),
        ("/compare/{run}/grade/undo", grade.undo, "POST", Right.OPERATOR),
        ("/compare/{run}/verdict", grade.conclude, "POST", Right.OPERATOR),
        ("/new-comparison", compare.ask, "GET", Right.OPERATOR),
        ("/new-comparison", compare.start, "POST", Right.OPERATOR),
        ("/data-sets", compare.upload, "POST", Right.OPERATOR),
    )


def _experiment_paths(experiments: Experiments) -> tuple[_Path, ...]:
    path = "/experiments/{experiment_id:path}"
    return (
        ("/experiments", experiments.first, "GET", Right.READER),
        (f"{path}/assignment", experiments.assign, "POST", Right.READER),
        (f"{path}/weights", experiments.ramp, "POST", Right.READER),
        (f"{path}/change", experiments.change, "POST", Right.OPERATOR),
        (f"{path}/ending", experiments.ask_end, "POST", Right.OPERATOR),
        (f"{path}/end", experiments.end, "POST", Right.OPERATOR),
        (f"{path}/counting-again", experiments.ask_count_again, "POST", Right.OPERATOR),
        (f"{path}/count-again", experiments.count_again, "POST", Right.OPERATOR),
        (path, experiments.show, "GET", Right.READER),
    )
