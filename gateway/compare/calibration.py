"""``gateway calibrate``: measure the ranges of a model's vectors on texts, and store them for int8 and uint8 vectors."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from gateway import ranges
from gateway.cli.console import make_console
from gateway.cli.in_process import in_process_deployment
from gateway.compare.beir import read_lines, read_texts
from gateway.compare.progress import Reporter, progress_on
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.errors import CompareError, RequestError, StartError
from gateway.experiments.stats import ExperimentStats
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry.logs import configure_logs
from gateway.types import ModelKind

_PASSAGE_TASK = "retrieval.passage"
_BATCH_TEXTS = 256
_TIMEOUT_S = 3600.0


def calibrate(registry: Registry, entry: ModelEntry, settings: Settings, texts: Path, max_texts: int) -> str:
    """Embed texts with a model as the gateway would, store the range of each dimension, and return a summary.

    A store holds documents, so texts are embedded with the task ``retrieval.passage``, if the model has it.

    Args:
        texts: a file with one text per line, or JSON lines with ``text``, as in BEIR's ``corpus.jsonl``.
        max_texts: the number of texts to draw, if there are more.

    Raises:
        StartError: the model has no file for ranges, gives no vectors or cannot be loaded; the texts cannot be read or
            embedded; or the ranges cannot be written.
    """
    if entry.ranges is None:
        raise StartError(f"{registry.path}: {entry.id} has no file for ranges: set `ranges: ranges/{entry.id}.json`")
    chosen = _choose(texts, max_texts)
    ranges.make_folder(Path(entry.ranges))  # check this before an hour of work
    configure_logs("warning", "auto")  # a progress bar shows the steps
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Ignore the file of ranges, which may not exist yet or belong to other weights.
    bare = [other.model_copy(update={"ranges": None}) if other.id == entry.id else other for other in registry.models]
    registry = registry.model_copy(update={"models": tuple(bare)})
    with progress_on(make_console(is_error=True)) as reporter:
        return asyncio.run(_calibrate(entry.id, Path(entry.ranges), registry, settings, chosen, reporter))


def _choose(path: Path, max_texts: int) -> list[str]:
    """Return the texts of a file without duplicates, sorted by length to limit padding."""
    found = read_texts(path).values() if path.suffix == ".jsonl" else _read_plain(path)
    texts = sorted({text for text in found if text.strip()})
    if len(texts) < 2:
        raise CompareError(f"{path}: has {len(texts)} texts; at least 2 are needed, and some thousand give good ranges")
    drawn = random.Random(0).sample(texts, max_texts) if len(texts) > max_texts else texts  # noqa: S311  not for secrets
    return sorted(drawn, key=len)


def _read_plain(path: Path) -> Iterator[str]:
    for place, line in read_lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise CompareError(f"{place}: is not UTF-8: {error.reason} at byte {error.start}") from error


async def _calibrate(
    model: str, path: Path, registry: Registry, settings: Settings, texts: Sequence[str], reporter: Reporter
) -> str:
    async with in_process_deployment(registry, settings, [model]) as deployment:
        [served] = deployment.fleet
        info = served.info
        if info is None or info.kind is not ModelKind.EMBED:
            raise StartError(f"{model} scores pairs of texts: it has no vectors to measure")
        service = EmbeddingService(deployment, ExperimentStats(None))
        meter = ranges.Meter(info.dimensions, is_normalized=info.is_normalized)
        step = reporter.step(f"{model}: texts", len(texts))
        for start in range(0, len(texts), _BATCH_TEXTS):
            batch = texts[start : start + _BATCH_TEXTS]
            request = EmbedRequest(
                texts=batch,
                model=model,
                timeout_s=_TIMEOUT_S,
                caller="calibrate",
                client=GATEWAY,
                task=_PASSAGE_TASK if _PASSAGE_TASK in info.tasks else None,
            )
            try:
                answer = await service.embed(request)
            except RequestError as error:
                raise StartError(f"{model} cannot embed the texts: {error.message}") from error
            meter.add(answer.vectors)
            step.advance(len(batch))
        ranges.write(path, info.fingerprint, meter.ranges(), is_normalized=info.is_normalized, num_texts=len(texts))
        sizes = ", ".join(str(size) for size in info.dimensions)
        return f"{path}: ranges of {len(texts):,} texts, for vectors of {sizes} dimensions"
