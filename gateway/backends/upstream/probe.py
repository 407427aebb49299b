"""Vectors of a few texts that all servers of a model must always return, so that a swapped model is noticed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from gateway.backends.upstream.answers import Answer
from gateway.backends.upstream.failures import Failure, TooLarge, listed
from gateway.backends.upstream.server import Server
from gateway.backends.upstream.tasks import Tasks
from gateway.errors import LoadError, NotReachable, RequestError
from gateway.golden import SAME_MODEL_COSINE, TEXTS, GoldenCheck, GoldenVector, golden_vectors
from gateway.types import Embeddings, EmbedJob, Timings, Truncate, Vectors
from gateway.vectors import cosine

# The server's own time limit ends a slow request sooner.
_PATIENCE_S = 3600.0


class Probe:
    """The vectors that the servers of a model must return.

    Args:
        vectors: a vector for each text and task, recorded or taken from a server.
    """

    def __init__(self, model: str, tasks: Tasks, vectors: Sequence[GoldenVector]) -> None:
        self.vectors = vectors
        self._tasks = tasks
        self._check = GoldenCheck(model, vectors, SAME_MODEL_COSINE)

    @property
    def width(self) -> int:
        return len(self.vectors[0].vector)

    async def compare(self, server: Server) -> str:
        """Compare a server's vectors with the probe; return a description of the problem, or an empty string.

        A server that was shut out may have changed, so its quirks are learned again first.

        Raises:
            Failure: it does not answer.
            TooLarge: it does not take the texts together.
            RequestError: it refuses the texts.
        """
        if server.quirks is None or not server.breaker.is_closed:
            await server.learn()

        async def embed(job: EmbedJob) -> Embeddings:
            answer = await _embed(server, self._tasks, job.texts, job.task)
            return Embeddings(answer.vectors, [0] * len(job.texts), [], Timings(0, 0, 0))

        return await self._check.recheck(embed, _PATIENCE_S)


async def take_probe(
    model: str,
    tasks: Tasks,
    servers: Sequence[Server],
    recorded: Sequence[GoldenVector] | None,
    unresolved: Sequence[str] = (),
) -> Probe:
    """Return a model's probe: the recorded vectors, or its first server's, which all servers must return.

    A server that does not answer is shut out. Once a server has answered, the remaining addresses of a name are left to
    the watch: checking a hundred would take long, and a wrong server must not keep the others from serving.

    Args:
        unresolved: the reasons why names of servers have no address.

    Raises:
        NotReachable: no server returns vectors.
        LoadError: a server returns different vectors, or the same vectors for different tasks.
    """
    probe = None if recorded is None else Probe(model, tasks, recorded)
    giver = "its golden file says"
    if recorded is not None and (problem := _ignored_tasks(tasks, _by_task(recorded))):
        raise LoadError(f"its golden file was recorded from a server that {problem}")
    reasons = [*unresolved]
    has_one = False
    for server in servers:
        if not server.breaker.is_closed:
            reasons.append(server.breaker.reason)
            continue
        if has_one and server.is_found:
            server.hold()
            continue
        try:
            if probe is None:
                probe, giver = Probe(model, tasks, await _take(server, tasks)), f"{server.name} gives"
            elif problem := await probe.compare(server):
                wrong = f"{server.name} gives different vectors than {giver}: {problem}"
                if not server.is_found:
                    raise LoadError(wrong)
                reasons.append(wrong)
                server.shut_out(wrong)
                continue
            has_one = True
        except (Failure, TooLarge, RequestError) as error:
            reasons.append(str(error))
            server.shut_out(str(error), is_refusing=isinstance(error, Failure) and error.outcome == "refused")
    if probe is None or not any(server.breaker.is_closed for server in servers):
        raise NotReachable(listed(reasons))
    return probe


async def _take(server: Server, tasks: Tasks) -> list[GoldenVector]:
    """Ask a server for the vectors of all texts, without a task and with each task.

    Raises:
        Failure: it does not answer.
        RequestError: it refuses the texts.
        LoadError: it does not distinguish the tasks or the texts.
    """
    await server.learn()
    taken: list[GoldenVector] = []
    by_task: dict[str | None, Vectors] = {}
    for task in (None, *tasks.instructions):
        answer = await _embed(server, tasks, TEXTS, task)
        by_task[task] = answer.vectors
        if task is None:
            await _check_texts(server, tasks, answer.vectors)
        taken += golden_vectors(TEXTS, task, answer.vectors)
    if problem := _ignored_tasks(tasks, by_task):
        raise LoadError(f"{server.name} {problem}")
    return taken


async def _check_texts(server: Server, tasks: Tasks, vectors: Vectors) -> None:
    """Check that each vector belongs to its text, by requesting the vector of each text alone.

    If the order or ``index`` of the vectors differed from that of the texts, texts would silently get the wrong
    vectors.
    """
    if all(cosine(one, other) >= SAME_MODEL_COSINE for one, other in combinations(vectors, 2)):
        raise LoadError(f"{server.name} gives the same vector for every text")
    for text, vector in zip(TEXTS, vectors, strict=True):
        alone = (await _embed(server, tasks, [text], None)).vectors[0]
        if cosine(alone, vector) < SAME_MODEL_COSINE:
            raise LoadError(
                f"{server.name} returns a different vector for {text[:40]!r} alone than among several texts: its "
                "vectors are not in the order of the texts, or differ from request to request"
            )


def _ignored_tasks(tasks: Tasks, by_task: dict[str | None, Vectors]) -> str:
    """Return a message about tasks that a server treats alike although their names differ there, or an empty string.

    Tasks whose vectors differ in width cannot belong to one model.
    """
    if len(widths := sorted({vectors.shape[1] for vectors in by_task.values()})) > 1:
        return f"gives vectors of {' and '.join(map(str, widths))} dimensions for different tasks"
    by_name = {name: by_task[task] for task, name in tasks.names.items() if task in by_task}
    pairs = list(combinations(by_name, 2))
    for one, other in pairs:
        if _is_same(by_name[one], by_name[other]):
            return (
                f"gives the same vectors for the tasks {one!r} and {other!r}, sent as `{tasks.field}`: it ignores that "
                "field, or does not know these names. Set `upstream.task_field` to the field that it reads; if the two are "
                "one task there, give them one name in `upstream.tasks`"
            )
    if not pairs and by_name and None in by_task:
        [name] = by_name
        if _is_same(by_name[name], by_task[None]):
            return (
                f"gives the same vectors with the task {name!r}, sent as `{tasks.field}`, and without a task: it ignores "
                "that field, or does not know this name. Set `upstream.task_field` to the field that it reads, or leave "
                "`upstream.tasks` out"
            )
    return ""


def _by_task(recorded: Sequence[GoldenVector]) -> dict[str | None, Vectors]:
    tasks = dict.fromkeys(golden.task for golden in recorded)
    return {task: np.stack([golden.vector for golden in recorded if golden.task == task]) for task in tasks}


def _is_same(one: Vectors, other: Vectors) -> bool:
    # A golden file that was shortened has fewer texts for one of its tasks.
    return all(cosine(a, b) >= SAME_MODEL_COSINE for a, b in zip(one, other, strict=False))


async def _embed(server: Server, tasks: Tasks, texts: Sequence[str], task: str | None) -> Answer:
    prepared, name = tasks.prepare(texts, task)
    return await server.embed(prepared, name, Truncate.END, time.monotonic() + _PATIENCE_S, is_trial=True)
