"""Read a source in blocks of rows, check that ids are unique in the whole source, and split long texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row, RowId, Source, closing_readings
from gateway.config.wording import cut

OnError: TypeAlias = Literal["skip", "stop"]
Expand: TypeAlias = Callable[[Row], Iterable[Row | BadRow]]
"""Splits a row into several rows, such as chunks, and derives their ids from the row's id."""

# The limit for texts and payloads in a block: long rows must not fill the memory.
_BLOCK_BYTES = 4 * 2**20
# The digits of the largest 64-bit integer.
_MAX_DIGITS = 20
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive items of a source.

    Attributes:
        rows: the rows to embed.
        bad: items that cannot be embedded.
        num_items: the number of the source's items that the block covers.
        position: the position after the last item.
        ids: the items' ids, from which the manifest detects later duplicates.
        num_bytes: the approximate size of texts and payloads.
    """

    rows: Sequence[Row]
    bad: Sequence[BadRow]
    num_items: int
    position: Position
    ids: Sequence[RowId]
    num_bytes: int


class BlockReader:
    """Reads blocks.

    Args:
        seen: returns the subset of some ids that committed shards contain.
        max_rows: the maximum number of rows in a block.
        expand: splits rows; by default, each row is embedded whole.
        problem: returns the reason why the sink cannot store a row; empty if it can.
    """

    def __init__(
        self,
        source: Source,
        seen: Callable[[Sequence[RowId]], set[RowId]],
        max_rows: int,
        on_error: OnError,
        expand: Expand | None = None,
        problem: Callable[[Row], str] = lambda _row: "",
    ) -> None:
        self._source = source
        self._seen = seen
        self._max_rows = max_rows
        self._stops = on_error == "stop"
        self._expand = expand
        self._problem = problem
        self._uncommitted: set[RowId] = set()

    def release(self, ids: Iterable[RowId]) -> None:
        """Forget ids that the manifest now contains."""
        self._uncommitted.difference_update(ids)

    def read(self, after: Position | None, first_items: int) -> Iterator[Block]:
        """Yield the blocks after a position.

        Args:
            first_items: end a block after this number of items; 0 for no such limit.

        Raises:
            BulkError: the source cannot be read any further, or an item is bad and the job stops at bad items.
            Everything before it has been yielded.
        """
        items: list[Row | BadRow] = []
        num_bytes = num_read = 0
        reading = self._source.read(after)
        failure: BulkError | None = None
        with closing_readings(reading):
            while failure is None:
                try:
                    item = next(reading, None)
                except BulkError as error:
                    item, failure = None, error
                if item is None:
                    break
                items.append(item)
                num_bytes += _size(item)
                num_read += 1
                is_end = num_read == first_items or (self._stops and isinstance(item, BadRow))
                if is_end or len(items) == self._max_rows or num_bytes > _BLOCK_BYTES:
                    yield from self._blocks(items, num_bytes)
                    items, num_bytes = [], 0
        if items:
            yield from self._blocks(items, num_bytes)
        if failure is not None:
            raise failure

    def _blocks(self, items: Sequence[Row | BadRow], num_bytes: int) -> Iterator[Block]:
        """Yield items as one block, or as several blocks if splitting them gives too many rows for one.

        Raises:
            BulkError: an item is bad, and the job stops at bad items; the last block then ends before it.
        """
        # A part has another id than its item, so parts are checked instead of items.
        found = items if self._expand is not None else [self._checked(item) for item in items]
        checked = self._without_duplicates(found)
        bad: BadRow | None = None
        if self._stops:
            count, bad = next(
                ((index, item) for index, item in enumerate(checked) if isinstance(item, BadRow)), (len(checked), None)
            )
            checked = checked[:count]
        yield from self._split(checked, num_bytes)
        if bad is not None:
            raise BulkError(stopped_at(bad))

    def _split(self, items: Sequence[Row | BadRow], num_bytes: int) -> Iterator[Block]:
        """Yield blocks that end after an item; a block exceeds the limit only if a single item does.

        Raises:
            BulkError: a part is bad, and the job stops at bad items.
        """
        first, items = 0, list(items)
        parts: list[Row | BadRow] = []
        for number, item in enumerate(items):
            found = self._parts(item)
            if len(found) == 1 and isinstance(found[0], BadRow):
                items[number] = found[0]  # its id is not in use
            bad = next((part for part in found if isinstance(part, BadRow)), None) if self._stops else None
            if number > first and (bad is not None or len(parts) + len(found) > self._max_rows):
                yield self._block(items[first:number], parts, num_bytes // len(items))
                first, parts = number, []
            if bad is not None:
                raise BulkError(stopped_at(bad))
            parts += found
        if parts:
            yield self._block(items[first:], parts, num_bytes // len(items))

    def _parts(self, item: Row | BadRow) -> list[Row | BadRow]:
        """Return the rows of an item, or one bad row instead if the sink cannot store all of them."""
        if self._expand is None or isinstance(item, BadRow):
            return [item]
        parts = list(self._expand(item))
        checked = (self._checked(part) for part in parts)
        bad = next((part for part in checked if isinstance(part, BadRow)), None)
        return parts if bad is None else [replace(bad, id=item.id)]

    def _block(self, items: Sequence[Row | BadRow], parts: Sequence[Row | BadRow], item_bytes: int) -> Block:
        ids = [] if self._source.has_unique_ids else [_unique_form(item.id) for item in items if isinstance(item, Row)]
        self._uncommitted.update(ids)
        return Block(
            [part for part in parts if isinstance(part, Row)],
            [part for part in parts if isinstance(part, BadRow)],
            len(items),
            items[-1].position,
            ids,
            item_bytes * len(items),
        )

    def _checked(self, item: Row | BadRow) -> Row | BadRow:
        problem = self._problem(item) if isinstance(item, Row) else ""
        return BadRow(item.place, problem, item.position, item.id) if problem else item

    def _without_duplicates(self, items: Sequence[Row | BadRow]) -> list[Row | BadRow]:
        """Return the items, with duplicates of an earlier id turned into bad items."""
        if self._source.has_unique_ids:
            return list(items)
        known = self._seen([_unique_form(item.id) for item in items if isinstance(item, Row)])
        checked: list[Row | BadRow] = []
        new: set[RowId] = set()
        for item in items:
            if isinstance(item, Row):
                bare = _unique_form(item.id)
                if bare in known or bare in new or bare in self._uncommitted:
                    also = ", as a number or as text" if isinstance(bare, int) else ""
                    also = ", in upper or lower case" if isinstance(bare, str) and _UUID.fullmatch(bare) else also
                    problem = f"the id {cut(repr(item.id))} was already used by an earlier row{also}"
                    checked.append(BadRow(item.place, problem, item.position, item.id))
                    continue
                new.add(bare)
            checked.append(item)
        return checked


def _unique_form(row_id: RowId) -> RowId:
    """Return the form of an id that must be unique in all sinks.

    Most keep ids as text, so ``1`` and ``"1"`` are equal. Some, such as Qdrant, do not distinguish the case of UUIDs.
    """
    if isinstance(row_id, str) and _UUID.fullmatch(row_id):
        return row_id.lower()
    digits = row_id.removeprefix("-") if isinstance(row_id, str) else ""
    is_number = len(digits) <= _MAX_DIGITS and digits.isascii() and digits.isdecimal()
    return int(row_id) if is_number and str(int(row_id)) == row_id else row_id


def stopped_at(bad: BadRow, *, is_in_block: bool = False) -> str:
    """Return the message of a job that stops at a bad item.

    Args:
        is_in_block: the rows of its block are not written, including those before it.
    """
    rest = ", except those of the same block, which the next run embeds" if is_in_block else ""
    return (
        f"{bad.place}: {bad.problem}. The rows before it are written{rest}. With --on-error skip, the job leaves such rows "
        "out and lists them in a file"
    )


def _size(item: Row | BadRow) -> int:
    return 100 + len(item.text) + size_of(item.payload) if isinstance(item, Row) else 200


def size_of(value: Json) -> int:
    """Return the approximate size of a value in bytes."""
    match value:
        case str():
            return 50 + len(value)
        case Mapping():
            return sum(100 + len(name) + size_of(inner) for name, inner in value.items())
        case list() | tuple():
            return sum(10 + size_of(inner) for inner in value)
    return 20
