"""``gateway embed`` at the command line: its options, and the request made from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.models import models_at
from gateway.cli.options import API_KEY_ENV, ApiKeyOption, ModelsOption
from gateway.config.files import user_folder

if TYPE_CHECKING:
    from gateway.bulk.chunking import Chunking


class _OnError(StrEnum):
    STOP = "stop"
    SKIP = "skip"


class _Truncate(StrEnum):
    END = "end"
    START = "start"
    REFUSE = "refuse"


SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Files (.jsonl, .csv, .tsv, .parquet), folders, patterns, URLs such as s3://bucket/*.parquet, or one "
        "collection of a store, such as qdrant://localhost:6333/docs.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME[:TASK][@DIMENSIONS]", help="The model, named as in a request.")
]
ToOption = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="SINK",
        help="A folder for Parquet files (for JSON lines if its name ends in .jsonl), or a collection of a store.",
    ),
]
OutputsOption = Annotated[
    str | None, typer.Option(metavar="NAMES", help="dense, sparse, multivector, comma-separated. By default dense.")
]
IdOption = Annotated[
    str | None, typer.Option("--id", help="Field with the id. By default id or _id, if one of them exists.")
]
TextOption = Annotated[str | None, typer.Option(help="Field with the text, or its path. By default text or content.")]
TitleOption = Annotated[str | None, typer.Option(help="Field to put before the text.")]
PayloadOption = Annotated[
    str | None, typer.Option(metavar="FIELDS", help="Other fields to keep, comma-separated, or none. By default all.")
]
StoreTextOption = Annotated[bool, typer.Option("--store-text/--no-store-text", help="Whether to keep the text.")]
TruncateOption = Annotated[_Truncate, typer.Option(help="How to treat a text that is too long for the model.")]
ChunkOption = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Maximum size of a chunk in tokens of the model, including instruction and special tokens. "
        "By default, texts are not cut into chunks.",
    ),
]
OverlapOption = Annotated[
    int, typer.Option(metavar="TOKENS", min=0, help="Number of tokens that a chunk shares with the previous one.")
]
LateOption = Annotated[bool, typer.Option("--late", help="Embed the chunks of a document together (late chunking).")]
RepeatTitleOption = Annotated[bool, typer.Option("--repeat-title", help="Put the title before each chunk.")]
OnErrorOption = Annotated[_OnError, typer.Option(help="How to treat a row that cannot be embedded.")]
ErrorsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="List of skipped rows. By default next to the manifest.")
]
ManifestOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File that records the progress. By default in the folder of --to, and for stores in "
        "~/.local/state/embedding-gateway.",
    ),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Start over: forget an earlier job, and delete the files it wrote to --to.")
]
MaxMissingOption = Annotated[
    int,
    typer.Option(
        metavar="NUMBER", min=0, help="Number of the job's rows that applications may have deleted from the store."
    ),
]
AdoptOption = Annotated[
    bool, typer.Option("--adopt", help="Accept an existing collection. Use this only if its vectors are this model's.")
]
ShardOption = Annotated[int, typer.Option(min=1, help="Maximum number of rows per file, and between two commits.")]
UrlOption = Annotated[
    str | None, typer.Option(help="URL of a running gateway. By default, this process loads the model from --models.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        metavar="local|auto|HOST:PORT",
        help="Embed on the replicas of a Ray cluster, which may serve requests at the same time. "
        "By default GATEWAY_CLUSTER, or this process.",
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(metavar="PRICE", min=0, help="Price of this machine per hour, for the cost in the report."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def embed(  # noqa: PLR0913, PLR0917  an argument for each option
    sources: SourcesArgument,
    model: ModelOption,
    to: ToOption,
    outputs: OutputsOption = None,
    id_field: IdOption = None,
    text: TextOption = None,
    title: TitleOption = None,
    payload: PayloadOption = None,
    store_text: StoreTextOption = True,
    truncate: TruncateOption = _Truncate.END,
    chunk: ChunkOption = None,
    overlap: OverlapOption = 0,
    late: LateOption = False,
    repeat_title: RepeatTitleOption = False,
    on_error: OnErrorOption = _OnError.STOP,
    errors: ErrorsOption = None,
    url: UrlOption = None,
    api_key_env: ApiKeyOption = API_KEY_ENV,
    models: ModelsOption = None,
    cluster: ClusterOption = None,
    manifest: ManifestOption = None,
    restart: RestartOption = False,
    max_missing: MaxMissingOption = 0,
    adopt: AdoptOption = False,
    shard_rows: ShardOption = 8192,
    price_per_hour: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed a corpus, each row exactly once.

    Reads and writes files or a store. If it is interrupted, the same command continues where it stopped. For a model with
    tasks, uses the task of documents (retrieval.passage) unless --model names another.
    """
    from gateway.bulk.command import EmbedRequest, run_embed
    from gateway.bulk.fields import FieldNames
    from gateway.bulk.model_spec import read_spec
    from gateway.types import Truncate

    request = EmbedRequest(
        sources=sources,
        sink=to,
        spec=read_spec(model, outputs, Truncate(truncate.value), _chunking(chunk, overlap, late, repeat_title)),
        names=FieldNames(id_field, text, title, _fields(payload)),
        state_folder=_state_folder(os.environ),
        manifest=manifest,
        errors=errors,
        on_error=on_error.value,
        shard_rows=shard_rows,
        keeps_text=store_text,
        adopts=adopt,
        restarts=restart,
        max_missing=max_missing,
        price_per_hour=price_per_hour,
    )
    gateway = models_at(url, api_key_env, models, cluster)
    raise typer.Exit(run_embed(request, gateway, as_json=as_json))


def _fields(text: str | None) -> tuple[str, ...] | None:
    """Return the fields of the payload; ``None`` for all."""
    if text is None:
        return None
    fields = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if fields == ("none",) else fields


def _chunking(tokens: int | None, overlap: int, is_late: bool, repeats_title: bool) -> Chunking | None:
    from gateway.bulk.chunking import Chunking
    from gateway.bulk.rows import BulkError

    if tokens is not None:
        return Chunking(tokens, overlap, is_late, repeats_title)
    if overlap or is_late or repeats_title:
        raise BulkError("--overlap, --late and --repeat-title are for chunks: set their size with --chunk TOKENS")
    return None


def _state_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder for manifests of jobs that write into stores."""
    return user_folder(environ, "XDG_STATE_HOME", "~/.local/state") / "embed"
