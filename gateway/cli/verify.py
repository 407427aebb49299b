"""``gateway verify``: compare a model, as it runs here or on other servers, with numbers known to be right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.backends.upstream.backend import UpstreamBackend
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import LoadError
from gateway.golden import SAME_MODEL_COSINE, GoldenVector, compare_recorded, read, write
from gateway.types import ModelKind, Truncate


@dataclass(frozen=True, slots=True)
class Check:
    """One measured value, and whether it is within its limit.

    Attributes:
        what: the text or task that was computed.
        quantity: ``cosine``, ``tokens`` or ``deviation``.
    """

    what: str
    quantity: str
    measured: str
    limit: str
    is_passed: bool


def record_golden(entry: ModelEntry, path: Path) -> int:
    """Compute a model's golden vectors in float32 with torch, store them, and return their number.

    For a remote model, store the vectors that its servers return now.

    Raises:
        LoadError: the model cannot be loaded or returns no vectors, or its servers do not answer.
    """
    if entry.is_remote:
        fingerprint, given = asyncio.run(_ask_servers(entry))
        write(path, fingerprint, given)
        return len(given)
    from gateway import golden  # imports torch
    from gateway.engine.loading import load_reference, plan_load

    plan = plan_load(entry)
    if plan.kind is not ModelKind.EMBED:
        raise LoadError(f"{entry.id} scores texts: it has no vectors to record")
    if not plan.info.width:
        raise LoadError(f"{entry.id} has no dense vectors to record, only: {', '.join(plan.outputs)}")
    vectors = golden.record(load_reference(plan).embed, [None, *plan.tasks])
    golden.write(path, plan.checkpoint.fingerprint, vectors)
    return len(vectors)


def verify(entry: ModelEntry, settings: Settings) -> list[Check]:
    """Load a model as the gateway would, and compare it with its golden vectors and, for Jina v3, the published numbers.

    Raises:
        LoadError: the model cannot be loaded, or its golden file is another model's.
    """
    if entry.is_remote:
        return _verify_servers(entry)
    from gateway import golden  # imports torch
    from gateway.engine import published
    from gateway.engine.loading import load_engine, load_reference, plan_load

    plan = plan_load(entry)
    checks = []
    if entry.source == published.SOURCE:
        reference = load_reference(plan)
        ids = reference.tokenize([published.TEXT], None, Truncate.END)[0].ids
        checks.append(
            Check(
                "the published text",
                "tokens",
                str(len(ids)),
                str(published.NUM_TOKENS),
                len(ids) == published.NUM_TOKENS,
            )
        )
        adapters: dict[str | None, int] = {None: -1, **{task: i for i, task in enumerate(plan.checkpoint.adapters)}}
        for task, deviation in published.largest_deviation(reference.runtime, ids, adapters).items():
            checks.append(
                Check(
                    f"published states, {task or 'no adapter'}",
                    "deviation",
                    f"{deviation:.6f}",
                    f"at most {published.TOLERANCE}",
                    deviation <= published.TOLERANCE,
                )
            )
    if entry.golden is not None:
        vectors = golden.read(Path(entry.golden), plan.checkpoint.fingerprint, plan.tasks)
        # Loading would refuse a model whose vectors differ, instead of showing by how much.
        engine = load_engine(plan, settings, checks_golden=False)
        num_streams = len(engine.encoders) // len(plan.devices)
        worst: dict[tuple[str | None, str], tuple[float, str]] = {}
        for number, encoder in enumerate(engine.encoders):
            device = plan.devices[number // num_streams]
            for one in golden.compare(encoder.embed([(one.text, one.task) for one in vectors]), vectors):
                key = one.golden.task, one.golden.text
                worst[key] = min((one.cosine, device), worst.get(key, (2.0, "")))
        for (task, text), (cosine, device) in worst.items():
            where = f", worst on {device}" if len(plan.devices) > 1 else ""
            checks.append(_cosine_check(task, text, cosine, golden.MIN_COSINE[plan.dtype], where))
    return checks


def _cosine_check(task: str | None, text: str, cosine: float, limit: float, where: str = "") -> Check:
    what = f"{task or 'no task'}: {text[:32]!r}{where}"
    return Check(what, "cosine", f"{cosine:.6f}", f"at least {limit}", cosine >= limit)


async def _ask_servers(entry: ModelEntry) -> tuple[str, Sequence[GoldenVector]]:
    """Return the fingerprint of a remote model, and the vectors that all its servers return now."""
    backend = UpstreamBackend(entry.model_copy(update={"golden": None}), Settings())
    try:
        await backend.plan()
        return backend.base_fingerprint(), backend.probe
    finally:
        await backend.stop()


def _verify_servers(entry: ModelEntry) -> list[Check]:
    fingerprint, given = asyncio.run(_ask_servers(entry))
    if entry.golden is None:
        return []
    recorded = read(Path(entry.golden), fingerprint, {one.task for one in given if one.task is not None})
    return [
        _cosine_check(one.golden.task, one.golden.text, one.cosine, SAME_MODEL_COSINE)
        for one in compare_recorded(given, recorded)
    ]
