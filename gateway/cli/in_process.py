"""A gateway inside this process, for commands that work without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpx

from gateway.app import create_app
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import BadInput, ModelNotFound, StartError
from gateway.routing.names import GATEWAY, Names
from gateway.types import ModelState

PATIENCE_S = 86_400.0
"""Seconds that a request may take."""

_LOADED_NOW = {"enabled": True, "load": "eager", "idle_unload_s": None, "cache": None}


@asynccontextmanager
async def in_process_client(
    registry: Registry, settings: Settings, names: Iterable[str]
) -> AsyncIterator[httpx.AsyncClient]:
    """Load the models with these names, and yield a client for them; see :func:`in_process_deployment`."""
    async with in_process_deployment(registry, settings, names) as deployment:
        transport = httpx.ASGITransport(create_app(deployment))
        async with httpx.AsyncClient(transport=transport, base_url="http://in-process", timeout=None) as client:  # noqa: S113
            yield client


@asynccontextmanager
async def in_process_deployment(
    registry: Registry, settings: Settings, names: Iterable[str]
) -> AsyncIterator[Deployment]:
    """Load the models with these names, even if the registry disables them, and yield their deployment.

    Raises:
        StartError: a name is unknown or an experiment's, or its model cannot be loaded.
    """
    # In process, requests need no key, experiments are not logged, and texts may take as long as they need.
    changes = {"api_keys": (), "exposure_log": None, "request_timeout_s": PATIENCE_S}
    settings = settings.model_copy(update=changes)
    deployment = Deployment(_narrowed(registry, names), settings)
    try:
        await deployment.fleet.start()
        for model in deployment.fleet:
            if model.state is not ModelState.READY:
                raise StartError(f"{model.id}: {model.reason}")
        yield deployment
    finally:
        await deployment.stop()


def _narrowed(registry: Registry, names: Iterable[str]) -> Registry:
    """Return the registry with only the models of these names, and their aliases.

    Nothing is captured: the texts of a command are not those of users, and a running gateway may write the files.
    """
    known = Names(registry)
    wanted = set()
    for name in names:
        try:
            found = known.find(name, GATEWAY)
        except (ModelNotFound, BadInput) as error:
            raise StartError(f"{registry.path}: {error.message}") from error
        if found.experiment is not None:
            raise StartError(f"{name} is an experiment, which uses several models: name those")
        wanted.add(found.model)
    return registry.model_copy(
        update={
            "models": tuple(entry.model_copy(update=_LOADED_NOW) for entry in registry.models if entry.id in wanted),
            "aliases": {
                name: alias.model_copy(update={"capture": None})
                for name, alias in registry.aliases.items()
                if alias.model in wanted
            },
            "experiments": (),
            "shadows": (),
            "fallbacks": {},
        }
    )
