"""Sentences to embed: English as people write it, 3 to 60 words, never the same twice.

They are the docstrings of Python's standard library, so that no download is needed. Where those are used up, further
sentences are made of them by exchanging words.
"""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS, MAX_WORDS = 3, 60

_NO_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s")
# One word in so many is exchanged to make a new sentence of an old one.
_EXCHANGE_ONE_IN = 4


class Sentences(Iterator[str]):
    """An endless stream of different sentences; the same ones for the same seed and the same Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  not for secrets
        self._models = list(docstring_sentences())
        self._words = sorted({word for sentence in self._models for word in sentence.split() if word.isalpha()})
        self._unused = self._random.sample(self._models, len(self._models))
        self._given: set[str] = set()

    def __next__(self) -> str:
        sentence = self._unused.pop() if self._unused else self._vary()
        while sentence in self._given:
            sentence = self._vary()
        self._given.add(sentence)
        return sentence

    def take(self, count: int) -> list[str]:
        """Return the next ``count`` sentences."""
        return [next(self) for _ in range(count)]

    def _vary(self) -> str:
        words = self._random.choice(self._models).split()
        for _ in range(1 + len(words) // _EXCHANGE_ONE_IN):
            words[self._random.randrange(len(words))] = self._random.choice(self._words)
        return " ".join(words)


@functools.cache
def docstring_sentences() -> tuple[str, ...]:
    """Return the sentences of the standard library's docstrings, each once, in alphabetical order."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in library.rglob("*.py") if _NO_PROSE.isdisjoint(path.relative_to(library).parts)]
    return tuple(sorted({sentence for path in files for text in _docstrings(path) for sentence in _split(text)}))


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about style in the standard library itself
        module = ast.parse(path.read_bytes())
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _split(text: str) -> Iterator[str]:
    for paragraph in _PARAGRAPH_END.split(text):
        if ">>>" in paragraph:
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
                yield sentence
