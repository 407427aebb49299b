"""``gateway experiments`` at the command line: its options, and the sources of its figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.options import API_KEY_ENV, ApiKeyOption, ModelsOption
from gateway.config.registry import load_registry
from gateway.config.settings import load_settings
from gateway.errors import StartError


def experiments(
    experiment: Annotated[
        str | None, typer.Argument(metavar="ID", help="The experiment to show. By default, lists all experiments.")
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Only with --exposures: more exposure logs.")
    ] = None,
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    api_key_env: ApiKeyOption = API_KEY_ENV,
    exposures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Read the units from these exposure logs, or units, requests and outcomes from the files "
            "experiments.sqlite3 of several gateways (GATEWAY_STATE_DIR), instead of asking a gateway. --models gives the "
            "weights.",
        ),
    ] = None,
    outcomes: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="With --exposures: compare the arms by the outcomes in this CSV file, with the columns unit and value, "
            "and optionally name, of, id, before, time. May be repeated.",
        ),
    ] = None,
    models: ModelsOption = None,
) -> None:
    """Show the current figures of an experiment.

    Shows the arms side by side: requests, latency, errors, whether the split of units matches the weights, and which arm
    has the better outcomes.
    """
    from gateway.cli.experiment_report import (
        ask_evidence,
        ask_experiments,
        print_evidence,
        print_experiments,
        read_evidence,
    )

    if files and not exposures:
        raise StartError(f"only one experiment can be shown at a time, but got also {', '.join(map(str, files))}")
    if outcomes and not exposures:
        raise StartError("--outcomes needs the exposures of the units: add --exposures FILE...")
    if exposures and experiment is None:
        raise StartError("--exposures needs an experiment: gateway experiments ID --exposures FILE...")
    api_key = os.environ.get(api_key_env)
    if experiment is None:
        print_experiments(ask_experiments(url, api_key))
    elif exposures:
        registry = load_registry(models or load_settings(os.environ).models, os.environ)
        found = read_evidence(registry, experiment, [*exposures, *(files or ())], outcomes or ())
        print_evidence(found, is_of_files=True)
    else:
        print_evidence(ask_evidence(url, experiment, api_key))
