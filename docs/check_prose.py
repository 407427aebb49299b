"""Find the words that docs/style.md rejects, in docstrings, comments, messages, names and pages.

::

    python docs/check_prose.py              print each of them, except in folders that are not checked yet; exit 1 if any
    python docs/check_prose.py --all        the same for all files
    python docs/check_prose.py gateway/api  the same for one folder or file
    python docs/check_prose.py --count      print only their number, by file

``docs/prose.toml`` lists the folders that are not checked yet, and the lines on which such a word is correct, for example
in the name of another project's parameter.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]

# Patterns, with their replacements. Case is ignored, and underscores in names count as spaces.
WORDS: Final = {
    # Translated idioms.
    r"anew": "again; re-read, reload",
    r"beside": "next to, as well as, besides",
    r"(?:stand|stands|stood|standing) (?:for|in)\b(?! the way)": "mean, represent, replace",
    r"of (?:its|their|our|one's|his|your|my) own": "its own X, a separate X",
    r"(?:is|are|was|were) (?-i:none)": "does not exist; say what is missing",
    r"nobody|somebody|everybody|whoever|whom|whomever": "no one, clients, any caller",
    r"(?:is|are|was|were|be|been|being) told": "gets, is given, sees, is reported",
    r"by way of|in vain|for the sake of|at hand|for ever|as it were": "plain words",
    r"\w+, say\b(?=[,.;:)])|, say, ": "for example, such as",
    r"(?:that|what|which|all|those|whether) there (?:is|are|was|were)": "name the thing",
    r"(?:tokens|texts|requests|vectors|numbers|times|lines|batches|bytes|MiB|MB) an? (?:second|minute|hour|day)": "per",
    r"(?<!here\s)(?:is|are|was|were) no (?!longer|more|less|one|such|need|obstacle|reason|\w+er\b)[a-z]+": "is not a ...",
    r"held against": "compared with, checked against",
    r"(?:goes|go|going|went|gone) on": "continue, resume",
    r"afterwards": "after that, at the end",
    r"in place of": "instead of",
    r"once more": "again, a second time",
    r"the most (?:texts|tokens|rows|bytes|vectors|requests|batches|memory|numbers|headers)": "the maximum number of",
    r"\w+, the (?:limit|maximum|minimum|least) is": "a semicolon: it has 5 bytes; the limit is 4",
    r"work of low priority|requests? of low priority": "low-priority work, low-priority requests",
    r"point of time": "point in time",
    r"guard-rails?": "guardrail",
    r"towards": "toward",
    # British spelling.
    r"\w*(?:normal|token|util|serial|initial|organ|optim|recogn|summar|minim|maxim|real|general|special|synchron|final"
    r"|parallel|prior|standard|categor|quant|vector|emphas|apolog|author|capital|character|critic|custom|memor|stabil"
    r"|penal|visual)is(?:e|ed|es|er|ers|ing|ation|ations)": "American spelling, -ize",
    r"analys(?:e|ed|es|ing)": "analyze",
    r"(?:behavi|col|fav|hon|neighb|lab|harb|arm|rum|hum|vap)our\w*": "American spelling, -or",
    r"judgements?|licen[c]e[sd]?|defence|offence|catalogue\w*|centre[sd]?|metre|litre|grey|whilst|amongst|learnt|spelt": (
        "American spelling"
    ),
    r"(?:label|model|travel|signal|tunnel|level)l(?:ed|ing)": "American spelling, one l",
}
DOCSTRING: Final = {
    r"(?:Return|Say|Tell|Give|Yield) (?:what|who|whether there)\b": "a noun: Return the model's info",
    r"Say\b": "Return, Print, Log, Describe",
}
"""Patterns for the start of a docstring only."""

_WORDS: Final = [
    (re.compile(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), re.IGNORECASE), advice) for pattern, advice in WORDS.items()
]
_DOCSTRING: Final = [(re.compile(pattern), advice) for pattern, advice in DOCSTRING.items()]
_QUOTED: Final = re.compile(r"^```.*?^```|``[^`]*``|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.MULTILINE | re.DOTALL)
_TEXT_SUFFIXES: Final = {".md", ".yaml", ".yml", ".toml", ".sh", ".j2", ".mjs"}
_TEXT_NAMES: Final = {"Makefile", "Dockerfile", "run"}
_UNREAD: Final = {"docs/check_prose.py", "docs/style.md", "docs/prose.toml", "tests/test_docs.py"}
"""Files that list these words themselves."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text for people: a comment, a string, a name or a page."""

    line: int
    text: str
    is_docstring: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A rejected word, with its replacement."""

    path: str
    line: int
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words!r}: {self.advice}"


def passages(path: Path) -> Iterator[Passage]:
    """Yield the texts for people in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(text)
    else:
        yield Passage(1, text)


def _python(text: str) -> Iterator[Passage]:
    """Yield comments, strings and the names of functions and classes."""
    comments: list[tokenize.TokenInfo] = []
    previous = ""
    opens_statement = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token)
            continue
        if token.type == tokenize.NL:
            continue
        if comments:
            yield from _blocks(comments)
            comments = []
        if token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield Passage(token.start[0], token.string.lstrip("rbfRBF").strip("\"'"), opens_statement)
        elif token.type == tokenize.NAME and previous in {"def", "class"}:
            yield Passage(token.start[0], token.string.replace("_", " "))
        opens_statement = token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
        previous = token.string


def _blocks(comments: Sequence[tokenize.TokenInfo]) -> Iterator[Passage]:
    """Join comments on consecutive lines into one passage, because a phrase may continue on the next line."""
    lines: list[str] = []
    for index, comment in enumerate(comments):
        lines.append(comment.string.lstrip("#: "))
        following = comments[index + 1] if index + 1 < len(comments) else None
        if following is None or following.start != (comment.start[0] + 1, comment.start[1]):
            yield Passage(comment.start[0] - len(lines) + 1, "\n".join(lines))
            lines = []


def findings(path: Path, allowed: Sequence[str]) -> Iterator[Finding]:
    """Yield the rejected words in a file, except on lines that contain an allowed fragment."""
    name = path.relative_to(ROOT).as_posix()
    lines = path.read_text(encoding="utf-8").splitlines()
    for passage in passages(path):
        # Quoted parts are code. They are masked by text of the same length, so that the other positions stay valid.
        prose = _QUOTED.sub(lambda quoted: re.sub(r"[^\n]", "`", quoted.group()), passage.text)
        matches = [(match, advice) for pattern, advice in _WORDS for match in pattern.finditer(prose)]
        if passage.is_docstring:
            matches += [(match, advice) for pattern, advice in _DOCSTRING if (match := pattern.match(prose))]
        for match, advice in matches:
            line = passage.line + prose.count("\n", 0, match.start())
            if not any(fragment in lines[line - 1] for fragment in allowed):
                yield Finding(name, line, " ".join(match.group().split()), advice)


def readable() -> list[Path]:
    """Return the files of the repository that contain text for people."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.splitlines() if name not in _UNREAD]
    return [
        path
        for path in paths
        if path.is_file() and (path.suffix in {".py", *_TEXT_SUFFIXES} or path.name in _TEXT_NAMES)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rejected words, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", help="check only these folders and files")
    parser.add_argument("--all", action="store_true", help="also check the folders that are not checked yet")
    parser.add_argument("--count", action="store_true", help="print only the number of findings, by file; exit 0")
    options = parser.parse_args(arguments)
    settings = tomllib.loads((ROOT / "docs" / "prose.toml").read_text(encoding="utf-8"))
    to_do: list[str] = [] if options.all or options.count or options.folders else settings["to_do"]
    found: list[Finding] = []
    for path in readable():
        name = path.relative_to(ROOT).as_posix()
        if options.folders and not any(name == folder or name.startswith(f"{folder}/") for folder in options.folders):
            continue
        if any(name == folder or name.startswith(f"{folder}/") for folder in to_do):
            continue
        found += findings(path, settings["allowed"].get(name, []))
    if options.count:
        for name, count in sorted(Counter(finding.path for finding in found).items()):
            sys.stdout.write(f"{count:5} {name}\n")
        sys.stdout.write(f"{len(found):5} in total\n")
        return 0
    for finding in found:
        sys.stdout.write(f"{finding}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
