"""The protocol between the service and a model's backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

Report: TypeAlias = Callable[[ModelState, str], None]
"""Takes a model's new state, and the reason for it."""


def unreported(_state: ModelState, _reason: str) -> None:
    """Ignore the states of a model."""


class Backend(Protocol):
    """Runs one model."""

    async def plan(self, report: Report = unreported) -> ModelInfo:
        """Return the model's info without loading the model; it is also used if loading fails.

        Args:
            report: called on the event loop while the checkpoint is downloaded.

        Raises:
            LoadError: the info cannot be determined; the message says why.
        """

    async def start(self, report: Report) -> ModelInfo:
        """Load the model, warm it up, and return its info.

        Args:
            report: called on the event loop whenever the state of the model changes later.

        Raises:
            LoadError: the model cannot be served; the message says why.
        """

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job.

        Raises:
            RequestError: the job was rejected or failed; one of the classes in ``gateway.errors``.
        """

    async def vocabulary(self) -> Vocabulary:
        """Return the model's tokens.

        Raises:
            ModelNotReady: the model is not loaded.
            UnsupportedOutput: this backend does not have them.
        """

    async def stop(self) -> None:
        """Stop; waiting requests get an error. Does nothing if the backend is not running.

        A backend that was stopped can be started again.
        """


@dataclass(frozen=True, slots=True)
class Replica:
    """A server, or a process of a cluster, that runs a model together with others.

    Attributes:
        name: the name in the metrics.
        reason: the reason why it gets no requests; empty while it gets some.
        node: the machine, if known.
        device: its graphics card, if known.
    """

    name: str
    state: ModelState
    reason: str = ""
    node: str | None = None
    device: str | None = None


@runtime_checkable
class Replicated(Protocol):
    """A backend whose model runs in several places."""

    def replicas(self) -> Sequence[Replica]:
        """Return all replicas, in a stable order."""


@runtime_checkable
class Scraped(Protocol):
    """A backend whose model runs in other processes, which Prometheus cannot discover itself."""

    async def replica_metrics(self) -> Mapping[str, str]:
        """Return the metrics of each replica that answers, in Prometheus' text format."""

    def count_replicas(self) -> tuple[int, int]:
        """Return the number of replicas that accept jobs, and the smallest number that there should be."""


@runtime_checkable
class Removable(Protocol):
    """A backend with resources elsewhere that outlive this process."""

    async def remove(self) -> None:
        """Stop, and remove these resources, unless another gateway uses them."""


@runtime_checkable
class Waiting(Protocol):
    """A backend whose model may fit into memory later, when another program ends."""

    async def may_fit(self) -> bool:
        """Return whether loading the model again is worth a try."""
