"""The scale of the grades for a pair of query and document, and the number of people's grades that a verdict needs.

The judge's prompt, its check and the pages for people share these values, so that all use the same definitions.
"""

from __future__ import annotations

from typing import Final

SCALE: Final = (
    "The document has nothing to do with the query.",
    "The document is about the subject of the query, but does not answer it.",
    "The document answers the query in part, or its answer is unclear or hidden among other things.",
    "The document is about the query and contains its answer.",
)
"""The meaning of each grade, from 0."""

MAX_GRADE: Final = len(SCALE) - 1

WHAT_COUNTS: Final = "Grade what the document says, not its length, its style, or whether you believe it."

NUM_CHECKED: Final = 60
"""The number of queries that are drawn for people.

A verdict needs grades for all of them, with all their documents. If people choose which queries to leave out, the rest is
not a random sample: without the ten queries that seem to favor one arm least, corrected verdicts on equal arms are wrong in
13 % of comparisons instead of 4 %.
"""

MIN_KAPPA: Final = 0.4
"""A judge can be used if its kappa is above this with 95 % confidence."""
