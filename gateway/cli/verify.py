"""``gateway verify``: compare a model, as it runs here or on other servers, with numbers known to be correct."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import LoadError
from gateway.golden import SAME_MODEL_COSINE, GoldenVector, compare_recorded, read, write
from gateway.types import ModelKind, Truncate

if TYPE_CHECKING:
    from gateway.engine.loading import LoadPlan
    from gateway.engine.model.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Check:
    """One measured value, and whether it is within its limit.

    Attributes:
        what: the text or task that was computed.
        quantity: ``cosine``, ``lowest cosine``, ``tokens`` or ``deviation``.
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
    """Load a model as the gateway would, and compare it with transformers' own code in float32.

    Also compare it with its golden vectors, if it has any, and Jina v3 with the published numbers.

    Raises:
        LoadError: the model cannot be loaded, or its golden file is another model's.
    """
    if entry.is_remote:
        return _verify_servers(entry)
    from gateway.engine import published  # imports torch
    from gateway.engine.loading import load_engine, load_reference, plan_load

    plan = plan_load(entry)
    # Loading would reject a model with different vectors, instead of showing the difference.
    engine = load_engine(plan, settings, checks_golden=False)
    serving = _Serving(plan, dict(zip(plan.devices, _by_device(engine.encoders, len(plan.devices)), strict=True)))
    checks = []
    if plan.checkpoint.static is None:
        reference = load_reference(plan)
        checks += _check_published(serving, reference) if entry.source == published.SOURCE else []
        checks += [_check_agreement(serving, reference, device) for device in plan.devices]
    return checks + (_check_golden(serving) if entry.golden is not None else [])


def _by_device(encoders: Sequence[Encoder], num_devices: int) -> list[Sequence[Encoder]]:
    num_streams = len(encoders) // num_devices
    return [encoders[first : first + num_streams] for first in range(0, len(encoders), num_streams)]


@dataclass(frozen=True, slots=True)
class _Serving:
    """A model as the gateway serves it.

    Attributes:
        encoders: the encoders of each device, one for each stream.
    """

    plan: LoadPlan
    encoders: Mapping[str, Sequence[Encoder]]


def _check_published(serving: _Serving, reference: Encoder) -> list[Check]:
    """Compare the published states with those of the reference, and of the serving encoder on the first device."""
    from gateway.engine import published

    plan = serving.plan
    ids = reference.tokenize([published.TEXT], None, Truncate.END)[0].ids
    number, expected = len(ids), published.NUM_TOKENS
    checks = [Check("the published text", "tokens", str(number), str(expected), number == expected)]
    adapters: dict[str | None, int] = {None: -1, **{task: i for i, task in enumerate(plan.checkpoint.adapters)}}
    served = serving.encoders[plan.device][0]
    for encoder, what, limit in (
        (reference, "published states", published.TOLERANCE),
        (served, f"published states, {served.runtime.name} in {plan.dtype}", published.SERVED_TOLERANCES[plan.dtype]),
    ):
        for task, deviation in published.largest_deviation(encoder.runtime, ids, adapters).items():
            name = f"{what}, {task or 'no adapter'}"
            checks.append(Check(name, "deviation", f"{deviation:.6f}", f"at most {limit}", deviation <= limit))
    return checks


def _check_agreement(serving: _Serving, reference: Encoder, device: str) -> Check:
    """Compare the serving encoder with transformers' own code in float32, on texts of several lengths."""
    from gateway.engine.model.agreement import MIN_COSINE, least_cosine

    plan, [encoder, *_streams] = serving.plan, serving.encoders[device]
    runtime, limit = encoder.runtime, MIN_COSINE[plan.dtype]
    is_packed = runtime.name == "torch-packed"
    cosine = least_cosine(runtime, reference.runtime, plan.checkpoint, encoder.tokenizer, is_packed=is_packed)
    what = f"{runtime.name} in {plan.dtype} on {device}, compared with torch in float32"
    return Check(what, "lowest cosine", f"{cosine:.6f}", f"at least {limit}", cosine >= limit)


def _check_golden(serving: _Serving) -> list[Check]:
    """Compare the golden vectors with those of each stream, and return the worst result for each."""
    from gateway import golden

    plan = serving.plan
    vectors = golden.read(Path(str(plan.entry.golden)), plan.checkpoint.fingerprint, plan.tasks)
    worst: dict[tuple[str | None, str], tuple[float, str]] = {}
    for device, encoders in serving.encoders.items():
        for encoder in encoders:
            embedded = encoder.embed([(vector.text, vector.task) for vector in vectors])
            for comparison in golden.compare(embedded, vectors):
                key = comparison.golden.task, comparison.golden.text
                worst[key] = min((comparison.cosine, device), worst.get(key, (2.0, "")))
    checks = []
    for (task, text), (cosine, device) in worst.items():
        where = f", worst on {device}" if len(plan.devices) > 1 else ""
        checks.append(_cosine_check(task, text, cosine, golden.MIN_COSINE[plan.dtype], where))
    return checks


def _cosine_check(task: str | None, text: str, cosine: float, limit: float, where: str = "") -> Check:
    what = f"{task or 'no task'}: {text[:32]!r}{where}"
    return Check(what, "cosine", f"{cosine:.6f}", f"at least {limit}", cosine >= limit)


async def _ask_servers(entry: ModelEntry) -> tuple[str, Sequence[GoldenVector]]:
    """Return the fingerprint of a remote model, and the vectors that all its servers return now."""
    from gateway.backends.upstream.backend import UpstreamBackend  # slow to import

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
    recorded = read(Path(entry.golden), fingerprint, {vector.task for vector in given if vector.task is not None})
    return [
        _cosine_check(comparison.golden.task, comparison.golden.text, comparison.cosine, SAME_MODEL_COSINE)
        for comparison in compare_recorded(given, recorded)
    ]
