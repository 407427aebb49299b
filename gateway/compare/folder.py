"""The folder of a comparison's results: of one process at a time, and never that of another comparison."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson

from gateway.compare.arms import parse_arms
from gateway.compare.comparison import CompareRequest
from gateway.compare.dataset import Dataset
from gateway.compare.judge.outputs import REPORT_FILE
from gateway.compare.outputs import PAGE, RESULTS, RUNS
from gateway.comparisons.runs import MAX_RESULTS_BYTES
from gateway.config.files import read_bounded
from gateway.errors import CompareError

# As `write_whole` names them.
_HALF = re.compile(r"\..+\.(json|jsonl|trec|tsv|html)\.[0-9a-f]{8}\.tmp")


@contextmanager
def claimed(folder: Path, request: CompareRequest, *, has_judge: bool) -> Iterator[None]:
    """Make a folder, and keep other processes from writing their results into it. A new folder that stays empty is removed.

    Raises:
        CompareError: the folder has the results of another comparison, another process writes them, or it cannot be written.
    """
    try:
        is_new = _check(folder, request, has_judge=has_judge)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise CompareError(f"--out {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CompareError(f"--out {folder}: another process is writing its results there") from error
        for file in _left_over(folder):
            file.unlink(missing_ok=True)
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it has results
                folder.rmdir()
        os.close(descriptor)


def check_data(folder: Path, dataset: Dataset) -> None:
    """Check that the results in a folder, if there are any, are those of the same documents, queries and judgments.

    Raises:
        CompareError: they are those of other data, such as another split.
    """
    if not (folder / RESULTS).exists():
        return
    try:
        found = orjson.loads(read_bounded(folder / RESULTS, MAX_RESULTS_BYTES))["dataset"]
        is_same = (found["split"], found["sha256"]) == (dataset.split, dataset.summary().sha256)
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        raise _other(folder)


def _other(folder: Path) -> CompareError:
    return CompareError(
        f"--out {folder}: holds the results of another comparison; choose another folder, or remove this one"
    )


def _left_over(folder: Path) -> list[Path]:
    """Return the files that a process was writing when it was killed."""
    return [path for where in (folder, folder / RUNS) for path in where.glob(".*.tmp") if _HALF.fullmatch(path.name)]


def _check(folder: Path, request: CompareRequest, *, has_judge: bool) -> bool:
    """Check that results can be written without replacing others, and return whether the folder has to be made."""
    if os.path.lexists(folder) and not folder.exists():
        raise CompareError(f"--out {folder}: is a broken link: remove it, or choose another folder")
    if (folder / RESULTS).exists() and not _is_unfinished(folder, request, has_judge=has_judge):
        raise _other(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CompareError(f"--out {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CompareError(f"--out {folder}: {there} is not writable")
    return there is not folder


def _is_unfinished(folder: Path, request: CompareRequest, *, has_judge: bool) -> bool:
    """Return whether the same comparison was interrupted, or its judge did not finish, so that it may be continued."""
    is_interrupted = not (folder / PAGE).exists()
    lacks_judge = has_judge and not (folder / REPORT_FILE).exists()
    if not (is_interrupted or lacks_judge):
        return False
    try:
        found = orjson.loads(read_bounded(folder / RESULTS, MAX_RESULTS_BYTES))
        data = Path(found["dataset"]["folder"]).resolve()
        arms = [arm["name"] for arm in found["arms"]]
        # With another margin the verdict is another one, and without the costs, those that were measured would be lost.
        options = found["seed"], found["num_resamples"], found["margin"], bool(found["cost_contrasts"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = request.seed, request.num_resamples, request.margin, request.measures_cost
    names = [arm.text for arm in parse_arms(request.arms)]
    return (data, arms, options) == (request.data.resolve(), names, wanted)
