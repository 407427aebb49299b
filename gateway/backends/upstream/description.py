"""Describe a model that runs on other servers, from its entry and the facts that its servers state."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gateway import golden, ranges
from gateway.backends.upstream.dialects import Facts
from gateway.backends.upstream.failures import Failure
from gateway.backends.upstream.server import Server
from gateway.backends.upstream.tasks import Tasks
from gateway.config.model_entry import ModelEntry
from gateway.config.upstream import Upstream, server_names
from gateway.errors import LoadError
from gateway.golden import GoldenVector
from gateway.tasks import canonical_task
from gateway.types import ModelInfo

_DEFAULT_MAX_TOKENS = 8192
_ASKED_AT_ONCE = 32


async def learn_facts(servers: Iterable[Server], entry: ModelEntry, upstream: Upstream) -> Facts:
    """Ask every server for its facts, shut out servers that do not answer, and return the facts that hold for all.

    Raises:
        LoadError: a server serves another model. A server found through a name is only shut out.
    """
    model = upstream.model or entry.source
    turns = asyncio.Semaphore(_ASKED_AT_ONCE)
    answers = await asyncio.gather(*(_ask_facts(server, entry, model, turns) for server in servers))
    known = [facts for facts in answers if facts is not None]
    return Facts(
        max_tokens=min((facts.max_tokens for facts in known if facts.max_tokens), default=None),
        max_batch_texts=min((facts.max_batch_texts for facts in known if facts.max_batch_texts), default=None),
        dtype=next((facts.dtype for facts in known if facts.dtype), None),
    )


async def _ask_facts(server: Server, entry: ModelEntry, model: str, turns: asyncio.Semaphore) -> Facts | None:
    try:
        async with turns:
            facts = await server.facts()
    except Failure as failure:
        server.shut_out(str(failure))
        return None
    served = {name.casefold() for name in facts.models}
    if entry.backend == "tei" and served and model.casefold() not in served:
        wrong = (
            f"{server.name} serves {', '.join(facts.models)}, and not {model}; say what it calls the model in "
            "`upstream.model`"
        )
        if not server.is_found:
            raise LoadError(wrong)
        server.shut_out(wrong)
        return None
    return facts


def base_fingerprint(entry: ModelEntry, upstream: Upstream, tasks: Tasks) -> str:
    """Return a hash of a model's identity without its vectors: its name, and the fields sent with a text."""
    # How vectors are written does not change them.
    extra = {name: value for name, value in upstream.extra_body.items() if name != "encoding_format"}
    content: list[object] = [upstream.model or entry.source, dict(tasks.names), extra]
    if upstream.task_field is not None:
        content.append(upstream.task_field)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_golden(entry: ModelEntry, fingerprint: str, tasks: Tasks) -> Sequence[GoldenVector] | None:
    """Return the recorded vectors of a model, if its entry names a file.

    Raises:
        LoadError: they cannot be read, or belong to another model.
    """
    return None if entry.golden is None else golden.read(Path(entry.golden), fingerprint, tasks.instructions)


def full_fingerprint(base: str, width: int, recorded: Iterable[GoldenVector]) -> str:
    """Return a hash of a model's identity, including its recorded vectors."""
    vectors = b"".join(golden.vector.astype("<f4").tobytes() for golden in recorded)
    return hashlib.sha256(f"{base} {width}".encode() + vectors).hexdigest()


def describe(
    entry: ModelEntry,
    urls: Sequence[str],
    tasks: Tasks,
    facts: Facts,
    fingerprint: str,
    width: int,
    has_raw: bool,
) -> ModelInfo:
    """Return the model's info.

    Raises:
        LoadError: the entry lists dimensions that are larger than the model's, or ranges that are not the model's.
    """
    if too_wide := [size for size in entry.dimensions if size > width]:
        raise LoadError(f"dimensions lists {too_wide[0]}, but the model's vectors have {width}")
    sizes = tuple(sorted({width, *entry.dimensions}, reverse=True))
    return ModelInfo(
        id=entry.id,
        source=entry.source,
        revision=entry.revision,
        fingerprint=fingerprint,
        width=width,
        dimensions=sizes,
        max_tokens=entry.max_tokens or facts.max_tokens or _DEFAULT_MAX_TOKENS,
        pooling="unknown",
        is_normalized=True,
        device="remote",
        dtype=facts.dtype or "unknown",
        engine=f"{entry.backend} at {', '.join(server_names(urls))}",
        memory_bytes=0,
        tasks=tasks.instructions,
        default_task=entry.default_task and canonical_task(entry.default_task),
        has_raw=has_raw,
        ranges=ranges.read(entry.ranges, fingerprint, sizes, is_normalized=True),
    )
