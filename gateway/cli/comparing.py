"""``gateway compare`` at the command line: its options, and the request that they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.options import API_KEY_ENV, ApiKeyOption, ModelsOption
from gateway.config.registry import load_registry
from gateway.config.settings import load_settings
from gateway.errors import StartError


def compare(  # noqa: PLR0913, PLR0917  an argument for each option
    arms: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models, baseline first; MODEL@256, MODEL:int8, MODEL@256:binary."),
    ],
    data: Annotated[Path, typer.Option(help="Folder with corpus.jsonl, queries.jsonl and, with judgments, qrels/.")],
    split: Annotated[
        str | None, typer.Option(help="The file of qrels/ to use. By default test, or the only one.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running gateway. By default the models are loaded here, from --models.")
    ] = None,
    api_key_env: ApiKeyOption = API_KEY_ENV,
    models: ModelsOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. By default comparison-TIME.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep vectors in. By default ~/.cache/embedding-gateway/compare.")
    ] = None,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Compare on a sample: all judged documents, and others up to this number.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For all random draws.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="How many signs to draw for p-values.")] = 100_000,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="A difference in nDCG@10 that does not matter; fix it before you look.")
    ] = 0.01,
    judged: Annotated[
        Path | None, typer.Option(help="More judgments: a filled-in to_judge.tsv of an earlier comparison.")
    ] = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Whether to measure latency and throughput.")] = True,
) -> None:
    """Compare models on your own texts.

    Reports quality, differences and cost as tables, JSON, run files, and a page with plots.
    """
    try:
        from gateway.compare.command import OwnModels, RunningGateway, default_cache, run_comparison
        from gateway.compare.comparison import CompareRequest
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed: pip install 'embedding-gateway[compare]'") from error
    request = CompareRequest(
        arms=arms,
        data=data,
        cache=cache or default_cache(os.environ),
        split=split,
        max_documents=max_documents,
        seed=seed,
        num_resamples=resamples,
        measures_cost=cost,
        margin=margin,
        judged=judged,
    )
    if url is not None:
        run_comparison(request, RunningGateway(url, os.environ.get(api_key_env)), out)
    else:
        settings = load_settings(os.environ, models=models)
        run_comparison(request, OwnModels(load_registry(settings.models, os.environ), settings), out)
