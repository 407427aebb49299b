"""Tables for people at a terminal: what is served, and what would be."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gateway.backends.fleet import Fleet, Model, why_disabled
from gateway.config.registry import Registry
from gateway.embedding import ModelInfo, ModelKind, ModelState
from gateway.errors import LoadError
from gateway.routing.spaces import space_id
from gateway.verification import Check

_STYLES = {ModelState.READY: "green", ModelState.FAILED: "red", ModelState.DISABLED: "dim"}
# Wide enough for a line of the table where the output is no terminal.
_PIPE_WIDTH = 160


def print_fleet(fleet: Fleet, base_url: str) -> None:
    """Print what each model has become, and a command to try the first one that is ready."""
    table = Table("model", "state", "device", "dtype", "width", "max tokens", "space, or why not")
    for model in fleet:
        state = f"[{_STYLES.get(model.state, 'default')}]{model.state.value}"
        info = model.info
        columns = _describe(info) if info else ("", "", "", "", model.reason)
        table.add_row(model.id, state, *columns)
    console = _console()
    console.print(table)
    ready = next((model for model in fleet if model.state is ModelState.READY), None)
    if ready is None:
        console.print("[red]No model is ready; requests are answered with 503.")
        return
    console.print(f"Serving on {base_url}, documentation at {base_url}/docs. Try:\n", highlight=False)
    console.print(_curl(base_url, ready), highlight=False, markup=False, soft_wrap=True)


def _describe(info: ModelInfo) -> tuple[str, ...]:
    if info.kind is ModelKind.RERANK:
        return info.device, info.dtype, "", str(info.max_tokens), "none: reranks"
    space = space_id(info, info.default_task, info.width, is_normalised=info.is_normalised)
    return info.device, info.dtype, str(info.width), str(info.max_tokens), space


def _curl(base_url: str, model: Model) -> str:
    is_reranker = model.info is not None and model.info.kind is ModelKind.RERANK
    path = "rerank" if is_reranker else "embeddings"
    asked = '"query": "a greeting", "documents": ["Hello, world"]' if is_reranker else '"input": "Hello, world"'
    return (
        f"  curl {base_url}/v1/{path} -H 'content-type: application/json' "
        f"""-d '{{"model": "{model.id}", {asked}}}'\n"""
    )


def print_plan(registry: Registry) -> None:
    """Print what would load on this machine, one model after the other. Loads and downloads nothing."""
    from gateway.engine.devices import available_bytes  # imports torch
    from gateway.engine.loading import plan_load
    from gateway.engine.memory import format_bytes, require_memory

    table = Table("model", "loads", "device", "dtype", "width", "max tokens", "weights", "largest batch", "total")
    free: dict[str, int] = {}
    for entry in registry.models:
        if reason := why_disabled(entry):
            table.add_row(entry.id, f"[dim]no: {reason}")
            continue
        try:
            plan = plan_load(entry, may_download=False)
            for device in plan.devices:
                free.setdefault(device, available_bytes(device))
                require_memory(plan.memory, free[device], device)
                free[device] -= plan.memory.total_bytes
        except LoadError as error:
            table.add_row(entry.id, f"[red]no: {error}")
            continue
        memory = plan.memory
        sizes = (memory.weights_bytes, memory.batch_bytes, memory.total_bytes)
        table.add_row(entry.id, "[green]yes", *_describe(plan.info)[:4], *(format_bytes(size) for size in sizes))
    _console().print(table)


def print_checks(model: str, checks: Sequence[Check]) -> None:
    """Print each comparison of a verification, and the verdict."""
    table = Table("compared", "measured", "limit", "")
    for check in checks:
        table.add_row(check.what, check.measured, check.limit, "[green]ok" if check.is_passed else "[red]off")
    console = _console()
    console.print(table)
    num_failed = sum(not check.is_passed for check in checks)
    console.print(f"[red]{model}: {num_failed} of {len(checks)} are off" if num_failed else f"[green]{model}: pass")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)
