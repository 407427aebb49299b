"""The command line: parse, call, print.

Each command imports its dependencies inside its function, so that ``--help`` and ``check`` stay fast and need no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

if "serve" in sys.argv[1:2]:
    # Before the imports below, which take a second: a SIGHUP in that second would end the process. Blocked, it stays
    # pending until the server takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    # Ctrl-C still ends the process in that second, but without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer
from typer.core import TyperGroup

from gateway import __version__
from gateway.cli.clustering import cluster as cluster_commands
from gateway.cli.comparing import compare, judge_check
from gateway.cli.embedding import embed
from gateway.cli.experimenting import experiments
from gateway.cli.moving import move
from gateway.cli.options import ModelsOption
from gateway.cli.streams import open_standard_streams
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.config.settings import load_settings
from gateway.config.wording import count
from gateway.errors import StartError


class _Commands(TyperGroup):
    """The commands, with a single exit for the errors that end a command."""

    def invoke(self, ctx: Any) -> Any:  # as click declares it
        try:
            return super().invoke(ctx)
        except StartError as error:
            from gateway.cli.console import print_error

            print_error(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="gateway",
    cls=_Commands,
    help="Several embedding models behind one OpenAI-style endpoint.",
    no_args_is_help=True,
    # Help texts are plain: brackets in them are not markup.
    rich_markup_mode=None,
    # Typer's own tracebacks show local variables, API keys among them.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    from gateway.telemetry.logs import configure_logs

    open_standard_streams()
    # Logs go to standard error, since standard output is for results. `serve` configures them again from its settings.
    configure_logs("warning", "console")
    app()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"gateway {__version__}")
        raise typer.Exit


@app.callback()
def _gateway(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. By default GATEWAY_HOST, or 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. By default GATEWAY_PORT, or 8000.")] = None,
    models: ModelsOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|HOST:PORT",
            help="Run the models as replicas on a Ray cluster. By default GATEWAY_CLUSTER, or in this process.",
        ),
    ] = None,
) -> None:
    """Serve the models over HTTP.

    All settings are environment variables, GATEWAY_*; docs/configuration.md lists them. Exits 0 after a signal, 1 if the
    start fails, and 75 if a graphics card is lost; start it again after a 75.
    """
    from gateway.config.otel import read_trace_settings
    from gateway.telemetry import trace_export
    from gateway.telemetry.logs import configure_logs, flush_logs

    settings = load_settings(os.environ, host=host, port=port, models=models, cluster=cluster)
    registry = load_registry(settings.models, os.environ)
    trace_settings = read_trace_settings(os.environ)
    # Only after the checks, because OTEL_PROPAGATORS is read on import.
    from gateway.cli.tables import print_serving
    from gateway.deployment import Deployment
    from gateway.server import leave
    from gateway.server import serve as serve_http

    configure_logs(settings.log_level, settings.log_format)
    deployment = Deployment(registry, settings, read_registry=lambda: load_registry(settings.models, os.environ))
    try:
        with trace_export.sending(trace_settings):
            serve_http(deployment, lambda addresses, has_keys: print_serving(deployment, addresses, has_keys=has_keys))
    finally:
        flush_logs()
    leave(deployment)


@app.command()
def check(
    models: ModelsOption = None,
    locked: Annotated[
        bool,
        typer.Option(
            "--locked",
            help="Also read the checkpoints on this machine, and fail if the space of a name would differ from "
            "models.lock.json.",
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also print the aliases and experiments that differ from this older file."),
    ] = None,
) -> None:
    """Check models.yaml and the API keys.

    Prints every problem with its line and column, and exits 1 if there is one.
    """
    path, registry = _read_registry(models)
    _check_keys(registry)
    _check_captures(registry)
    if against is not None:
        _print_changes(load_registry(against, os.environ), registry)
    unchecked = "checkpoints, "
    if locked:
        from gateway.cli.lock import check_lock

        absent = check_lock(registry)
        unchecked = f"the checkpoints of {', '.join(absent)}, which are not on this machine; " if absent else ""
    typer.echo(f"{path}: ok, {_summary(registry)}")
    typer.echo(f"Not checked: {unchecked}devices and memory (see `gateway models`), and other servers.")


def _print_changes(old: Registry, new: Registry) -> None:
    from gateway.routing.changes import changed_aliases, changed_experiments

    changes = changed_aliases(old, new) | changed_experiments(old, new)
    for name, change in changes.items():
        typer.echo(f"{name}: {change}")
    if not changes:
        typer.echo(f"aliases and experiments as in {old.path}")


def _check_captures(registry: Registry) -> None:
    if not registry.captures():
        return
    from gateway.capture.captures import scrub_problems

    if problems := scrub_problems(registry):
        raise StartError("\n".join(f"{registry.path}: {problem}" for problem in problems))


def _check_keys(registry: Registry) -> None:
    from gateway.config.api_keys import load_key_file, unknown_models

    keys = load_settings(os.environ).api_keys_file
    problems = unknown_models(load_key_file(keys, os.environ), registry.names()) if keys else []
    if problems:
        raise StartError("\n".join(f"{keys}: {problem}" for problem in problems))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="The client's name in logs and metrics.")],
    file: Annotated[
        Path | None,
        typer.Option(help="File to add the entry to; created if missing. By default, the entry is printed."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Models, aliases and experiments that the client may use, comma-separated. By default all."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Quota of requests. By default GATEWAY_REQUESTS_PER_MINUTE.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Quota of tokens. By default GATEWAY_TOKENS_PER_MINUTE.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="Date when the key stops working, such as 2027-01-01.")] = None,
) -> None:
    """Create an API key.

    Shows the key once. The entry contains only a hash of the key, and belongs in the file that GATEWAY_API_KEYS_FILE names.
    """
    from gateway.access.keyring import key_digest, make_key
    from gateway.config.api_keys import add_key, entry_lines, make_entry

    made = make_key()
    entry = make_entry(
        name=name,
        sha256=key_digest(made),
        models=None if models is None else tuple(model.strip() for model in models.split(",")),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        expires=expires,
    )
    if file is not None:
        add_key(file, entry, os.environ)
    typer.echo(f"Give this key to the client. It is not stored, and is not shown again:\n{made}", err=True)
    if file is None:
        typer.echo("\nAdd this entry to `keys:` in the file of API keys (--file FILE does it for you):", err=True)
        typer.echo(entry_lines(entry), nl=False)
    else:
        typer.echo(f"\n{file}: {name} added", err=True)


@app.command()
def lock(models: ModelsOption = None) -> None:
    """Write models.lock.json.

    The lock, next to models.yaml, records the weights and spaces of every name, for `gateway check --locked`.
    """
    from gateway.cli.lock import CheckpointInfos, check_rules, lock_path, make_lock, read_lock, write_lock

    _path, registry = _read_registry(models)
    target = lock_path(registry)
    infos = CheckpointInfos()
    made = make_lock(registry, read_lock(target), infos.read)
    check_rules(registry, infos)
    write_lock(target, made)
    typer.echo(f"{target}: {count(len(made.models), 'model', 'models')}")
    for name, model in made.models.items():
        if model.fingerprint is None:
            typer.echo(f"{name}: the checkpoint is not on this machine; the lock has only its source and revision")


@app.command()
def models(models: ModelsOption = None) -> None:
    """List the models that would load on this machine.

    Shows the device, precision, memory and download size of each model. Loads and downloads nothing. Exits 1 if an enabled
    model would not load, or the models could not be served together.
    """
    from gateway.cli.tables import make_plans, print_plans

    _path, registry = _read_registry(models)
    plans = make_plans(registry)
    print_plans(plans)
    raise typer.Exit(0 if plans.is_sound else 1)


@app.command()
def doctor(
    models: ModelsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, and recommend what to do.

    Checks the card and its driver, torch, memory, disk, ports, the model hub, models.yaml, and for each model its download,
    license and memory. Loads and downloads nothing. Exits 1 if a problem needs your attention.
    """
    from gateway.doctor.command import diagnose

    raise typer.Exit(0 if diagnose(models, as_json=as_json) else 1)


@app.command()
def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Ids of models. By default all models that would load on this machine."
        ),
    ] = None,
    models: ModelsOption = None,
) -> None:
    """Download the files of models from the hub.

    Downloads the files that the gateway reads. Resumes an interrupted download. HF_ENDPOINT sets a mirror, HF_TOKEN a
    token, HTTPS_PROXY a proxy, HF_HOME the folder. Then `HF_HUB_OFFLINE=1 gateway serve` needs no network.
    """
    from gateway.cli.download import download as fetch

    _path, registry = _read_registry(models)
    entries = [_read_entry(models, name)[1] for name in names or ()]
    raise typer.Exit(0 if fetch(registry, entries) else 1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Id of a model in models.yaml.")],
    models: ModelsOption = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Store the model's golden vectors, computed in float32, in its `golden` file."),
    ] = False,
) -> None:
    """Check that a model is computed correctly.

    Compares the vectors that the gateway would serve with transformers' own code in float32, with the golden vectors, and
    with published numbers if the model has any. Exits 1 if they differ.
    """
    from gateway.cli.tables import print_checks
    from gateway.cli.verify import record_golden
    from gateway.cli.verify import verify as verify_model

    registry, entry = _read_entry(models, model)
    if record:
        if entry.golden is None:
            raise StartError(
                f"{registry.path}: {model} has no file for golden vectors: set `golden: golden/{model}.json`"
            )
        typer.echo(f"{entry.golden}: {record_golden(entry, Path(entry.golden))} golden vectors")
        return
    checks = verify_model(entry, load_settings(os.environ))
    if not checks:
        raise StartError(
            f"{model}: nothing to check: set `golden` in models.yaml and run `gateway verify {model} --record`"
        )
    print_checks(model, checks)
    raise typer.Exit(0 if all(check.is_passed for check in checks) else 1)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Id of a model in models.yaml.")],
    texts: Annotated[
        Path, typer.Option(help="File of texts, one per line, or of JSON lines in the form of a corpus.jsonl.")
    ],
    models: ModelsOption = None,
    max_texts: Annotated[int, typer.Option(min=2, help="Maximum number of texts; more are sampled.")] = 10_000,
) -> None:
    """Measure the ranges of int8 vectors on your texts."""
    from gateway.compare.calibration import calibrate as measure

    typer.echo(measure(*_read_entry(models, model), load_settings(os.environ), texts, max_texts))


app.command()(compare)


app.command()(judge_check)


app.command()(embed)


app.add_typer(move)


app.command()(experiments)


app.add_typer(cluster_commands)


def _read_registry(models: Path | None) -> tuple[Path, Registry]:
    path = models or load_settings(os.environ).models
    return path, load_registry(path, os.environ)


def _read_entry(models: Path | None, model: str) -> tuple[Registry, ModelEntry]:
    path, registry = _read_registry(models)
    try:
        return registry, registry.model(model)
    except KeyError:
        known = ", ".join(entry.id for entry in registry.models)
        raise StartError(f"{path}: no model {model!r}; known: {known}") from None


def _summary(registry: Registry) -> str:
    parts = [count(len(registry.models), "model"), count(len(registry.aliases), "alias", "aliases")]
    parts += [count(len(registry.experiments), "experiment")] if registry.experiments else []
    return ", ".join(parts)
