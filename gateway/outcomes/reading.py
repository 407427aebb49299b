"""Read outcomes as an application sends them: as JSON objects, or as rows of a CSV file."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)

from gateway.config.fields import OUTCOME_NAME
from gateway.config.files import open_regular, why_not_text
from gateway.config.wording import describe
from gateway.errors import StartError
from gateway.experiments.split import MAX_UNIT_BYTES, Split, read_unit
from gateway.outcomes.joining import signed
from gateway.outcomes.store import NewOutcome

_BEGINNING_BYTES = 512
_MOST = 1e12
# A value divided by a smaller number and squared twice would overflow a float.
_LEAST_CHANCES = 1e-6
_NAMES = f"^{OUTCOME_NAME.pattern}$"
_REQUIRED = ("unit", "value", "id")
_COLUMNS = ("unit", "value", "name", "of", "id", "before", "time")
# The rule for each field. Messages show no unit and no id, which may identify a person.
_MUST_BE = {
    "unit": f"must be the unit as requests send it, a text of 1 to {MAX_UNIT_BYTES:,} bytes",
    "name": "must have 1 to 64 letters, digits and `.`, `_`, `-`",
    "value": "must be a number from -1e12 to 1e12",
    "of": "must be a number of chances: 0, or from 1e-6 to 1e12",
    "id": "must be a text of 1 to 200 characters, the same if the outcome is sent again",
    "before": "must be true or false",
}


class WrongOutcome(Exception):
    """A field of an outcome is missing or not accepted."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"`{field}` {problem}")
        self.field = field
        self.problem = problem


def _check_chances(of: float) -> float:
    if 0 < of < _LEAST_CHANCES:
        raise ValueError
    return of


def _as_whole(value: object) -> object:
    """Read 17.0 as 17, as in requests."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_text(value: object) -> object:
    """Read a whole number as text: many applications number their events."""
    value = _as_whole(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class PostedOutcome(BaseModel):
    """An outcome of a unit. Numbers and booleans may be texts, as in a CSV file; ``true`` as a value is 1."""

    model_config = ConfigDict(extra="ignore")  # numbers have limits, which NaN is not within

    # Strict, because `true` is not a unit, and in particular not the unit 1.
    unit: Annotated[StrictStr | StrictInt, BeforeValidator(_as_whole)] = Field(
        description="The unit, as requests for embeddings send it. It is kept as a salted hash alone."
    )
    value: Annotated[float, Field(ge=-_MOST, le=_MOST)] = Field(description="A number, or 1 for yes and 0 for no.")
    name: Annotated[str, Field(pattern=_NAMES)] | None = Field(
        default=None,
        description="Name of the outcome, such as `kept`. By default the outcome that models.yaml declares.",
    )
    of: Annotated[float, Field(ge=0, le=_MOST), AfterValidator(_check_chances)] = Field(
        default=1.0, description="Number of chances: searches, for clicks."
    )
    id: Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_as_text)] = Field(
        description="Identifier of the outcome: a second outcome with this id does not count."
    )
    before: bool = Field(
        default=False, description="Whether it is from before the experiment, which makes the intervals narrower."
    )


def read_outcome(row: object, split: Split, primary: str | None, now: float) -> NewOutcome | None:
    """Read one outcome; return ``None`` if the experiment excludes its unit.

    Args:
        row: see :class:`PostedOutcome`.
        primary: the name for an outcome that has no name.
        now: the time of the outcome, in seconds since the epoch.

    Raises:
        WrongOutcome: a field is missing or not accepted.
    """
    if not isinstance(row, Mapping):
        raise WrongOutcome("", f"must be an object with unit, value and id, got {_kind(row)}")
    try:
        posted = PostedOutcome.model_validate(
            {k: v for k, v in row.items() if v is not None and (v != "" or k in _REQUIRED)}
        )
    except ValidationError as error:
        field = str(error.errors(include_url=False)[0]["loc"][0])
        if field not in row:
            raise WrongOutcome(field, f"is required: it {_MUST_BE[field]}") from None
        got = "" if field in {"unit", "id"} else f", got {_kind(row[field])}"
        raise WrongOutcome(field, f"{_MUST_BE[field]}{got}") from None
    unit = read_unit(str(posted.unit))
    if unit is None or len(unit.encode(errors="replace")) > MAX_UNIT_BYTES:
        raise WrongOutcome("unit", _MUST_BE["unit"])
    name = posted.name or primary
    if name is None:
        raise WrongOutcome("name", "is required, as models.yaml declares no `outcome` for the experiment")
    if split.excludes(unit):
        return None
    return NewOutcome(
        name=name,
        key=hashlib.sha256(posted.id.encode(errors="replace")).digest()[:16],
        unit=signed(split.hash_of(unit)),
        value=posted.value,
        of=posted.of,
        time=now,
        is_before=posted.before,
    )


def _kind(value: object) -> str:
    """Describe a value. A text may be personal, so it comes after words at which log lines are cut."""
    return f"the string {value[:40]!r}" if isinstance(value, str) else describe(value)


Seen: TypeAlias = dict[tuple[str, bytes], tuple[Path, int, NewOutcome]]
"""The first outcome with each name and id, with its file and line."""


def read_csv(path: Path, split: Split, primary: str | None, seen: Seen | None = None) -> Iterator[NewOutcome]:
    """Read outcomes from a CSV file whose header names ``unit`` and ``value``, and maybe the other columns.

    Rows without an ``id`` all count as different outcomes. Rows without a ``time`` count as later than all exposures.

    Args:
        seen: the outcomes of files that were read before.

    Raises:
        StartError: the file cannot be read, a row is wrong, or two different outcomes have the same ``id``.
    """
    seen = {} if seen is None else seen
    try:
        with open_regular(path) as content, TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
            if why := why_not_text(content.peek(_BEGINNING_BYTES)[:_BEGINNING_BYTES]):
                raise StartError(f"{path} {why}")
            rows = csv.DictReader(file, restkey="", strict=True)
            _check_header(path, list(rows.fieldnames or ()))
            for row in rows:
                try:
                    outcome = _read_row(row, f"{path.resolve()}:{rows.line_num}", split, primary)
                    if outcome is not None and (row.get("id") or "").strip():
                        _check_id(outcome, path, rows.line_num, seen)
                except (WrongOutcome, ValueError) as error:
                    raise StartError(f"{path}:{rows.line_num}: {error}") from error
                if outcome is not None:
                    yield outcome
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartError(f"{path} cannot be read: {error}; save it as UTF-8") from error
    except csv.Error as error:  # such as a quote that is still open at the end of the file
        raise StartError(f"{path}:{rows.reader.line_num}: {error}") from error


def _check_id(outcome: NewOutcome, path: Path, line: int, seen: Seen) -> None:
    """Refuse an id of another outcome: only the first one would count."""
    file, number, first = seen.setdefault((outcome.name, outcome.key), (path, line, outcome))
    contents = [(one.unit, one.value, one.of, one.is_before) for one in (first, outcome)]
    if contents[0] != contents[1]:
        place = f"line {number}" if file == path else f"{file}:{number}"
        raise WrongOutcome("id", f"is also in {place}, with another unit or value: give each outcome its own id")


def _check_header(path: Path, names: list[str]) -> None:
    if set(names) <= set(_COLUMNS) and {"unit", "value"} <= set(names) and len(names) == len(set(names)):
        return
    raise StartError(
        f"{path}: the first line must name the columns unit and value, and may name {', '.join(_COLUMNS[2:])}; got "
        f"{', '.join(names)[:200] or 'nothing'}"
    )


def _read_row(row: Mapping[str, str], place: str, split: Split, primary: str | None) -> NewOutcome | None:
    if "" in row:
        raise WrongOutcome("unit", "and the other columns: the row has more values than the first line")
    values = {"id": place} | {name: value.strip() for name, value in row.items() if value and value.strip()}
    seconds = math.inf
    if when := values.pop("time", None):
        time = datetime.fromisoformat(when)
        seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return read_outcome(values, split, primary, seconds)
