"""The protocol between the service and whatever runs a model."""

from __future__ import annotations

from typing import Protocol

from gateway.embedding import Embeddings, EmbedJob, ModelInfo


class Backend(Protocol):
    """Something that runs one model."""

    async def start(self) -> ModelInfo:
        """Load the model, warm it up, and return what it is.

        Raises:
            LoadError: the model cannot be served; the message says why.
        """

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job.

        Raises:
            RequestError: the job was refused or failed; one of the classes in ``gateway.errors``.
        """

    async def stop(self) -> None:
        """Stop; whoever still waits gets an error. Does nothing when the backend is not running."""
