"""Plan the forwards of a batch on a CPU: several texts share a row, and the rows of a forward have one length.

A forward is a matrix of ``b`` rows by ``t`` tokens. Every token of it costs the same in the linear layers, padding
included, and in the attention a token costs ``t``, because it is compared with its whole row before the mask hides other
texts. So rows should be full, and not much longer than their texts. A processor's kernels are compiled for each shape,
which takes as long as a hundred tokens. So lengths are rounded, and few shapes occur.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

# Lengths are multiples of 16: matrix kernels compute blocks of 16 tokens, so 20 tokens take longer than 32.
_STEP_BITS = 4
# Lengths of the rows that short texts share. A longer text has a separate row.
ROW_LENGTHS = (32, 64, 128, 256)
LONGEST_SHARED = ROW_LENGTHS[-1]
# More tokens in a forward are not faster, and this limits the number of shapes.
MAX_FORWARD_TOKENS = 512
# The fixed cost of a forward, in tokens.
_OVERHEAD_TOKENS = 32
# A token's attention over a row costs as much as its linear layers when the row is this many times the model's width.
# Measured with all-MiniLM-L6-v2: 53, 58, 62, 76 and 91 us per token in rows of 32, 64, 128, 256 and 512.
_ATTENTION_WIDTHS = 1.5


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of one forward.

    Attributes:
        rows: for each row the indices of its texts, in order.
        length: tokens of a row, padding included.
    """

    rows: Sequence[Sequence[int]]
    length: int


def round_length(num_tokens: int) -> int:
    """Round a length up to a multiple of 16, or of a sixteenth of the power of two below it, so that lengths recur."""
    step = 1 << max(_STEP_BITS, num_tokens.bit_length() - 5)
    return -(-num_tokens // step) * step


def plan_forwards(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Split the texts of a batch into forwards with the lowest total cost.

    Args:
        lengths: tokens of each text.
        width: dimensions of the model's states.

    Returns:
        Positions in ``lengths``, for each forward; each occurs once.
    """
    if len(lengths) == 1:
        return [[0]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    forwards = [[i] for i in order if lengths[i] > LONGEST_SHARED]
    short = order[len(forwards) :]
    return forwards + _Plan(lengths, width).best(short)[1]


def lay_out(lengths: Sequence[int], width: int) -> Layout:
    """Lay out the texts of one forward in rows, at the lowest cost."""
    if len(lengths) == 1:
        return Layout([[0]], round_length(lengths[0]))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest, total = lengths[order[0]], sum(lengths)
    row_lengths = {round_length(longest), *(length for length in ROW_LENGTHS if length >= longest)}
    if total <= LONGEST_SHARED:
        row_lengths.add(round_length(total))
    layouts = [_trimmed(_fill(order, lengths, length), lengths) for length in sorted(row_lengths)]
    return min(layouts, key=lambda layout: _cost(layout, width))


def _cost(layout: Layout, width: int) -> float:
    """Return the cost of a forward, in tokens of a row without attention."""
    per_token = 1 + layout.length / (_ATTENTION_WIDTHS * width)
    return _OVERHEAD_TOKENS + len(layout.rows) * layout.length * per_token


def _trimmed(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Layout:
    return Layout(rows, round_length(max(sum(lengths[i] for i in row) for row in rows)))


def _fill(order: Sequence[int], lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put each text, longest first, into the fullest row that has room for it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and index of each row that has room, by room
    for i in order:
        place = bisect_left(free, (lengths[i], -1))
        if place < len(free):
            room, row = free.pop(place)
            rows[row].append(i)
        else:
            room, row = row_length, len(rows)
            rows.append([i])
        if room > lengths[i]:
            insort(free, (room - lengths[i], row))
    return rows


class _Plan:
    """Finds the cheapest forwards of texts that share rows."""

    def __init__(self, lengths: Sequence[int], width: int) -> None:
        self._lengths = lengths
        self._width = width

    def best(self, order: Sequence[int], level: int = 0) -> tuple[float, list[list[int]]]:
        """Return the cost and the texts of each forward.

        Args:
            order: the texts, longest first, none longer than the longest row.
            level: the shortest row length that is considered, as an index.
        """
        if not order:
            return 0.0, []
        options = []
        for i, row_length in enumerate(ROW_LENGTHS[level:], level):
            num_longer = sum(self._lengths[text] > row_length for text in order)
            if num_longer == len(order):
                continue
            cost, forwards = self._shared(order[num_longer:], row_length)
            rest, longer = self.best(order[:num_longer], i + 1)
            options.append((cost + rest, longer + forwards))
        total = sum(self._lengths[text] for text in order)
        if total <= LONGEST_SHARED:
            options.append(self._shared(order, round_length(total)))
        return min(options, key=lambda option: option[0])

    def _shared(self, order: Sequence[int], row_length: int) -> tuple[float, list[list[int]]]:
        """Return the cost and the forwards of texts in rows of one length."""
        rows = _fill(order, self._lengths, row_length)
        per_forward = max(1, MAX_FORWARD_TOKENS // row_length)
        cost, forwards = 0.0, []
        for first in range(0, len(rows), per_forward):
            part = rows[first : first + per_forward]
            cost += _cost(_trimmed(part, self._lengths), self._width)
            forwards.append([text for row in part for text in row])
        return cost, forwards
