"""The troubles of a gateway, each with its next step, as pure functions from figures to sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Literal

from gateway.api.live import ErrorCard, LiveCard, LiveModel, ShadowCard
from gateway.config.wording import count
from gateway.console.words import percent, read_time, sentence, size
from gateway.experiments.report import ExperimentReport

_RECENT = timedelta(hours=1)
# A few refusals are normal for a full queue.
_MANY_REFUSALS = 20
_FULL_CARD = 0.95
_MANY_DROPPED = 0.1


@dataclass(frozen=True, slots=True)
class Trouble:
    """A problem that needs a person.

    Attributes:
        level: ``bad`` if it causes refused requests, else ``warn``.
        subject: the name with which the title begins.
        text: the facts.
        step: the next step.
        link: a console page with details, without the console's root.
        line: a line to copy; may be empty.
        can_reload: whether a reload of the registry may help.
    """

    level: Literal["bad", "warn"]
    subject: str
    title: str
    text: str
    step: str = ""
    link: str = ""
    line: str = ""
    can_reload: bool = False


def find_troubles(
    models: Sequence[LiveModel],
    cards: Sequence[LiveCard],
    experiments: Sequence[ExperimentReport],
    shadows: Sequence[ShadowCard],
    errors: Sequence[ErrorCard],
    processes: Mapping[str, str] = MappingProxyType({}),
    now: datetime | None = None,
) -> list[Trouble]:
    """Return the troubles; those that cause refused requests come first.

    Args:
        processes: the other processes on each card, by device, if the reader may see them.
    """
    since = (now or datetime.now(UTC)) - _RECENT
    troubles = [
        *_model_troubles(models),
        *(trouble for error in errors if (trouble := _error_trouble(error, since))),
        *(trouble for report in experiments if (trouble := _experiment_trouble(report))),
        *(trouble for shadow in shadows if (trouble := _shadow_trouble(shadow))),
        *(trouble for card in cards if (trouble := _card_trouble(card, processes.get(card.device, "")))),
    ]
    return sorted(troubles, key=lambda trouble: trouble.level == "warn")


def _model_troubles(models: Sequence[LiveModel]) -> Iterator[Trouble]:
    for model in models:
        if model.state == "failed":
            yield Trouble(
                "bad",
                model.id,
                "does not answer",
                sentence(model.reason or "it failed"),
                "Fix the cause, then reload models.yaml: the gateway loads the model again.",
                can_reload=True,
            )
        elif model.state == "recovering":
            yield Trouble("bad", model.id, "is being reloaded", sentence(model.reason or "it hung or failed"))
        elif _drifts(model):
            yield Trouble(
                "bad",
                model.id,
                "returns wrong vectors",
                f"Its lowest cosine to a golden vector is {model.golden_cosine:.5f}; the limit is {model.golden_limit:.5f}.",
                "The gateway reloads the model. If the vectors stay wrong, the weights or the device are faulty.",
                line=f"gateway verify {model.id}",
            )


def _drifts(model: LiveModel) -> bool:
    cosine, limit = model.golden_cosine, model.golden_limit
    return cosine is not None and limit is not None and cosine < limit


def _error_trouble(error: ErrorCard, since: datetime) -> Trouble | None:
    """Return a trouble for recurring refusals, and for faults of the gateway or its models."""
    is_fault, is_refusal = error.status >= 500, error.status == 429
    if read_time(error.last) < since or not (is_fault or (is_refusal and error.number >= _MANY_REFUSALS)):
        return None
    times = "once" if error.number == 1 else f"{error.number:,} times"
    text = f"{sentence(error.message or error.code)} The last request was {error.request_id}, from {error.client}."
    steps = {
        "rate_limit_exceeded": "Raise the limit of this key, or let the client wait for `Retry-After`.",
        "overloaded": "Let the client send fewer requests at once, or give its key a quota.",
        "memory_full": "Let clients send fewer texts per request, or raise GATEWAY_MEMORY_BUDGET_BYTES.",
        "internal_error": "The log has a traceback under this request id.",
    }
    return Trouble(
        "warn",
        error.model or error.path,
        f"answered {error.status} {error.code} {times}",
        text,
        steps.get(error.code, ""),
    )


def _experiment_trouble(report: ExperimentReport) -> Trouble | None:
    link = f"/experiments/{report.id}"
    if report.mismatch:
        ratio = report.sample_ratio if report.sample_ratio.mismatch else report.request_ratio or report.sample_ratio
        return Trouble(
            "warn",
            report.id,
            "loses units of an arm",
            sentence(ratio.verdict),
            "No comparison of its arms can be trusted until the cause is found.",
            link,
        )
    if report.warnings:
        return Trouble(
            "warn", report.id, "has figures that say little", " ".join(map(sentence, report.warnings)), "", link
        )
    return None


def _shadow_trouble(shadow: ShadowCard) -> Trouble | None:
    num_all, num_dropped = sum(shadow.outcomes.values()), shadow.outcomes.get("dropped", 0)
    if num_dropped <= _MANY_DROPPED * num_all:
        return None
    return Trouble(
        "warn",
        shadow.to,
        f"is too slow for its copies of {shadow.of}",
        f"{count(num_dropped, 'copy', 'copies')} of {num_all:,} were dropped ({percent(num_dropped / num_all)}).",
        f"Lower `sample`, which is {shadow.sample:g}.",
    )


def _card_trouble(card: LiveCard, processes: str) -> Trouble | None:
    if not card.total_bytes or not card.used_bytes or card.used_bytes <= _FULL_CARD * card.total_bytes:
        return None
    others = card.used_bytes - (card.allocated_bytes or 0)
    return Trouble(
        "warn",
        card.device,
        "is nearly full",
        f"{size(card.total_bytes - card.used_bytes)} of {size(card.total_bytes)} are free; "
        f"{size(others)} are not tensors of this process" + (f", but of {processes}." if processes else "."),
        "End other processes on the card, or give a model another `device`.",
    )
