"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelsOption = Annotated[
    Path | None,
    typer.Option("--models", metavar="FILE", help="File of models. By default GATEWAY_MODELS, or models.yaml."),
]
ApiKeyOption = Annotated[str, typer.Option(help="Environment variable with the API key for the gateway.")]

API_KEY_ENV = "EMBEDDINGS_API_KEY"
"""The default variable of ``ApiKeyOption``."""
