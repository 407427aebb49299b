"""Simulations of clicks on lists that mix two rankings (``examples/interleave.py``)."""

from __future__ import annotations

import random
from functools import partial

import numpy as np

from bench.evidence.registry import Case, Simulation
from examples.interleave import conclude, mix, vote

_SHOWN = 10
_CLICKS = {True: 0.4, False: 0.05}  # how often people click a result that they look at, if it is relevant, and if not


def _ranking(skill: float, rng: np.random.Generator) -> list[str]:
    """Rank 40 documents, of which the first four are relevant; with more skill, these are higher."""
    scores = rng.normal(size=40)
    scores[:4] += skill
    return [str(document) for document in np.argsort(-scores)]


def _session(skills: tuple[float, float], rng: np.random.Generator) -> str | None:
    """Return the vote of one session, in which lower positions are looked at less often."""
    first, second = (_ranking(skill, rng) for skill in skills)
    shown = mix(first, second, _SHOWN, random.Random(int(rng.integers(2**32))))  # noqa: S311  a simulation
    clicked = [
        name
        for place, (name, _source) in enumerate(shown, 1)
        if rng.random() < 1 / np.sqrt(place) and rng.random() < _CLICKS[int(name) < 4]
    ]
    return vote(shown, clicked)


def prefers_one_of_equals(skill: float, sessions: int, rng: np.random.Generator) -> bool:
    """Return whether any look, after each session, prefers one of two equally good rankings."""
    return conclude(_session((skill, skill), rng) for _ in range(sessions))[2] is not None


def prefers_the_better(skills: tuple[float, float], sessions: int, rng: np.random.Generator) -> bool:
    """Return whether the second ranking, which is better, is preferred by the last session."""
    return conclude(_session(skills, rng) for _ in range(sessions))[2] == "second"


SIMULATIONS = (
    Simulation(
        "clicks",
        "Clicks on mixed lists of equals",
        "a preference at any look",
        "<=",
        0.05,
        [
            Case(name, "500 sessions", partial(prefers_one_of_equals, skill, 500), 400, 40)
            for name, skill in (("weak rankings", 0.5), ("strong rankings", 2.0))
        ],
        "Evaluated after every session. Lower positions are looked at less often, and irrelevant results are clicked too.",
    ),
    Simulation(
        "clicked",
        "Clicks on mixed lists with a better ranking",
        "preferred by the last session",
        ">=",
        0.8,
        [Case("a better ranking", "1,000 sessions", partial(prefers_the_better, (1.0, 1.5), 1_000), 200, 20)],
    ),
)
