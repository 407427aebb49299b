"""A small data set that is on every machine: documentation of Python's standard library.

The first line of a docstring is a query, and the rest of it the document that answers.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from pathlib import Path

MODULES = [
    "argparse",
    "asyncio.tasks",
    "bisect",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "enum",
    "fileinput",
    "fractions",
    "functools",
    "gettext",
    "glob",
    "heapq",
    "http.client",
    "imaplib",
    "inspect",
    "ipaddress",
    "json",
    "locale",
    "logging",
    "mailbox",
    "optparse",
    "os",
    "pathlib",
    "pickle",
    "pkgutil",
    "platform",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "tkinter.colorchooser",
    "traceback",
    "types",
    "typing",
    "unittest.case",
    "unittest.mock",
    "urllib.request",
    "uuid",
    "warnings",
    "weakref",
    "xml.etree.ElementTree",
    "zipfile",
]
_MIN_CHARACTERS, _MAX_CHARACTERS = 60, 600


def write_dataset(folder: Path, max_documents: int = 400) -> None:
    """Write the data set in BEIR's layout: as many queries as documents, one relevant document each."""
    with warnings.catch_warnings():
        # Some names say that they will be gone in a later Python, when they are only looked at.
        warnings.simplefilter("ignore", DeprecationWarning)
        pairs = _pairs()[:max_documents]
    (folder / "qrels").mkdir(parents=True)
    _write(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": rest} for i, (_, rest) in enumerate(pairs)])
    _write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": summary} for i, (summary, _) in enumerate(pairs)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(pairs)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(path: Path, entries: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def _pairs() -> list[tuple[str, str]]:
    """Return summary and rest of every docstring that has both, each summary once."""
    found: dict[str, str] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # a Python without Tk
            continue
        for _, thing in sorted(inspect.getmembers(module), key=lambda member: member[0]):
            members = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
            for member in members:
                # Objects that a library has put into a module may belong to no module.
                if not (inspect.isfunction(member) or inspect.isclass(member)) or not (
                    member.__module__ or ""
                ).startswith(name):
                    continue
                summary, _, rest = (inspect.getdoc(member) or "").partition("\n\n")
                summary, rest = " ".join(summary.split()), " ".join(rest.split())[:_MAX_CHARACTERS]
                if 20 <= len(summary) <= 150 and len(rest) >= _MIN_CHARACTERS:
                    found.setdefault(summary, rest)
    return sorted(found.items())
