"""``gateway embed``: open the source, the sink and the manifest, load or find the model, run the job, report."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gateway import __version__
from gateway.bulk.blocks import OnError
from gateway.bulk.embedder import Embedder, chunker
from gateway.bulk.fields import FieldNames
from gateway.bulk.files.folder import FolderSink
from gateway.bulk.files.source import FileSource
from gateway.bulk.job import SHARD_ROWS, Job, Options, Outcome
from gateway.bulk.manifest import Earlier, Manifest
from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.opening import check_apart, open_sink, open_source
from gateway.bulk.progress import show_progress
from gateway.bulk.report import Report
from gateway.bulk.rows import BulkError, Composed, CountedSink, Json, Sink, Source, SpaceNote
from gateway.cli.console import make_console, say
from gateway.cli.models import OwnModels, RunningGateway
from gateway.config.wording import count
from gateway.telemetry.logs import configure_logs

INTERRUPTED = 130
"""The exit code after Ctrl-C that shells use."""

_MANIFEST, _ERRORS, _SUMMARY = "_manifest.sqlite3", "_errors.jsonl", "_manifest.json"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """The options of the command.

    Attributes:
        sources: files, folders and patterns, or the URL of one collection.
        manifest: the file of the manifest; ``None`` to keep it in the sink's folder, or in the user's state folder.
        errors: the file that lists skipped rows; ``None`` for a file next to the manifest.
        keeps_text: store the text with the vector.
        adopts: trust the user that vectors in a collection without a note are of the job's space.
        restarts: forget an earlier job, and delete the files that it wrote.
        max_missing: the number of the job's rows that the store may lack.
        state_folder: the folder for the manifests of jobs that write into stores.
    """

    sources: Sequence[str]
    sink: str
    spec: ModelSpec
    names: FieldNames
    state_folder: Path
    manifest: Path | None = None
    errors: Path | None = None
    on_error: OnError = "stop"
    shard_rows: int = SHARD_ROWS
    keeps_text: bool = True
    adopts: bool = False
    restarts: bool = False
    max_missing: int = 0
    price_per_hour: float | None = None


def run_embed(request: EmbedRequest, models: RunningGateway | OwnModels, *, as_json: bool) -> int:
    """Run the command, print its report, and return the exit code.

    Raises:
        BulkError: the job cannot start or cannot finish. The shards written before the error are complete, and count.
    """
    console = make_console(is_error=True)
    check_apart(request.sources, request.sink)
    with ExitStack() as stack:
        own = [request.sink, request.manifest, request.errors or (request.manifest and _errors_path(request.manifest))]
        written = [str(place) for place in own if place is not None]
        source = stack.enter_context(closing(open_source(request.sources, request.names, written)))
        sink = stack.enter_context(
            closing(open_sink(request.sink, source.text_field if request.keeps_text else None, adopts=request.adopts))
        )
        check_apart(request.sources, request.sink, _collections(source), _collections(sink))
        path = _manifest_path(request, source, sink)
        _check_folder(sink, path, request)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BulkError(f"the folder of the manifest {path} cannot be created: {error.strerror}") from error
        manifest = stack.enter_context(closing(Manifest(path)))
        with console.status(Text(f"reading {source.name}")):
            identity = _identity(request, source, sink)
        if not request.restarts:
            manifest.check(identity)
        errors = request.errors or _errors_path(path)
        options = Options(errors, request.on_error, request.shard_rows)
        job = _Prepared(source, sink, manifest, identity, options, request.restarts, request.max_missing)
        note, outcome = asyncio.run(_run(job, request.spec, models, console))
        stale = job.count_stale(outcome.total.rows) if outcome.is_finished else 0
        report = Report(source.name, sink.name, note, path, errors, outcome, request.price_per_hour, stale)
        if outcome.is_finished and isinstance(sink, FolderSink):
            _write_summary(sink, manifest, report, identity)
    output = make_console()
    if as_json:
        print(json.dumps(report.as_json(), indent=2))  # noqa: T201
    else:
        report.print(output)
    return 0 if outcome.is_finished else INTERRUPTED


def _collections(place: Source | Sink) -> Sequence[str]:
    return place.collections if isinstance(place, Composed) else [place.name]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A job with an open source, sink and manifest.

    Attributes:
        identity: the parts of the job's identity that are known before the model is loaded.
        restarts: forget an earlier job, and delete the files that it wrote.
        max_missing: the number of the job's rows that the store may lack.
    """

    source: Source
    sink: Sink
    manifest: Manifest
    identity: Mapping[str, Json]
    options: Options
    restarts: bool
    max_missing: int

    def start_over(self) -> None:
        """Forget an earlier job, and delete its files: first, because the manifest knows which files these are."""
        written = self.manifest.written_to(str(self.identity["sink"]))
        earlier = None
        if isinstance(self.sink, FolderSink) and written is not None:
            self.sink.remove([_SUMMARY, *map(self.sink.file_name, written)])
        elif isinstance(self.sink, CountedSink) and written is not None:
            earlier = self._earlier(self.sink.count())
        self.manifest.forget(earlier)

    def _earlier(self, number: int) -> Earlier:
        """Return the rows of earlier jobs in a store with this number of rows."""
        known = self.manifest.earlier
        rows = self.manifest.progress().counts.rows
        return Earlier(min(rows if known is None else rows + known.stale(rows, number), number), number)

    def check_count(self, rows: int) -> None:
        """Check that the store lacks no more of the manifest's rows than the user accepts.

        Raises:
            BulkError: it lacks more.
        """
        number = self.sink.count() if isinstance(self.sink, CountedSink) else rows
        if (missing := rows - number) > self.max_missing:
            raise BulkError(
                f"{self.sink.name} has {number:,} rows, but according to {self.manifest.path} it has "
                f"{count(rows, 'row')} of this job: {missing:,} are missing. If they were lost, embed all rows again with "
                f"--restart. If applications deleted them, accept that with --max-missing {missing}"
            )

    def count_stale(self, rows: int) -> int:
        """Return the maximum number of rows of forgotten jobs that this job has not written again."""
        earlier = self.manifest.earlier
        if earlier is None or not isinstance(self.sink, CountedSink):
            return 0
        return earlier.stale(rows, self.sink.count())


async def _run(
    job: _Prepared, spec: ModelSpec, models: RunningGateway | OwnModels, console: Console
) -> tuple[SpaceNote, Outcome]:
    stop = asyncio.Event()
    async with open_embedder(spec, models, console) as embedder:
        note = embedder.note
        if job.restarts:  # only now: without this model, nothing would replace the files
            job.start_over()
        progress = job.manifest.begin({**job.identity, "model": note.model, "space": note.space, "task": note.task})
        job.check_count(progress.counts.rows)
        if isinstance(job.sink, FolderSink):
            if progress.counts.rows and job.sink.is_empty():
                raise BulkError(
                    f"{job.sink.name} is empty, but according to {job.manifest.path} it has "
                    f"{count(progress.counts.rows, 'row')} of this job: embed all of them again with --restart"
                )
            job.sink.check_files(
                (part for part, _ in job.manifest.parts()), progress.part if progress.planned_items else None
            )
        _announce(console, job, note, progress.counts.items)
        if progress.is_finished:
            done = progress.counts
            return note, Outcome(type(done)(), done, 0.0, is_finished=True)
        stop_on_signals(stop, console)
        with show_progress(console) as reporter:
            options = replace(job.options, expand=await chunker(embedder, spec))
            work = Job(job.source, job.sink, job.manifest, embedder, options, reporter)
            outcome = await work.run(progress, stop)
        if outcome.is_finished:
            job.check_count(outcome.total.rows)
        return note, outcome


@asynccontextmanager
async def open_embedder(
    spec: ModelSpec, models: RunningGateway | OwnModels, console: Console
) -> AsyncIterator[Embedder]:
    """Load a model, or find it at a running gateway, and yield an embedder.

    Raises:
        BulkError: the model cannot be used.
    """
    if isinstance(models, RunningGateway):
        from gateway.bulk.remote import remote_embedder

        async with remote_embedder(models.url, models.api_key, spec) as embedder:
            yield embedder
        return
    from gateway.bulk.local import local_embedder

    configure_logs("warning", "auto")  # a bar shows the progress
    with console.status(Text(f"loading {spec.name}")) as status:
        async with local_embedder(models.registry, models.settings, spec) as local:
            status.stop()
            yield local


def stop_on_signals(stop: asyncio.Event, console: Console) -> None:
    """Stop in an orderly way at the first signal, and immediately at the second."""
    loop = asyncio.get_running_loop()

    def stop_gracefully() -> None:
        say(console, "Stopping after the embedded rows are written. Press Ctrl-C again to stop immediately.")
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_gracefully)


def _announce(console: Console, job: _Prepared, note: SpaceNote, num_done: int) -> None:
    outputs = [f"{note.dimensions} dimensions"] if note.dimensions else []
    outputs += ["sparse weights"] if note.has_sparse else []
    outputs += [f"multi-vectors of {note.token_width} dimensions"] if note.token_width else []
    task = f", task {note.task}" if note.task else ""
    say(console, f"{job.source.name} → {job.sink.name}: {note.space}{task}, {', '.join(outputs)}")
    say(console, f"fields: {job.identity['fields']}; manifest: {job.manifest.path}")
    if num_done:
        say(console, f"continuing after {count(num_done, 'row')} of an earlier run")


def _identity(request: EmbedRequest, source: Source, sink: Sink) -> dict[str, Json]:
    """Return everything except the space that must be the same each time the job continues."""
    return {
        "source hash": source.fingerprint(),
        "name of the model": request.spec.name,
        "dimensions": request.spec.dimensions,
        "outputs": ", ".join(output.value for output in request.spec.outputs),
        "truncate": request.spec.truncate.value,
        "fields": _fields(request, source),
        "chunks": None if request.spec.chunking is None else str(request.spec.chunking),
        "sink": _sink_name(request, sink),
    }


def _sink_name(request: EmbedRequest, sink: Sink) -> str:
    """Return the sink's name for the manifest, in which a slash at the end of a folder does not matter."""
    if not isinstance(sink, FolderSink):
        return request.sink
    return request.sink.rstrip("/") if sink.folder is None else os.path.normpath(sink.folder)


def _fields(request: EmbedRequest, source: Source) -> str:
    """Describe the fields that are read."""
    names = request.names
    row_id = getattr(getattr(source, "fields", None), "id", names.id)
    title = f", title `{names.title}`" if names.title else ""
    payload = "all others" if names.payload is None else ", ".join(names.payload) or "nothing"
    text = f"text `{source.text_field}`" + ("" if request.keeps_text else " (not stored)")
    shown_id = (
        f"id `{row_id}`" if row_id else "ids from " + ("places" if isinstance(source, FileSource) else "the store")
    )
    return f"{shown_id}, {text}{title}, stored with them: {payload}"


def _manifest_path(request: EmbedRequest, source: Source, sink: Sink) -> Path:
    if request.manifest is not None:
        return request.manifest
    if isinstance(sink, FolderSink) and sink.folder is not None:
        return sink.folder / _MANIFEST
    names = [source.name, sink.name.rstrip("/")]
    if any(map(_is_relative, (*request.sources, request.sink))):
        names.append(str(Path.cwd()))  # the same relative path means another place elsewhere
    key = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
    return request.state_folder / f"{key}.sqlite3"


def _is_relative(place: str) -> bool:
    """Return whether a place is below the working directory: ``docs.jsonl`` or ``qdrant:./folder#docs``."""
    path = place.partition(":")[2] or place
    return "://" not in place and not path.startswith(("/", "~"))


def _errors_path(manifest: Path) -> Path:
    return manifest.with_name(_ERRORS if manifest.name == _MANIFEST else f"{manifest.stem}.errors.jsonl")


def _check_folder(sink: Sink, manifest: Path, request: EmbedRequest) -> None:
    """Check that the sink's folder contains only files of this job.

    Raises:
        BulkError: the folder contains other files, or is not a folder.
    """
    if not isinstance(sink, FolderSink) or sink.folder is None or manifest.exists():
        return
    try:
        others = sorted(path.name for path in sink.folder.iterdir()) if sink.folder.exists() else []
    except OSError as error:
        raise BulkError(f"--to {request.sink}: cannot be used: {error.strerror}") from error
    if others:
        raise BulkError(
            f"--to {request.sink}: the folder is not empty (it has {others[0]}) and has no manifest: choose a new "
            "folder, or name the manifest with --manifest"
        )


def _write_summary(sink: FolderSink, manifest: Manifest, report: Report, identity: Mapping[str, Json]) -> None:
    """Write a description of the folder for people and programs. The file exists only if the folder is complete."""
    parts = [{"file": sink.file_name(part), "rows": rows} for part, rows in manifest.parts()]
    summary = {
        "version": __version__,
        **asdict(report.note),
        **asdict(report.outcome.total),
        "source": report.source,
        "source_sha256": identity["source hash"],
        "outputs": identity["outputs"],
        "truncate": identity["truncate"],
        "fields": identity["fields"],
        "files": parts,
    }
    sink.write_file(_SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
