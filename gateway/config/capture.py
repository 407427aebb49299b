"""Capture: a sample of the queries under a name, kept for a comparison of models. Off unless an entry turns it on."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field, field_validator

from gateway.config.fields import Frozen, NonEmptyText, Positive
from gateway.config.wording import quote

QUERY_TASK = "retrieval.query"
"""The task of the texts that are queries."""

_SCRUB = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _check_scrub(text: str) -> str:
    if not _SCRUB.fullmatch(text):
        raise ValueError(f"must be `package.module:function`, got {quote(text)}")
    return text


Scrub: TypeAlias = Annotated[str, AfterValidator(_check_scrub)]


class Capture(Frozen):
    """A sample of the queries under a name. The texts are your users' words: see docs/ab.md before you turn it on."""

    queries: Annotated[float, Field(gt=0, le=1)] = Field(description="Fraction of the queries that is kept.")
    to: NonEmptyText = Field(
        description="File to append to, relative to this file; the date goes before its suffix, as in "
        "`queries-2026-11-25.jsonl`. Each process needs its own."
    )
    days: Positive = Field(default=30, description="A text is deleted before it is this many days old.")
    passages: bool = Field(
        default=False,
        description="Whether texts that are not known to be queries are kept too: stored passages, and all texts of clients "
        "that name no task.",
    )
    scrub: Scrub | None = Field(
        default=None,
        description="`package.module:function` that returns the part of a text that may be kept, or `None` to drop it; "
        "`gateway.capture.scrubbing:mask` replaces addresses, links and long numbers.",
    )

    @field_validator("to")
    @classmethod
    def _check_to(cls, text: str) -> str:
        try:
            Path(text).expanduser()
        except RuntimeError as error:  # `~name` of a user that does not exist
            raise ValueError(f"is a file that cannot be resolved, {quote(text)}: {error}") from None
        return text

    def path(self, folder: Path) -> Path:
        """Return the file without a date.

        Args:
            folder: the folder of ``models.yaml``.
        """
        return folder / Path(self.to).expanduser()


def dated(path: Path, day: date) -> Path:
    """Return the file of a day."""
    return path.with_name(f"{path.stem}-{day.isoformat()}{path.suffix}")


def dated_files(path: Path) -> dict[date, Path]:
    """Return the existing files of all days, oldest first."""
    form = re.compile(rf"{re.escape(path.stem)}-(\d{{4}}-\d\d-\d\d){re.escape(path.suffix)}")
    files = {}
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        if match := form.fullmatch(file.name):
            try:
                files[date.fromisoformat(match[1])] = file
            except ValueError:  # no such day
                continue
    return dict(sorted(files.items()))
