"""The folder of comparisons: the results of `gateway compare --out`, read within limits."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Final

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from gateway.comparisons.scale import MIN_KAPPA
from gateway.comparisons.sheet import CHECK_FILE
from gateway.config.files import open_regular, read_bounded
from gateway.config.wording import cut
from gateway.errors import BadInput, NotFound

PRIMARY: Final = "nDCG@10"
UNUSABLE: Final = "judge cannot be used"
MAX_RUNS: Final = 200
MAX_RESULTS_BYTES: Final = 4 * 1024**2
_MAX_QUERIES_BYTES: Final = 32 * 1024**2
_NAME: Final = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9._@ -]{0,99}", re.ASCII)


class Interval(BaseModel):
    """A mean with its interval; ``low`` and ``high`` are ``None`` where nothing varies."""

    mean: float
    low: float | None = None
    high: float | None = None


class Ratio(BaseModel):
    """A cost divided by that of the baseline."""

    ratio: float
    low: float | None = None
    high: float | None = None
    is_shown: bool = True


class RunArm(BaseModel):
    """One side of a comparison."""

    name: str
    model: str
    space: str
    dimensions: int
    bytes_per_document: int = Field(
        validation_alias=AliasChoices("bytes_per_document", "bytes_per_vector")  # the second in earlier files
    )
    quality: Mapping[str, Interval] = {}


class RunContrast(BaseModel):
    """An arm against the baseline in one measure."""

    arm: str
    measure: str
    difference: Interval
    p_holm: float
    wins: int
    ties: int
    losses: int
    verdict: str | None = None


class RunCost(BaseModel):
    """The cost of an arm against the baseline's."""

    arm: str
    query_time: Ratio | None = None
    texts_per_s: Ratio | None = None


class RunAgreement(BaseModel):
    """The similarity of the rankings of an arm and the baseline."""

    arm: str
    overlap: Interval
    same_first: Interval


class RunDataset(BaseModel):
    """The data of a comparison."""

    folder: str
    num_documents: int
    num_queries: int
    num_judgments: int


class BottomLine(BaseModel):
    """The recommendation."""

    advice: str
    text: str


class JudgeFigure(BaseModel):
    """A difference with its interval."""

    mean: float
    low: float
    high: float


class JudgeContrast(BaseModel):
    """An arm against the baseline by a judge's grades.

    Attributes:
        people: the difference by people's grades of the queries that they checked; ``None`` without a check.
        corrected: the difference corrected by people's grades; ``None`` without a check.
    """

    arm: str
    judged: JudgeFigure
    people: JudgeFigure | None = None
    corrected: JudgeFigure | None = None
    verdict: str

    @property
    def figure(self) -> JudgeFigure:
        """The difference to show: people's alone if the judge cannot be used, else the corrected one if there is a check."""
        if self.verdict == UNUSABLE and self.people is not None:
            return self.people
        return self.corrected or self.judged


class JudgeCheck(BaseModel):
    """The agreement of a judge with the people who checked it."""

    num_queries: int = Field(description="Queries whose documents people graded completely.")
    num_pairs: int = Field(description="The documents of these queries.")
    kappa: JudgeFigure = Field(description="Cohen's kappa with quadratic weights, with its 95 % interval.")

    @property
    def is_usable(self) -> bool:
        """Whether the judge agrees enough with people for a verdict."""
        return self.kappa.low >= MIN_KAPPA


class JudgeResults(BaseModel):
    """The parts of ``judge.json`` that are shown."""

    bottom_line: str
    sentences: Sequence[str]
    contrasts: Sequence[JudgeContrast]
    check: JudgeCheck | None = Field(None, description="The check by people, if there was one.")


class Results(BaseModel):
    """The parts of ``results.json`` that are shown.

    Attributes:
        judge: the results of ``judge.json``; ``None`` if no judge was asked, or the file cannot be read.
    """

    created: str
    source: str
    dataset: RunDataset
    notes: Sequence[str] = ()
    arms: Sequence[RunArm]
    bottom_line: BottomLine | None = None
    contrasts: Sequence[RunContrast] = ()
    cost_contrasts: Sequence[RunCost] = ()
    agreements: Sequence[RunAgreement] = ()
    judge: JudgeResults | None = Field(None, description="By the grades of a chat model, if one was asked.")

    @property
    def verdict(self) -> str | None:
        """The recommendation by the judgments, or without judgments by the judge; ``None`` in old files."""
        if self.judge is not None and not self.dataset.num_judgments:
            return self.judge.bottom_line
        return self.bottom_line.text if self.bottom_line else None


class Hit(BaseModel):
    """A document in a ranking."""

    document: str
    score: float
    text: str
    relevance: int | None = None


class Query(BaseModel):
    """A line of ``queries.jsonl``."""

    id: str
    text: str
    rankings: Mapping[str, Sequence[Hit]]
    quality: Mapping[str, Mapping[str, float]] = {}

    def gain(self, arm: str, baseline: str) -> float:
        """Return how much better an arm is than the baseline; 0 without judgments."""
        return self.quality.get(arm, {}).get(PRIMARY, 0.0) - self.quality.get(baseline, {}).get(PRIMARY, 0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """A comparison in the folder.

    Attributes:
        results: the results; ``None`` if they cannot be read: then ``problem`` has the reason.
    """

    name: str
    results: Results | None
    problem: str = ""


class Runs:
    """Reads the folder of comparisons. Blocking: call it in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> list[Run]:
        """Return the comparisons, the latest first."""
        try:
            paths = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except OSError:
            return []
        dated = [(changed, path) for path in paths if (changed := _changed(path / "results.json")) is not None]
        return [self._read(path) for _when, path in nlargest(MAX_RUNS, dated)]

    @staticmethod
    def is_name(name: str) -> bool:
        """Return whether a comparison or a data set may have this name."""
        return _NAME.fullmatch(name) is not None

    @classmethod
    def check_name(cls, name: str, what: str) -> None:
        """Check the name of a new comparison or data set.

        Raises:
            BadInput: the name is not allowed.
        """
        if not cls.is_name(name):
            raise BadInput(
                f"the name of a {what} has 1 to 100 ASCII letters, digits, spaces and . _ - @, and begins with a letter, a "
                f"digit, _ or @; got {cut(name)!r}",
                param="name",
            )

    def find(self, name: str) -> Run:
        """Return a comparison.

        Raises:
            NotFound: the folder has no comparison of this name.
        """
        path = self.path(name)
        if _changed(path / "results.json") is None:
            raise NotFound(f"no comparison is called {cut(name)!r}")
        return self._read(path)

    def has(self, name: str) -> bool:
        """Return whether a comparison has results."""
        return self.is_name(name) and _changed(self.folder / name / "results.json") is not None

    def is_free(self, name: str) -> bool:
        """Return whether a new comparison may have this name: nothing is there, or the empty folder of a stopped one."""
        path = self.path(name)
        if not os.path.lexists(path):
            return True
        try:
            return not path.is_symlink() and not any(path.iterdir())
        except OSError:  # a file, or a folder that may not be read
            return False

    def has_check(self, name: str) -> bool:
        """Return whether a comparison has documents for people to grade."""
        return self.is_name(name) and _changed(self.folder / name / CHECK_FILE) is not None

    def path(self, name: str) -> Path:
        """Return the folder of a comparison, which is always inside of this one.

        Raises:
            NotFound: the name cannot be that of a folder.
        """
        if not self.is_name(name):
            raise NotFound(f"no comparison is called {cut(name)!r}")
        return self.folder / name

    def queries(self, name: str) -> Iterator[Query]:
        """Yield the queries of a comparison, one line at a time.

        Raises:
            BadInput: the file is missing, too large or wrong.
        """
        path = self.path(name) / "queries.jsonl"
        try:
            with open_regular(path) as lines:
                if os.fstat(lines.fileno()).st_size > _MAX_QUERIES_BYTES:
                    raise BadInput(f"{path.name} has more than {_MAX_QUERIES_BYTES:,} bytes; use `report.html`")
                for number, line in enumerate(lines, 1):
                    try:
                        yield Query.model_validate_json(line)
                    except ValidationError as error:
                        raise BadInput(
                            f"{path.name} is not from a comparison: line {number}, {first_problem(error)}"
                        ) from error
        except OSError as error:
            raise BadInput(f"{path.name} cannot be read: {error.strerror}") from error

    def worst(self, name: str, arm: str, baseline: str, number: int, *, is_gained: bool) -> list[Query]:
        """Return the queries in which an arm loses most, or gains most, against the baseline."""
        changed = (query for query in self.queries(name) if query.gain(arm, baseline) * (1 if is_gained else -1) > 0)
        choose = nlargest if is_gained else nsmallest
        return choose(number, changed, key=lambda query: query.gain(arm, baseline))

    def _read(self, path: Path) -> Run:
        file = path / "results.json"
        try:
            results = Results.model_validate_json(read_bounded(file, MAX_RESULTS_BYTES))
            return Run(path.name, results.model_copy(update={"judge": _judge(path / "judge.json")}))
        except OSError as error:
            return Run(path.name, None, f"results.json cannot be read: {error.strerror}")
        except ValidationError as error:
            return Run(path.name, None, f"results.json is not from a comparison: {first_problem(error)}")


def first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def _judge(file: Path) -> JudgeResults | None:
    """Return the results of a judge; ``None`` if the file is missing, too large, or of an earlier version."""
    try:
        return JudgeResults.model_validate_json(read_bounded(file, MAX_RESULTS_BYTES))
    except (OSError, ValidationError):
        return None


def _changed(file: Path) -> float | None:
    """Return the time of a regular file's last change; ``None`` for other files, and if the file cannot be examined."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None
