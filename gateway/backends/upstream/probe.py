"""Vectors of a few texts that a model's servers must give, all of them and always: so one that was swapped is caught."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from gateway.backends.upstream.server import Failure, Server
from gateway.backends.upstream.tasks import Tasks
from gateway.embedding import Embeddings, EmbedJob, Timings, Truncate, Vectors
from gateway.engine.golden import TEXTS, GoldenCheck, GoldenVector
from gateway.errors import LoadError, NotReachable, RequestError

MIN_COSINE = 0.999
"""What two vectors of a text must agree in to be of the same model, whatever computes them, in whatever number format."""

_PATIENCE_S = 30.0


class Probe:
    """What the servers of a model are held against.

    Args:
        vectors: for each text and task, as they were recorded or as a server gave them.
    """

    def __init__(self, model: str, tasks: Tasks, vectors: Sequence[GoldenVector]) -> None:
        self.vectors = vectors
        self._tasks = tasks
        self._check = GoldenCheck(model, vectors, MIN_COSINE)

    @property
    def width(self) -> int:
        return len(self.vectors[0].vector)

    async def compare(self, server: Server) -> str:
        """Hold a server against the probe; say what is wrong, if anything is.

        Raises:
            Failure: it does not answer.
            RequestError: it refuses the texts.
        """

        async def embed(job: EmbedJob) -> Embeddings:
            vectors = await _embed(server, self._tasks, job.texts, job.task)
            return Embeddings(vectors, [0] * len(job.texts), [], Timings(0, 0, 0))

        return await self._check.recheck(embed, _PATIENCE_S)


async def agree(model: str, tasks: Tasks, servers: Sequence[Server], recorded: Sequence[GoldenVector] | None) -> Probe:
    """Return the probe of a model: what was recorded, or else what its first server gives; all must give the same.

    A server that does not answer is shut out.

    Raises:
        NotReachable: no server gives vectors.
        LoadError: a server gives others.
    """
    probe = None if recorded is None else Probe(model, tasks, recorded)
    giver = "its golden file says"
    reasons = []
    for server in servers:
        if not server.breaker.is_closed:
            reasons.append(server.breaker.reason)
            continue
        try:
            if probe is None:
                probe, giver = Probe(model, tasks, await _take(server, tasks)), f"{server.name} gives"
            elif problem := await probe.compare(server):
                raise LoadError(f"{server.name} gives other vectors than {giver}: {problem}")
        except (Failure, RequestError, TimeoutError) as error:
            reasons.append(str(error) or f"{server.name} has not answered within {_PATIENCE_S:g} s")
            server.shut_out(reasons[-1])
    if probe is None or not any(server.breaker.is_closed for server in servers):
        raise NotReachable("; ".join(reasons))
    return probe


async def _take(server: Server, tasks: Tasks) -> list[GoldenVector]:
    """Ask a server for the vectors of all texts, without a task and with each."""
    found: list[GoldenVector] = []
    for task in (None, *tasks.instructions):
        vectors = await _embed(server, tasks, TEXTS, task)
        with np.errstate(all="ignore"):  # a vector of zeros becomes NaN
            unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(unit).all():
            raise LoadError(f"{server.name} gives a vector of zeros, which has no direction")
        found += [GoldenVector(text, task, vector) for text, vector in zip(TEXTS, unit, strict=True)]
    return found


async def _embed(server: Server, tasks: Tasks, texts: Sequence[str], task: str | None) -> Vectors:
    prepared, name = tasks.prepare(texts, task)
    deadline = time.monotonic() + _PATIENCE_S
    return (await server.embed(prepared, name, Truncate.END, deadline, is_trial=True)).vectors
