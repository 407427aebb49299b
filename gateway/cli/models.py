"""The models that a command uses: those of a running gateway, or of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gateway.config.registry import Registry, load_registry
from gateway.config.settings import Settings, load_settings


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway to ask over HTTP."""

    url: str
    api_key: str | None


@dataclass(frozen=True, slots=True)
class OwnModels:
    """Models to load in this process."""

    registry: Registry
    settings: Settings


def models_at(
    url: str | None, api_key_env: str, models: Path | None, cluster: str | None = None
) -> RunningGateway | OwnModels:
    """Return the models of the gateway at a URL; without a URL, those of a registry.

    Args:
        api_key_env: the environment variable with the gateway's API key.
        models: the registry's file; ``None`` for the settings' own.
        cluster: the Ray cluster that runs the models; ``None`` for the settings' own.

    Raises:
        ConfigError: the settings or the registry cannot be used.
    """
    if url is not None:
        return RunningGateway(url, os.environ.get(api_key_env))
    settings = load_settings(os.environ, models=models, cluster=cluster)
    return OwnModels(load_registry(settings.models, os.environ), settings)
