"""``gateway cluster`` at the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.errors import StartError

ClusterOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT", help="The Ray cluster. By default GATEWAY_CLUSTER, or this machine's cluster."
    ),
]

cluster = typer.Typer(
    name="cluster", help="Show or remove models on a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)


@cluster.command()
def status(cluster: ClusterOption = None) -> None:
    """List the models on the cluster.

    Shows the replicas of each model, with their nodes, cards and work.
    """
    from gateway.cluster.environment import prepare

    prepare(_checked(cluster))
    from gateway.cluster.command import address_of, run_status

    for line in run_status(address_of(cluster)):
        typer.echo(line)


@cluster.command()
def prune(cluster: ClusterOption = None) -> None:
    """Remove models that no gateway uses.

    Running gateways do so after five minutes. Models remain when all gateways have ended.
    """
    from gateway.cluster.environment import prepare

    prepare(_checked(cluster))
    from gateway.cluster.command import address_of, run_prune

    for line in run_prune(address_of(cluster)):
        typer.echo(line)


def _checked(address: str | None) -> str:
    if address == "local":
        raise StartError(
            "the cluster is `local`: it belongs to the gateway that started it, and other commands cannot "
            "reach it; set `auto` or HOST:PORT"
        )
    return address or "auto"
