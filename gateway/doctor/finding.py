"""The result of one check, and a way to run checks that cannot hang or end the command."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias


class Status(StrEnum):
    """The importance of a finding."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing has to be done."""
    TODO = "todo"
    """Something has to be done before all enabled models are served."""


Detail: TypeAlias = str | int | float | bool | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check, such as ``disk``, or ``model`` for a model.
        text: the finding, in one or several lines.
        mend: the remedy; empty if there is nothing to do.
        details: the finding in a form for programs.
    """

    check: str
    status: Status
    text: str
    mend: str = ""
    details: Mapping[str, Detail] = field(default_factory=dict)


Look: TypeAlias = Callable[[], Sequence[Finding]]
"""Looks at one part of the machine."""


@dataclass(frozen=True, slots=True)
class Check:
    """One part of the machine, and the time limit of its check."""

    name: str
    look: Look
    limit_s: float


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Run checks in parallel, and return their findings in the order of the checks.

    A check that raises, or does not end in time, is a finding itself; a broken disk or driver can cause either.
    """
    found: dict[str, Sequence[Finding]] = {}

    def run(check: Check) -> None:
        try:
            found[check.name] = check.look()
        except Exception as error:  # a broken part can raise anything, and the other checks are still useful
            reason = f"{type(error).__name__}: {error}".strip().split("\n", 1)[0]
            found[check.name] = [Finding(check.name, Status.TODO, f"this check failed: {reason}")]

    began_at = time.monotonic()
    threads = [threading.Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    findings: list[Finding] = []
    for check, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, began_at + check.limit_s - time.monotonic()))
        late = Finding(check.name, Status.TODO, f"no answer within {check.limit_s:g} s")
        findings += found.get(check.name, [late])
    return findings
