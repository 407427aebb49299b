"""The command line: parse, call, print.

A command imports what it needs inside itself, so that ``--help`` and ``check`` stay fast and need no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

if "serve" in sys.argv[1:2]:
    # First of all: what follows takes a second, in which a SIGHUP would end the process. It is taken when that serves.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    # Ctrl-C in that second ends it as well, but without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer

from gateway import __version__
from gateway.config.registry import Registry, load_registry
from gateway.config.settings import load_settings
from gateway.errors import ConfigError, StartError
from gateway.telemetry.console import is_colored

app = typer.Typer(
    name="gateway",
    help="Several embedding models behind one OpenAI-style endpoint.",
    no_args_is_help=True,
    # Plain text: a bracket in a help text is no markup.
    rich_markup_mode=None,
    # Its tracebacks show local variables, and with them API keys.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    from gateway.telemetry.logs import configure_logs

    _open_standard_streams()
    # To standard error, as standard output is for results. `serve` then does as its settings say.
    configure_logs("warning", "console")
    app()


def _open_standard_streams() -> None:
    """Put /dev/null where the process was started without a standard stream.

    Its number would go to the next thing that is opened, a socket say, and every warning be written there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  as long as the process


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
    models: Annotated[
        Path | None, typer.Option(help="The models to serve. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
) -> None:
    """Serve the models over HTTP.

    All settings are environment variables, GATEWAY_*: docs/configuration.md lists them.
    """
    from gateway.config.otel import read_trace_settings
    from gateway.telemetry import trace_export
    from gateway.telemetry.logs import configure_logs, flush_logs

    try:
        settings = load_settings(os.environ, host=host, port=port, models=models)
        registry = load_registry(settings.models, os.environ)
        trace_settings = read_trace_settings(os.environ)
    except ConfigError as error:
        _fail(error)
    # After the check: the web framework reads OTEL_PROPAGATORS when it is imported.
    from gateway.cli.tables import print_serving
    from gateway.deployment import Deployment
    from gateway.server import leave_stuck_threads
    from gateway.server import serve as serve_http

    configure_logs(settings.log_level, settings.log_format)
    deployment = Deployment(registry, settings, read_registry=lambda: load_registry(settings.models, os.environ))
    try:
        with trace_export.sending(trace_settings):
            serve_http(deployment, lambda addresses, has_keys: print_serving(deployment, addresses, has_keys=has_keys))
    except StartError as error:
        flush_logs()
        _fail(error)
    flush_logs()
    leave_stuck_threads()


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(help="The file to check. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
    locked: Annotated[
        bool,
        typer.Option(
            "--locked",
            help="Also read the checkpoints on this machine, and fail when a name would get another space than in "
            "models.lock.json.",
        ),
    ] = False,
) -> None:
    """Check models.yaml and the API keys.

    Prints every problem with its line and column, and exits 1 if there is one.
    """
    path, registry = _read_registry(file)
    _check_keys(registry)
    what = "checkpoints, "
    if locked:
        from gateway.cli.lock import check_lock

        try:
            absent = check_lock(registry)
        except StartError as error:
            _fail(error)
        what = f"the checkpoints of {', '.join(absent)}, which are not on this machine; " if absent else ""
    typer.echo(f"{path}: ok, {_summary(registry)}")
    typer.echo(f"Not looked at: {what}devices and memory (see `gateway models`), and other servers.")


def _check_keys(registry: Registry) -> None:
    from gateway.config.api_keys import load_key_file, unknown_models

    try:
        keys = load_settings(os.environ).api_keys_file
        found = unknown_models(load_key_file(keys, os.environ), registry.names()) if keys else []
    except ConfigError as error:
        _fail(error)
    if found:
        _fail(StartError("\n".join(f"{keys}: {problem}" for problem in found)))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="What the client is called in logs and metrics.")],
    file: Annotated[
        Path | None,
        typer.Option(help="File of API keys to add the entry to; made if it is not there. Without it, it is printed."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Models, aliases and experiments that it may use, comma-separated. By default all."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="By default GATEWAY_REQUESTS_PER_MINUTE.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="By default GATEWAY_TOKENS_PER_MINUTE.")] = None,
    expires: Annotated[str | None, typer.Option(help="When the key stops working, such as 2027-01-01.")] = None,
) -> None:
    """Make an API key.

    Its entry, without the key itself, is for the file that GATEWAY_API_KEYS_FILE names. The key is shown this once.
    """
    from gateway.access.keyring import key_digest, make_key
    from gateway.config.api_keys import add_key, entry_lines, make_entry

    made = make_key()
    try:
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
    except StartError as error:
        _fail(error)
    typer.echo(f"The key, for the client; it is not stored and not shown again:\n{made}", err=True)
    if file is None:
        typer.echo("\nIts entry, for `keys:` in the file of API keys (--file FILE adds it):", err=True)
        typer.echo(entry_lines(entry), nl=False)
    else:
        typer.echo(f"\n{file}: {name} added", err=True)


@app.command()
def lock(
    file: Annotated[
        Path | None, typer.Argument(help="The file to lock. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
) -> None:
    """Write models.lock.json.

    It holds the weights and the spaces of every name, for `gateway check --locked`, and lies next to models.yaml.
    """
    from gateway.cli.lock import CheckpointInfos, check_rules, lock_path, make_lock, read_lock, write_lock

    _path, registry = _read_registry(file)
    target = lock_path(registry)
    try:
        infos = CheckpointInfos()
        made = make_lock(registry, read_lock(target), infos.describe)
        check_rules(registry, infos)
        write_lock(target, made)
    except StartError as error:
        _fail(error)
    typer.echo(f"{target}: {_count(len(made.models), 'model', 'models')}")
    for name, model in made.models.items():
        if model.fingerprint is None:
            typer.echo(f"{name}: its checkpoint is not on this machine; the lock holds its source and revision only")


@app.command()
def models(
    file: Annotated[
        Path | None, typer.Argument(help="The file to read. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
) -> None:
    """List what would load here.

    Each model: where, how, in how much memory, and what would be downloaded for it. Loads and downloads nothing. Exits 1
    if a model that is enabled would not load, or the models would not be served together.
    """
    from gateway.cli.tables import make_plans, print_plans

    _path, registry = _read_registry(file)
    plans = make_plans(registry)
    print_plans(plans)
    raise typer.Exit(0 if plans.is_sound else 1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Id of a model of models.yaml.")],
    models: Annotated[
        Path | None, typer.Option(help="The file of models. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Store the model's golden vectors, computed in float32, in its `golden` file."),
    ] = False,
) -> None:
    """Check that a model is computed right.

    Compares it with its golden vectors, and with published numbers where there are any; exits 1 where they differ.
    """
    from gateway.cli.tables import print_checks
    from gateway.cli.verify import record_golden
    from gateway.cli.verify import verify as verify_model

    path, registry = _read_registry(models)
    try:
        entry = registry.model(model)
    except KeyError:
        _fail(StartError(f"{path}: no model {model!r}; there are: {', '.join(entry.id for entry in registry.models)}"))
    try:
        if record:
            if entry.golden is None:
                _fail(StartError(f"{path}: set `golden: golden/{model}.json` for {model} to say where to store them"))
            typer.echo(f"{entry.golden}: {record_golden(entry, Path(entry.golden))} golden vectors")
            return
        checks = verify_model(entry, load_settings(os.environ))
    except StartError as error:
        _fail(error)
    if not checks:
        _fail(
            StartError(
                f"{model}: nothing to check: set `golden` in models.yaml and run `gateway verify {model} --record`"
            )
        )
    print_checks(model, checks)
    raise typer.Exit(0 if all(check.is_passed for check in checks) else 1)


@app.command()
def compare(  # noqa: PLR0913, PLR0917  an argument for each option
    arms: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="What to compare, the baseline first; MODEL@256 for a smaller size."),
    ],
    data: Annotated[Path, typer.Option(help="Folder with corpus.jsonl, queries.jsonl and, if there are any, qrels/.")],
    split: Annotated[str | None, typer.Option(help="Which file of qrels/. By default test, or the only one.")] = None,
    url: Annotated[str | None, typer.Option(help="A running gateway. By default the models are loaded here.")] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the key for the gateway.")
    ] = "EMBEDDINGS_API_KEY",
    models: Annotated[
        Path | None, typer.Option(help="The file of models, without --url. By default GATEWAY_MODELS, or models.yaml.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. By default comparison-TIME.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep vectors in. By default ~/.cache/embedding-gateway/compare.")
    ] = None,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Compare on a sample: all judged documents, and others up to this number.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For everything that is drawn at random.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="How many, for intervals and p-values.")] = 10_000,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Whether to measure latency and throughput.")] = True,
) -> None:
    """Compare models on your own texts.

    Quality, difference and cost, as a table, JSON, run files and a page with plots.
    """
    try:
        from gateway.compare.command import OwnModels, RunningGateway, default_cache, run_comparison
        from gateway.compare.comparison import CompareRequest
    except ModuleNotFoundError as error:
        _fail(StartError(f"{error.name} is not installed: pip install 'embedding-gateway[compare]'"))
    request = CompareRequest(
        arms=arms,
        data=data,
        cache=cache or default_cache(os.environ),
        split=split,
        max_documents=max_documents,
        seed=seed,
        num_resamples=resamples,
        measures_cost=cost,
    )
    try:
        if url is not None:
            run_comparison(request, RunningGateway(url, os.environ.get(api_key_env)), out)
        else:
            settings = load_settings(os.environ, models=models)
            run_comparison(request, OwnModels(load_registry(settings.models, os.environ), settings), out)
    except StartError as error:
        _fail(error)


@app.command()
def experiments(
    experiment: Annotated[
        str | None, typer.Argument(metavar="ID", help="Which experiment to show. By default all are listed.")
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Only with --exposures: more exposure logs.")
    ] = None,
    url: Annotated[str, typer.Option(help="The gateway to ask.")] = "http://127.0.0.1:8000",
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the key for the gateway.")
    ] = "EMBEDDINGS_API_KEY",
    exposures: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Ask no gateway; count the units in these exposure logs, together."),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="models.yaml with the weights, for --exposures. By default GATEWAY_MODELS, or models.yaml."),
    ] = None,
) -> None:
    """Show how an experiment is going.

    Its arms side by side: requests, latency, errors, and whether the split is as it should be.
    """
    from gateway.cli.experiments import (
        ask_evidence,
        ask_experiments,
        print_evidence,
        print_experiments,
        read_evidence,
    )

    if files and not exposures:
        _fail(StartError(f"one experiment is shown at a time, got also: {', '.join(map(str, files))}"))
    if exposures and experiment is None:
        _fail(StartError("--exposures: name the experiment first: gateway experiments ID --exposures FILE..."))
    api_key = os.environ.get(api_key_env)
    try:
        if experiment is None:
            print_experiments(ask_experiments(url, api_key))
        elif exposures:
            registry = _read_registry(models)[1]
            print_evidence(read_evidence(registry, experiment, [*exposures, *(files or ())]), has_requests=False)
        else:
            print_evidence(ask_evidence(url, experiment, api_key))
    except StartError as error:
        _fail(error)


def _read_registry(file: Path | None) -> tuple[Path, Registry]:
    try:
        path = file or load_settings(os.environ).models
        return path, load_registry(path, os.environ)
    except ConfigError as error:
        _fail(error)


def _fail(error: StartError) -> NoReturn:
    typer.secho(str(error), fg="red" if is_colored(sys.stderr) else None, err=True)
    raise typer.Exit(1)


def _summary(registry: Registry) -> str:
    parts = [_count(len(registry.models), "model", "models"), _count(len(registry.aliases), "alias", "aliases")]
    parts += [_count(len(registry.experiments), "experiment", "experiments")] if registry.experiments else []
    return ", ".join(parts)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
