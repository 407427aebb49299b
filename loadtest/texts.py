"""Texts as people store and search them: short queries, sentences, passages. Seeded, and never the same twice.

They are made of sentences from a file, one a line; without one, of the docstrings of Python's standard library, so that
nothing is downloaded. A text is made new by exchanging words, so that no cache answers in the model's place.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

from bench.texts import docstring_sentences

_QUERY_WORDS = (3, 12)
# Lengths of stored texts are log-normal in most collections: half of these have under 60 words, one in fifty over 300.
_MEDIAN_WORDS, _SIGMA, _MAX_WORDS = 60, 0.8, 400
# One word in so many is exchanged.
_EXCHANGE_ONE_IN = 6
# A text that has been given is made again so often before it gets another word.
_TRIES_PER_LENGTH = 20


def read_sentences(path: Path | None) -> tuple[str, ...]:
    """Return the sentences of a file, one a line, or those of the standard library.

    Raises:
        ValueError: the file has fewer than 10 lines with text.
    """
    if path is None:
        return docstring_sentences()
    sentences = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(sentences) < 10:
        raise ValueError(f"{path}: needs 10 lines of text or more, got {len(sentences)}")
    return sentences


@functools.cache
def _words(sentences: tuple[str, ...]) -> Sequence[str]:
    return sorted({word for sentence in sentences for word in sentence.split() if word.isalpha()})


class Texts:
    """An endless source of different texts; the same ones for the same seed.

    Args:
        fixed: take texts from so many in turn rather than making new ones; 0 for new ones. For a cache, or to hold each
            vector against one that is known.
    """

    def __init__(self, sentences: tuple[str, ...], seed: str, fixed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311  not for secrets
        self._sentences = sentences
        self._words = _words(sentences)
        self._given: set[int] = set()
        self.fixed: Sequence[str] = self._make_fixed(fixed)

    def query(self) -> str:
        """Return a search query, 3 to 12 words."""
        return self._new(self._random.randint(*_QUERY_WORDS))

    def passage(self) -> str:
        """Return a text to be stored: 60 words in the middle, 400 at most."""
        return self._new(min(_MAX_WORDS, max(3, round(self._random.lognormvariate(0.0, _SIGMA) * _MEDIAN_WORDS))))

    def sentence(self) -> str:
        """Return a fact as a memory stores it: a sentence."""
        return self._new(self._random.randint(5, 30))

    def _make_fixed(self, count: int) -> Sequence[str]:
        self.fixed = ()
        return [(self.query, self.sentence, self.passage)[number % 3]() for number in range(count)]

    def _new(self, num_words: int) -> str:
        if self.fixed:
            return self._random.choice(self.fixed)
        num_tries = 0
        while True:
            # Few words make few different texts: when most of them have been given, the next is longer.
            text = self._vary(num_words + num_tries // _TRIES_PER_LENGTH)
            mark = hash(text)
            if mark not in self._given:
                self._given.add(mark)
                return text
            num_tries += 1

    def _vary(self, num_words: int) -> str:
        words: list[str] = []
        while len(words) < num_words:
            words += self._random.choice(self._sentences).split()
        words = words[:num_words]
        for _ in range(1 + num_words // _EXCHANGE_ONE_IN):
            words[self._random.randrange(num_words)] = self._random.choice(self._words)
        return " ".join(words)
