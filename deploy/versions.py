"""List the images, actions and releases that the deployment pins: how old each is, and until when it is supported.

python deploy/versions.py           print it; exit 1 if something is not supported any more, is older than a year without a
                                    named end of support, or is not in the table below
python deploy/versions.py --newest  also say where the newest versions are listed

It asks no network, so it does not know what was published since its table was written. With a pin, change its dates in
the table too; the tests compare both.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A version whose makers name no end of support may be so many days old.
MAX_DAYS = 365


@dataclass(frozen=True)
class Known:
    """Facts about a version.

    Args:
        released: the day; of an action's major, that of its first release. Where the day is not known, the first day of its
            month, or a day on which it is known to have been in use or not to exist yet, as a comment says.
        supported_until: as its makers say; ``None`` where they name no day.
        source: where its versions are listed.
        newer: a newer version that was known when this was written, and is not used; the file with the pin says why.
    """

    released: date
    supported_until: date | None
    source: str
    newer: str = ""


KNOWN = {
    "python:3.13.16-slim-trixie": Known(date(2026, 9, 30), date(2029, 10, 31), "https://devguide.python.org/versions/"),
    # A release with long-term support.
    "prom/prometheus:v3.13.3": Known(
        date(2026, 9, 7), date(2027, 7, 31), "https://prometheus.io/docs/introduction/release-cycle/"
    ),
    "prom/alertmanager:v0.34.0": Known(date(2026, 8, 1), None, "https://github.com/prometheus/alertmanager/releases"),
    # Nine months from 13.2.0.
    "grafana/grafana:13.2.1": Known(date(2026, 9, 1), date(2027, 5, 18), "https://grafana.com/grafana/download"),
    # After 2.6.15, which is of that day.
    "milvusdb/milvus:v2.6.19": Known(date(2026, 4, 24), None, "https://milvus.io/docs/release_notes.md", newer="3.0"),
    "gcr.io/datadoghq/agent:7.84.6": Known(
        date(2026, 10, 26), None, "https://github.com/DataDog/datadog-agent/releases"
    ),
    "ray:2.60.0": Known(date(2026, 11, 1), None, "https://pypi.org/project/ray/"),
    # Majors of actions are moving tags. Those before these need Node.js 20, which GitHub's runners do not have any more.
    "actions/checkout@v7": Known(date(2026, 6, 18), None, "https://github.com/actions/checkout/releases"),
    "actions/setup-python@v7": Known(date(2026, 7, 1), None, "https://github.com/actions/setup-python/releases"),
    "actions/upload-artifact@v7": Known(date(2026, 2, 1), None, "https://github.com/actions/upload-artifact/releases"),
    "actions/download-artifact@v8": Known(
        date(2026, 2, 1), None, "https://github.com/actions/download-artifact/releases"
    ),
    # 4.1.0 was in use on that day.
    "actions/attest-build-provenance@v4": Known(
        date(2026, 3, 13), None, "https://github.com/actions/attest-build-provenance/releases"
    ),
    "docker/setup-buildx-action@v4": Known(
        date(2026, 3, 5), None, "https://github.com/docker/setup-buildx-action/releases"
    ),
    "docker/login-action@v4": Known(date(2026, 3, 4), None, "https://github.com/docker/login-action/releases"),
    "docker/metadata-action@v6": Known(date(2026, 3, 5), None, "https://github.com/docker/metadata-action/releases"),
    "docker/build-push-action@v7": Known(
        date(2026, 3, 5), None, "https://github.com/docker/build-push-action/releases"
    ),
    # A branch that moves with each release: 1.14.2 was in use on that day.
    "pypa/gh-action-pypi-publish@release/v1": Known(
        date(2026, 8, 1), None, "https://github.com/pypa/gh-action-pypi-publish/releases"
    ),
}
_PATTERNS = (
    ("Dockerfile", r"^ARG PYTHON_IMAGE=([^@\s]+)"),
    ("deploy/compose/mem0/Dockerfile", r"^ARG PYTHON_IMAGE=([^@\s]+)"),
    ("deploy/compose/*.yaml", r"^ +image: (?!embedding-gateway)(\S+)"),
    ("deploy/kubernetes/**/*.yaml", r"^ +(rayVersion: \S+)"),
    (".github/workflows/*.yml", r"uses: ([^.\s]\S*)"),
)


def pins() -> Iterator[tuple[str, str]]:
    """Yield each pinned version and the file that pins it."""
    for files, pattern in _PATTERNS:
        for path in sorted(ROOT.glob(files)):
            for pin in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE):
                yield pin.replace("rayVersion: ", "ray:"), str(path.relative_to(ROOT))


def lines(today: date, *, with_sources: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield a line for each pinned version, and whether it is all right."""
    for pin in sorted({pin for pin, _ in pins()}):
        known = KNOWN.get(pin)
        if known is None:
            yield f"{pin:<42} not in the table of {Path(__file__).name}", False
            continue
        num_days = (today - known.released).days
        age = f"{num_days} days old"
        until = known.supported_until
        is_supported = num_days <= MAX_DAYS if until is None else today <= until
        if until is None and not is_supported:
            support = "OLD, and no end named: is it still supported?"
        elif until is None:
            support = f"NOT THE NEWEST: there is {known.newer}" if known.newer else "no end named, newest not checked"
        else:
            support = f"supported until {until}" if is_supported else f"NOT SUPPORTED since {until}"
        yield (
            f"{pin:<42} {age:<18} {support:<46}" + (known.source if with_sources else ""),
            is_supported,
        )


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    is_right = True
    for line, is_good in lines(date.today(), with_sources="--newest" in arguments):
        print(line.rstrip())
        is_right &= is_good
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
