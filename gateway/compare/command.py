"""``gateway compare``: find the gateway, compare, print the results, and write them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gateway.cli.client import GatewayClient, connect
from gateway.cli.console import make_console
from gateway.cli.in_process import in_process_client
from gateway.cli.models import OwnModels, RunningGateway
from gateway.compare.arms import parse_arms
from gateway.compare.comparison import CompareRequest, compare
from gateway.compare.dataset import Dataset, read_dataset
from gateway.compare.folder import check_data, claimed
from gateway.compare.judge.command import Declined, Judging, show_judged
from gateway.compare.outputs import write_page, write_results
from gateway.compare.page import render_page
from gateway.compare.progress import progress_on
from gateway.compare.results import Comparison
from gateway.compare.search import Ranking
from gateway.compare.table import print_comparison
from gateway.compare.unjudged import write_to_judge
from gateway.config.files import user_folder
from gateway.errors import CompareError
from gateway.telemetry.logs import configure_logs

# Longer than the gateway's own default time limit for a request.
_TIMEOUT_S = 330.0
_PATIENCE_S = 600.0


def run_comparison(
    request: CompareRequest,
    gateway: RunningGateway | OwnModels,
    out: Path | None,
    judging: Judging | None = None,
    *,
    is_progress_json: bool = False,
) -> None:
    """Compare, print the tables, and write the files.

    Args:
        out: folder for the files; by default a folder named after the time.
        judging: the judge of the arms, if there is one.
        is_progress_json: whether the progress is written as JSON for a program.

    Raises:
        CompareError: the comparison cannot be made, or its results cannot be written.
    """
    folder = out or Path(f"comparison-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    parse_arms(request.arms)  # check this before files are read
    with claimed(folder, request, has_judge=judging is not None):
        _compare_into(folder, request, gateway, judging, is_progress_json=is_progress_json)


def _compare_into(
    folder: Path,
    request: CompareRequest,
    gateway: RunningGateway | OwnModels,
    judging: Judging | None,
    *,
    is_progress_json: bool,
) -> None:
    console, progress = make_console(), make_console(is_error=True)
    dataset = read_dataset(
        request.data, request.split, request.max_documents, request.seed, request.judged, request.queries
    )
    check_data(folder, dataset)
    comparison, rankings = asyncio.run(_compare(request, dataset, gateway, progress, is_json=is_progress_json))
    print_comparison(comparison, console)
    written = write_results(comparison, rankings, folder)
    judged, failure = None, None
    try:
        judged = judging.run(comparison, dataset, rankings, progress) if judging else None
    except Declined:
        pass
    except CompareError as error:
        failure = error  # the comparison is worth its page without the judge
    if judged is not None:
        written += show_judged(judged, dataset, folder, request.seed, console)
    written.append(write_page(render_page(comparison, judged.report if judged else None), folder))
    to_judge = write_to_judge(comparison, dataset, folder)
    written += [to_judge] if to_judge else []
    for line in ("\nWritten:", *(f"  {path}" for path in written)):
        console.print(line, soft_wrap=True)
    if failure is not None:
        raise failure


async def _compare(
    request: CompareRequest,
    dataset: Dataset,
    gateway: RunningGateway | OwnModels,
    console: Console,
    *,
    is_json: bool,
) -> tuple[Comparison, Mapping[str, Ranking]]:
    names = [arm.model for arm in parse_arms(request.arms)]
    async with AsyncExitStack() as stack:
        with console.status(Text(f"getting {', '.join(dict.fromkeys(names))} ready")):
            client = await stack.enter_async_context(_client(gateway, names))
        with progress_on(console, is_json=is_json) as reporter:
            return await compare(request, dataset, client, reporter)


@asynccontextmanager
async def _client(gateway: RunningGateway | OwnModels, names: Sequence[str]) -> AsyncIterator[GatewayClient]:
    if isinstance(gateway, OwnModels):
        configure_logs("warning", "auto")  # progress bars show the steps
        logging.getLogger("httpx").setLevel(logging.WARNING)
        async with in_process_client(gateway.registry, gateway.settings, names) as http:
            yield GatewayClient(http, "in process", _PATIENCE_S)
        return
    # Captured queries must not be captured again, each time with a new date of deletion.
    headers = {"x-gateway-capture": "off"}
    async with connect(
        gateway.url, gateway.api_key, timeout_s=_TIMEOUT_S, patience_s=_PATIENCE_S, headers=headers
    ) as client:
        yield client


def default_cache(environ: Mapping[str, str]) -> Path:
    """Return the default folder for vectors.

    Raises:
        StartError: the user has no home folder.
    """
    return user_folder(environ, "XDG_CACHE_HOME", "~/.cache") / "compare"
