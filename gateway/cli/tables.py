"""Tables for a terminal: the models that are served, and those that would load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from gateway.backends.enabled import load_order, why_disabled
from gateway.cli.console import make_console, make_table, say
from gateway.cli.verify import Check
from gateway.config.registry import Arm, ModelEntry, Registry
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import LicenseNotAccepted, LoadError
from gateway.fleet import Model
from gateway.routing.rules import broken_rules
from gateway.server import Addresses
from gateway.types import ModelInfo, ModelKind, ModelState

if TYPE_CHECKING:
    from gateway.engine.forecast import Forecast, Forecaster

_STYLES = {ModelState.READY: "green", ModelState.UNLOADED: "cyan", ModelState.FAILED: "red", ModelState.DISABLED: "dim"}
_KEY_PLACEHOLDER = "YOUR_KEY"


def print_serving(deployment: Deployment, addresses: Addresses, *, has_keys: bool) -> None:
    """Print the state of each model, the other names, and a command that tries a ready model."""
    console = make_console()
    console.print()
    table = make_table("model", "state", "space, or why not", has_header=False)
    for model in deployment.fleet:
        state = Text(model.state.value, style=_STYLES.get(model.state, ""))
        table.add_row(model.id, state, "\n".join(_described(model)))
    console.print(table)
    console.print()
    names = make_table("what", "names", has_header=False)
    for what, lines in _configured(deployment, addresses, has_keys=has_keys):
        names.add_row(what, "\n".join(lines))
    console.print(names)
    ready = next((model for model in deployment.fleet if model.takes_requests), None)
    if ready is None:
        say(console, "No model is ready; requests are answered with 503.", "red")
        return
    url = addresses.clients
    say(console, f"\nServing on {url}, documentation at {url}/docs\n")
    console.print(_curl(url, ready, has_keys=has_keys), soft_wrap=True)


# The request to try first, by the kind of the model.
_TRIED = {
    ModelKind.EMBED: ("embeddings", '"input": "Hello, world"'),
    ModelKind.RERANK: ("rerank", '"query": "a greeting", "documents": ["Hello, world"]'),
    ModelKind.CLASSIFY: ("classify", '"input": "Hello, world"'),
}


def _described(model: Model) -> Iterator[str]:
    info = model.info
    if info is None or model.state in {ModelState.FAILED, ModelState.DISABLED}:
        yield model.reason
        return
    has_cache = model.cache is not None and info.kind is ModelKind.EMBED
    yield ", ".join(
        [*_run(info), *(["on demand"] if model.entry.is_on_demand else []), *(["cache"] if has_cache else [])]
    )
    yield _space(info)
    yield from info.notes


def _run(info: ModelInfo) -> list[str]:
    """Return a model's device, precision, runtime, dimensions and longest input."""
    width = [f"{info.width} dimensions" if info.width else " and ".join(info.outputs)]
    width = width if info.kind is ModelKind.EMBED else []
    return [info.device, info.dtype, runtime(info), *width, f"{info.max_tokens} tokens"]


def runtime(info: ModelInfo) -> str:
    """Return the name of the runtime, without the name of the engine."""
    return info.engine.removeprefix("infinity/")


def _space(info: ModelInfo) -> str:
    match info.kind:
        case ModelKind.EMBED:
            return info.space()
        case ModelKind.RERANK:
            return "no space: it reranks"
        case ModelKind.CLASSIFY:
            return f"no space: it classifies ({cut(', '.join(info.labels))})"


def _configured(deployment: Deployment, addresses: Addresses, *, has_keys: bool) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the other parts of the registry and the settings, each with its lines."""
    registry, settings = deployment.registry, deployment.settings
    if registry.aliases:
        yield "aliases", [f"{alias.name} → {_target(alias.model, alias.task)}" for alias in registry.aliases.values()]
    if registry.experiments:
        yield (
            "experiments",
            [
                f"{experiment.id} ({experiment.kind}): {', '.join(map(_arm, experiment.arms))}"
                for experiment in registry.experiments
            ],
        )
    if registry.shadows:
        yield "shadows", [f"{100 * shadow.sample:g}% of {shadow.of} → {shadow.to}" for shadow in registry.shadows]
    if registry.fallbacks:
        yield "fallbacks", [f"{model} → {', '.join(others)}" for model, others in registry.fallbacks.items()]
    if addresses.admin:
        yield "admin", [f"{addresses.admin} (/metrics, /admin)"]
    if settings.console != "off":
        yield "console", [f"{addresses.clients if settings.is_console_for_clients else addresses.admin}/console"]
    yield "API keys", ["required" if has_keys else "none: anyone who reaches the port may use it"]


def _target(model: str, task: str | None) -> str:
    return f"{model}:{task}" if task else model


def _arm(arm: Arm) -> str:
    target = _target(arm.model, arm.task)
    return f"{arm.label} {arm.weight:g}" + ("" if arm.label == target else f" ({target})")


def _curl(base_url: str, model: Model, *, has_keys: bool) -> str:
    path, fields = _TRIED[ModelKind.EMBED if model.info is None else model.info.kind]
    key = [f"-H 'authorization: Bearer {_KEY_PLACEHOLDER}'"] if has_keys else []
    parts = [
        f"  curl {base_url}/v1/{path}",
        *key,
        "-H 'content-type: application/json'",
        f"""-d '{{"model": "{model.id}", {fields}}}'\n""",
    ]
    return " \\\n    ".join(parts)


def print_checks(model: str, checks: Sequence[Check]) -> None:
    """Print the checks of a model, one table per quantity, and the verdict."""
    console = make_console()
    for quantity, group in groupby(checks, key=lambda check: check.quantity):
        table = make_table("compared", quantity, "limit", "")
        for check in group:
            verdict = Text("ok", style="green") if check.is_passed else Text("off", style="red")
            table.add_row(check.what, check.measured, check.limit, verdict)
        console.print(table)
    num_failed = sum(not check.is_passed for check in checks)
    if num_failed:
        say(console, f"{model}: {num_failed} of {len(checks)} checks failed", "red")
    else:
        say(console, f"{model}: pass", "green")


# ------------------------------------------------------------------------------------------------ what would load


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one model: whether it would load, and how.

    Attributes:
        verdict: ``yes``, ``on demand``, ``no``, ``off``, ``elsewhere``, or ``after a download``.
        lines: a description of how the model would run, or the reason why it would not load.
        info: the info of the model, if its checkpoint could be read.
        forecast: the device, precision and memory, if the model would load.
    """

    model: str
    verdict: str
    lines: Sequence[str]
    info: ModelInfo | None = None
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans of all models for this machine, the broken rules between the models, and further notes."""

    models: Sequence[Plan]
    broken: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def is_sound(self) -> bool:
        """Whether all enabled models would load, and may be served together."""
        return not self.broken and all(plan.verdict != "no" for plan in self.models)

    def get(self, model_id: str) -> Plan | None:
        """Return the plan of a model."""
        return next((plan for plan in self.models if plan.model == model_id), None)


def make_plans(registry: Registry) -> Plans:
    """Plan each model in turn. Loads and downloads nothing."""
    made = {entry.id: plan for entry in registry.models if (plan := _certain_plan(entry)) is not None}
    notes: list[str] = []
    if len(made) < len(registry.models):
        from gateway.engine.forecast import Forecaster  # imports torch, which takes seconds

        forecaster = Forecaster()
        for entry in load_order([entry for entry in registry.models if entry.id not in made]):
            made[entry.id] = _plan(entry, forecaster)
        notes += _notes(forecaster)
    plans = Plans([made[entry.id] for entry in registry.models], ())
    return Plans(plans.models, broken_rules(registry, plans), notes)


def _notes(forecaster: Forecaster) -> Iterator[str]:
    from gateway.engine.memory import format_bytes

    for device, (need, free) in forecaster.excesses().items():
        yield (
            f"The models that are loaded on demand need {format_bytes(need)} together on {device}, and {format_bytes(free)} "
            "are free for them: they do not all fit at once, so they take turns."
        )


def _certain_plan(entry: ModelEntry) -> Plan | None:
    """Return the plan of a model that would not load here, if that is known without reading a checkpoint."""
    from gateway.engine.checkpoint.sources import require_present

    if reason := why_disabled(entry):
        return Plan(entry.id, "off", [reason])
    if entry.upstream is not None:
        return Plan(entry.id, "elsewhere", [", ".join(entry.upstream.urls), "not asked"])
    try:
        require_present(entry)
    except LoadError as error:
        return Plan(entry.id, "no", [str(error)])
    return None


def _plan(entry: ModelEntry, forecaster: Forecaster) -> Plan:
    from gateway.engine.memory import format_bytes

    try:
        forecast = forecaster.forecast(entry)
    except LicenseNotAccepted as error:
        return Plan(entry.id, "off", [str(error)])
    except LoadError as error:
        return Plan(entry.id, "no", [str(error)])
    verdict = "on demand" if entry.is_on_demand else "yes"
    verdict = verdict if forecast.info else "after a download"
    lines = list(describe_forecast(forecast))
    if entry.cache is not None:
        lines.append(f"cache: up to {format_bytes(entry.cache.max_bytes)} of memory in addition")
    return Plan(entry.id, verdict, lines, forecast.info, forecast)


def describe_forecast(forecast: Forecast) -> Iterator[str]:
    """Yield lines about how a model would run, its download and its memory."""
    from gateway.engine.memory import format_bytes

    if forecast.info is not None:
        yield ", ".join(_run(forecast.info))
    else:
        yield ", ".join([*forecast.devices, forecast.dtype, forecast.runtime])
        yield _download(forecast)
    yield from forecast.notes
    if (memory := forecast.memory) is None:
        yield "memory: known after the download"
        return
    total, weights, batch = map(format_bytes, (memory.total_bytes, memory.weights_bytes, memory.batch_bytes))
    is_rough = "" if forecast.info else "about "
    card = f", {format_bytes(memory.card_bytes)} for CUDA itself" if memory.card_bytes else ""
    yield f"memory: {is_rough}{total} ({weights} weights, {batch} for the largest batch{card})"


def _download(forecast: Forecast) -> str:
    from gateway.engine.checkpoint.hub import format_size

    licensed = f", license {forecast.license}" if forecast.license else ""
    if forecast.download_bytes is None:
        return f"download: of unknown size{licensed}; {forecast.download_note}"
    size = format_size(forecast.download_bytes)
    if forecast.download_note:
        return f"download: about {size}{licensed}; {forecast.download_note}"
    return f"download: {size}{licensed}"


_VERDICT_STYLES = {"yes": "green", "on demand": "cyan", "after a download": "yellow", "no": "red"}


def print_plans(plans: Plans) -> None:
    """Print the plans, and the broken rules."""
    console = make_console()
    table = make_table("model", "loads", "how, or why not", has_header=False)
    for plan in plans.models:
        style = _VERDICT_STYLES.get(plan.verdict, "dim")
        table.add_row(plan.model, Text(plan.verdict, style=style), "\n".join(plan.lines))
    console.print(table)
    for note in plans.notes:
        say(console, note)
    for problem in plans.broken:
        say(console, problem, "red")
