"""``gateway download``: fetch the files of models from the hub, before the models are served."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gateway.backends.enabled import why_disabled
from gateway.cli.console import make_console, print_error, say
from gateway.config.registry import ModelEntry, Registry
from gateway.engine.checkpoint import fetch as fetching
from gateway.engine.checkpoint.hub import Repository, cache_folder, endpoint, format_size
from gateway.engine.checkpoint.sources import find_download, locate
from gateway.errors import LoadError, StartError

# Seconds between two lines about a download that is not shown at a terminal.
_LINE_S = 30.0


def download(registry: Registry, named: Sequence[ModelEntry] = ()) -> bool:
    """Download models, and return whether all of them are on this machine afterward.

    Args:
        named: the models; by default those of the registry that would be loaded on this machine.

    Raises:
        StartError: the disk has too little room for all models, or the user stopped the download.
    """
    console = make_console()
    entries = list(named or registry.models)
    wanted: list[tuple[ModelEntry, Repository]] = []
    is_complete = True
    for entry in entries:
        if reason := _why_not(entry, is_named=bool(named)):
            say(console, f"{entry.id}: {reason}")
            continue
        try:
            repository = find_download(entry)
        except LoadError as error:
            print_error(f"{entry.id}: {error}")
            is_complete = False
            continue
        if repository is None:
            say(console, f"{entry.id}: is already here, in {locate(entry, may_download=False)}")
        else:
            wanted.append((entry, repository))
            say(console, _announced(entry, repository))
    fetching.require_disk_space([repository for _, repository in wanted])  # for all models, before the first begins
    for entry, repository in wanted:
        is_complete = _fetch(console, entry, repository) and is_complete
    if is_complete:
        say(console, "\nDone. To serve without a network: HF_HUB_OFFLINE=1 gateway serve", "green")
    return is_complete


def _why_not(entry: ModelEntry, *, is_named: bool) -> str:
    """Return the reason why no file is fetched for a model; an empty text if the hub has to be asked."""
    if entry.is_remote:
        return "runs on other servers, so nothing is downloaded for it"
    if entry.parsed_source.kind != "hub":
        return f"nothing to download, its source is a {entry.parsed_source.kind}"
    reason = "" if is_named else why_disabled(entry)
    return (
        reason and f"not downloaded, because it would not be loaded here: {reason}. `gateway download {entry.id}` does"
    )


def _announced(entry: ModelEntry, repository: Repository) -> str:
    missing, total = repository.missing_bytes, repository.num_bytes
    size = format_size(total) if missing == total else f"{format_size(missing)} of {format_size(total)}"
    source = f"{endpoint()}/{repository.name} at {repository.revision[:12]}"
    license_name = entry.license or repository.license or "not stated: see its card"
    return (
        f"{entry.id}: {size} in {len(repository.files)} files, {source}, license {license_name}, into {cache_folder()}"
    )


def _fetch(console: Console, entry: ModelEntry, repository: Repository) -> bool:
    try:
        with _shown(console, entry.id) as report:
            fetching.fetch(repository, report)
    except LoadError as error:
        print_error(f"{entry.id}: {error}")
        return False
    except KeyboardInterrupt:
        raise StartError(
            f"{entry.id}: stopped. The downloaded parts are kept, and the same command continues from there"
        ) from None
    return True


@contextmanager
def _shown(console: Console, name: str) -> Iterator[fetching.Progress]:
    """Show the progress of a download: a bar on a terminal, else a line every 30 seconds and one at the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    next_line = time.monotonic() + _LINE_S
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)

        def report(done: int, total: int) -> None:
            nonlocal next_line
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and (done == total or time.monotonic() >= next_line):
                next_line = time.monotonic() + _LINE_S
                say(console, f"{name}: {format_size(done)} of {format_size(total)}")

        yield report
