"""``gateway compare`` at the command line: its options, and the request made from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gateway.cli.models import models_at
from gateway.cli.options import API_KEY_ENV, ApiKeyOption, ModelsOption
from gateway.errors import StartError

if TYPE_CHECKING:
    from gateway.compare.judge.judging import JudgeRequest

ArmsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Models to compare, the baseline first. Variants: MODEL@256, MODEL@256:binary, MODEL+sparse, MODEL+hybrid.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="Name of the file in qrels/. By default test, or the only file there.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(help="URL of a running gateway. By default, this process loads the models from --models."),
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Folder that caches vectors. By default ~/.cache/embedding-gateway/compare.")
]
MaxDocumentsOption = Annotated[
    int | None, typer.Option(min=1, help="Compare on a sample: all judged documents, and others up to this number.")
]
MarginOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Largest difference in nDCG@10 that does not matter. Choose it before you see results."
    ),
]
JudgedOption = Annotated[
    Path | None, typer.Option(help="More judgments: a completed to_judge.tsv of an earlier comparison.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="OpenAI-style API of a chat model that grades the documents that the arms find."),
]
JudgeModelOption = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the chat model at that API.")]
JudgeKeyOption = Annotated[str, typer.Option(metavar="VARIABLE", help="Environment variable with the key for --judge.")]
JudgeBudgetOption = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS", min=1, help="Maximum price. Up to it, the judge runs without asking you; then it stops."
    ),
]
JudgeCheckOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A judge_check.tsv that people have completed.")
]
QueriesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Captured queries, instead of queries.jsonl. Without a date in the name, the files of all days.",
    ),
]
ProgressOption = Annotated[
    Literal["auto", "json"],
    typer.Option(help="`json`: write the progress to standard error as lines of JSON, for another program to show."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Accept the price of the judge without being asked.")]


def compare(  # noqa: PLR0913, PLR0917  an argument for each option
    arms: ArmsArgument,
    data: Annotated[Path, typer.Option(help="Folder with corpus.jsonl, queries.jsonl and, with judgments, qrels/.")],
    queries: QueriesOption = None,
    split: SplitOption = None,
    url: UrlOption = None,
    api_key_env: ApiKeyOption = API_KEY_ENV,
    models: ModelsOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. By default comparison-TIME.")] = None,
    cache: CacheOption = None,
    max_documents: MaxDocumentsOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random draws.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Number of random draws for p-values.")] = 100_000,
    margin: MarginOption = 0.01,
    judged: JudgedOption = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Whether to measure latency and throughput.")] = True,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    judge_key_env: JudgeKeyOption = "JUDGE_API_KEY",
    judge_budget: JudgeBudgetOption = None,
    judge_check: JudgeCheckOption = None,
    yes: YesOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Compare models on your own texts.

    Reports quality, differences and cost as tables, JSON, run files, and a page with plots.
    """
    try:
        from gateway.compare.command import default_cache, run_comparison
        from gateway.compare.comparison import CompareRequest
        from gateway.compare.judge.command import make_judging
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed: pip install 'embedding-gateway[compare]'") from error
    cache = cache or default_cache(os.environ)
    request = CompareRequest(
        arms=arms,
        data=data,
        cache=cache,
        split=split,
        max_documents=max_documents,
        seed=seed,
        num_resamples=resamples,
        measures_cost=cost,
        margin=margin,
        judged=judged,
        queries=queries,
    )
    judging = None
    if wanted := _judge_request(judge, judge_model, judge_key_env, cache, judge_check, judge_budget):
        judging = make_judging(wanted, is_agreed=yes, asks_program=progress == "json")
    gateway = models_at(url, api_key_env, models)
    run_comparison(request, gateway, out, judging, is_progress_json=progress == "json")


def judge_check(
    folder: Annotated[Path, typer.Argument(help="Folder with the results of `gateway compare --judge`.")],
) -> None:
    """Compute the verdict of a judge with people's grades.

    Needs neither the models nor the judge: it reads the files of the comparison, and replaces judge.json and report.html.
    """
    try:
        from gateway.cli.console import make_console
        from gateway.compare.judge.recheck import check_again
        from gateway.compare.judge.sentences import print_report
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed: pip install 'embedding-gateway[compare]'") from error
    console = make_console()
    report, written = check_again(folder)
    print_report(report, console)
    for line in ("\nWritten:", *(f"  {path}" for path in written)):
        console.print(line, soft_wrap=True)


def _judge_request(
    url: str | None, model: str | None, key_env: str, cache: Path, check: Path | None, max_tokens: int | None
) -> JudgeRequest | None:
    from gateway.compare.judge.judging import JudgeRequest

    if url is not None and model is not None:
        return JudgeRequest(url, model, os.environ.get(key_env), cache / "judge", check, max_tokens)
    if url is not None or model is not None:
        raise StartError(
            "--judge and --judge-model belong together: set both the URL of the API and a model's name there"
        )
    if check is not None:
        raise StartError(
            "--judge-check needs --judge and --judge-model: name the judge whose grades people have checked"
        )
    return None
