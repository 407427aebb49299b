"""The protocol between the service and whatever runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

Report: TypeAlias = Callable[[ModelState, str], None]
"""Takes a model's new state, and the reason for it."""


class Backend(Protocol):
    """Something that runs one model."""

    async def plan(self) -> ModelInfo:
        """Find out what the model is, without loading it: also of use when loading fails.

        Raises:
            LoadError: that cannot be known; the message says why.
        """

    async def start(self, report: Report) -> ModelInfo:
        """Load the model, warm it up, and return what it is.

        Args:
            report: called on the event loop whenever the state of the model changes later on.

        Raises:
            LoadError: the model cannot be served; the message says why.
        """

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job.

        Raises:
            RequestError: the job was refused or failed; one of the classes in ``gateway.errors``.
        """

    def vocabulary(self) -> Vocabulary:
        """Return the model's tokens.

        Raises:
            ModelNotReady: the model is not loaded.
            UnsupportedOutput: this backend cannot tell them.
        """

    async def stop(self) -> None:
        """Stop; whoever still waits gets an error. Does nothing when the backend is not running."""
