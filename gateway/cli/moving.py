"""``gateway move`` at the command line: the first step, and those that follow it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gateway.cli.options import API_KEY_ENV, ApiKeyOption, ModelsOption
from gateway.config.files import user_folder

if TYPE_CHECKING:
    from gateway.bulk.moving.state import Move


class _Steps(TyperGroup):
    """The steps of a move; arguments that name no step run the first step."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # as click declares it
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["start", *args]
        return super().parse_args(ctx, args)


move = typer.Typer(
    name="move",
    cls=_Steps,
    help="Change the embedding model of a collection in use.\n\n`gateway move COLLECTION --from URL --to "
    "MODEL` makes a copy with the vectors of another model. The other steps update the copy, compare it, let "
    "applications use it, and undo that. `gateway move status` shows the next step.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str | None, typer.Argument(help="The move, if there are several: see `gateway move status`.")]
OldModelOption = Annotated[
    str | None,
    typer.Option("--from-model", metavar="NAME", help="The old model. By default the one in the collection's note."),
]

SkipOption = Annotated[
    bool, typer.Option("--skip", help="Leave items behind that cannot be copied, such as those without a text.")
]
ChangedAtOption = Annotated[
    str | None,
    typer.Option(metavar="FIELD", help="Field with the time of an item's last change, so that sync reads fewer items."),
]
WithoutAutoIdOption = Annotated[
    bool, typer.Option("--without-auto-id", help="Applications will give ids to new items of Milvus after the flip.")
]
MaxDeletionsOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Delete up to N items that the other collection lacks, even if these are many of its items.",
    ),
]


@move.command()
def start(  # noqa: PLR0913, PLR0917  an argument for each option
    collection: Annotated[
        str | None,
        typer.Argument(help="A collection, table or alias; or its URL, such as qdrant://localhost:6333/docs."),
    ] = None,
    store: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The store, without the collection.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="MODEL[:TASK][@DIMENSIONS]", help="The new model, named as in a request."),
    ] = None,
    mem0: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mem0's configuration, YAML or JSON, instead of COLLECTION and --from."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Field with the text, or its path. By default a usual name.")] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the new collection. By default made from the model's name and its space."
        ),
    ] = None,
    into_vector: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add a vector of this name to the items, instead of a new collection."),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="The alias, or view, that applications use; the flip moves it.")
    ] = None,
    changed_at: ChangedAtOption = None,
    without_auto_id: WithoutAutoIdOption = False,
    skip: SkipOption = False,
    url: Annotated[
        str | None,
        typer.Option(help="URL of a running gateway. By default, this process loads the model from --models."),
    ] = None,
    api_key_env: ApiKeyOption = API_KEY_ENV,
    models: ModelsOption = None,
) -> None:
    """Copy a collection into the space of another model.

    Reads the items of the collection, embeds their texts, and writes a second collection in the same store. Applications
    keep running. If it is interrupted, the same command continues where it stopped.
    """
    from gateway.bulk.moving.command import show
    from gateway.bulk.moving.planning import StartRequest
    from gateway.bulk.moving.steps import start as run
    from gateway.bulk.rows import BulkError

    if to is None:
        raise BulkError("--to is missing: name the new model, as a request would name it")
    request = StartRequest(
        collection, store, to, text, into, into_vector, alias, mem0, url, models, api_key_env, skip, changed_at
    )
    request = replace(request, without_auto_id=without_auto_id)
    show(_folder(), lambda console: run(request, _folder(), console))


@move.command()
def status(name: NameArgument = None) -> None:
    """Show the progress of moves, and the next command."""
    from gateway.bulk.moving.command import show_status

    show_status(_folder(), name)


@move.command()
def sync(
    name: NameArgument = None,
    skip: SkipOption = False,
    max_deletions: MaxDeletionsOption = 0,
    restore: Annotated[
        bool, typer.Option("--restore", help="Copy items again that the new collection had and now lacks.")
    ] = False,
) -> None:
    """Copy the changes of the old collection since the last pass."""
    from gateway.bulk.moving.command import show
    from gateway.bulk.moving.steps import sync as run

    found = _find(name)
    show(
        _folder(),
        lambda console: run(found, _folder(), console, skips=skip, max_deletions=max_deletions, restores=restore),
    )


@move.command()
def check(
    name: NameArgument = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Captured queries to search for. By default, items of the collection are the queries."
        ),
    ] = None,
    from_model: OldModelOption = None,
) -> None:
    """Compare counts, vectors and results of both collections.

    Exits 1 if the new collection is not ready.
    """
    from gateway.bulk.moving.command import show_check

    raise typer.Exit(0 if show_check(_find(name), _folder(), queries, from_model) else 1)


@move.command()
def flip(
    name: NameArgument = None,
    force: Annotated[
        bool, typer.Option("--force", help="Flip even if no check has run since the last change.")
    ] = False,
) -> None:
    """Let applications use the new collection.

    Points the alias to the new collection, or changes Mem0's configuration.
    """
    from gateway.bulk.moving.command import show
    from gateway.bulk.moving.steps import flip as run

    found = _find(name)
    show(_folder(), lambda console: run(found, _folder(), console, forces=force))


@move.command()
def back(
    name: NameArgument = None,
    from_model: OldModelOption = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave items out that cannot be copied back.")] = False,
    max_deletions: MaxDeletionsOption = 0,
) -> None:
    """Let applications use the old collection again.

    Copies everything that they wrote into the new collection in the meantime.
    """
    from gateway.bulk.moving.command import show
    from gateway.bulk.moving.steps import back as run

    found = _find(name)
    show(
        _folder(),
        lambda console: run(found, _folder(), console, from_model, skips=skip, max_deletions=max_deletions),
    )


@move.command()
def finish(
    name: NameArgument = None,
    delete_old: Annotated[
        bool, typer.Option("--delete-old", help="Delete the old collection. This cannot be undone.")
    ] = False,
    max_missing: Annotated[
        int, typer.Option(metavar="N", min=0, help="Delete although the new collection lacks up to N copied items.")
    ] = 0,
    max_mismatched: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Delete although up to N sampled items have vectors of another model."),
    ] = 0,
) -> None:
    """End the move; with --delete-old, delete the old collection."""
    from gateway.bulk.moving.command import show
    from gateway.bulk.moving.ending import Consent
    from gateway.bulk.moving.steps import finish as run

    found, consent = _find(name), Consent(max_missing, max_mismatched)
    show(_folder(), lambda console: run(found, _folder(), console, deletes=delete_old, consent=consent))


def _find(name: str | None) -> Move:
    from gateway.bulk.moving.state import find_move

    return find_move(_folder(), name)


def _folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of all moves, next to the manifests of `gateway embed`."""
    return user_folder(environ, "XDG_STATE_HOME", "~/.local/state") / "move"
