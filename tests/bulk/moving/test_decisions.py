"""The merge of a collection and its copy, item by item."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bulk.moving.decisions import NEW, Action, Base, decide, merge
from gateway.bulk.rows import BulkError

A, B, C = b"a", b"b", b"c"


def pending(*digests: bytes, written: bytes | None = A) -> Base:
    return Base(written, frozenset(digests))


@pytest.mark.parametrize(
    ("first", "second", "base", "is_flipped", "action"),
    [
        (A, None, NEW, False, Action.WRITE),
        (A, None, NEW, True, Action.WRITE),
        (A, A, NEW, False, Action.RECORD),
        (A, A, Base(A), False, Action.NOTHING),
        (B, A, Base(A), False, Action.WRITE),
        (B, A, Base(A), True, Action.WRITE),
        (None, A, Base(A), True, Action.DELETE),
        (None, None, Base(A), True, Action.FORGET),
        # A process ended while it wrote: the new content may be there or not.
        (C, B, pending(B), True, Action.WRITE),
        (C, A, pending(B), True, Action.WRITE),
        (A, B, pending(B), True, Action.WRITE),
        (A, C, pending(B), True, Action.KEEP),
        (A, None, pending(A, written=None), True, Action.WRITE),
        (None, B, pending(B), True, Action.DELETE),
        (None, None, pending(B, written=None), False, Action.NOTHING),
        # Two processes ended, one after the other, and only the first one had written.
        (C, B, pending(B, C, written=None), True, Action.WRITE),
        (None, B, pending(B, C, written=None), True, Action.DELETE),
        # Applications changed the second collection.
        (A, C, Base(A), True, Action.KEEP),
        (B, C, Base(A), True, Action.KEEP),
        (None, C, Base(A), True, Action.KEEP),
        (None, C, NEW, True, Action.KEEP),
        (None, C, NEW, False, Action.KEEP),
        (A, None, Base(A), True, Action.KEEP),
        (B, None, Base(A), True, Action.KEEP),
        (A, None, Base(A), False, Action.WRITE),
        (A, C, NEW, False, Action.KEEP),
    ],
)
def test_each_case(first: bytes | None, second: bytes | None, base: Base, is_flipped: bool, action: Action) -> None:
    assert decide(first, second, base, is_flipped=is_flipped) is action


KEYS = st.dictionaries(st.one_of(st.integers(-50, 50), st.text(max_size=2)), st.sampled_from([A, B, C]), max_size=20)


@given(KEYS, KEYS, KEYS)
def test_a_merge_has_each_item_once_in_order_with_all_that_is_known_of_it(
    first: dict[int | str, bytes], second: dict[int | str, bytes], bases: dict[int | str, bytes]
) -> None:
    def key(row_id: int | str) -> tuple[int, int | str]:
        return (0, row_id) if isinstance(row_id, int) else (1, row_id)

    def stream(items: dict[int | str, bytes]) -> list[tuple[int | str, bytes]]:
        return [(row_id, items[row_id]) for row_id in sorted(items, key=key)]

    found = dict(merge([iter(stream(items)) for items in (first, second, bases)], key))

    assert list(found) == sorted(first.keys() | second.keys() | bases.keys(), key=key)
    for row_id, values in found.items():
        assert values == [first.get(row_id), second.get(row_id), bases.get(row_id)]


def test_a_merge_that_fails_closes_its_streams_at_once() -> None:
    """The traceback of the error would keep them open, with their connections."""
    closed: list[str] = []

    def stream(name: str, num_items: int) -> Iterator[tuple[int | str, bytes]]:
        try:
            yield from ((number, A) for number in range(num_items))
            raise BulkError(f"{name} has gone away")
        finally:
            closed.append(name)

    with pytest.raises(BulkError, match="docs has gone away") as kept:
        list(merge([stream("docs", 5), stream("copy", 50)], lambda row_id: (0, row_id)))
    assert (kept.value.__traceback__ is not None, closed) == (True, ["docs", "copy"])


STEP = st.tuples(st.integers(0, 3), st.sampled_from(["first", "second"]), st.sampled_from([A, B, C, None]))


@given(st.lists(st.one_of(STEP, st.none()), max_size=30))
def test_after_the_flip_nothing_that_was_written_into_the_second_collection_is_lost(
    steps: list[tuple[int, str, bytes | None] | None],
) -> None:
    """Writes to either collection at any time, with passes in between: the second collection keeps its own writes."""
    collections: dict[str, dict[int, bytes]] = {"first": {}, "second": {}}
    bases: dict[int, Base] = {}
    own: dict[int, bytes] = {}  # what applications wrote into the second collection last, and not deleted there

    for step in [*steps, None]:
        if step is None:
            run_pass(collections["first"], collections["second"], bases)
            for row_id, content in own.items():
                assert collections["second"].get(row_id) in (content, collections["first"].get(row_id))
                own_before = bases.get(row_id, NEW).written
                if own_before != collections["first"].get(row_id):
                    assert collections["second"].get(row_id) == content
            continue
        row_id, where, content_or_none = step
        collections[where].pop(row_id, None)
        own.pop(row_id, None) if where == "second" else None
        if content_or_none is not None:
            collections[where][row_id] = content_or_none
        if content_or_none is not None and where == "second":
            own[row_id] = content_or_none


def run_pass(
    first: dict[int, bytes], second: dict[int, bytes], bases: dict[int, Base], *, is_flipped: bool = True
) -> None:
    """Carry out the decision for each item."""
    for row_id in range(4):
        content = first.get(row_id)
        action = decide(content, second.get(row_id), bases.get(row_id, NEW), is_flipped=is_flipped)
        if content is not None and action in (Action.WRITE, Action.RECORD):
            second[row_id] = content
            bases[row_id] = Base(content)
        elif action in (Action.DELETE, Action.FORGET):
            second.pop(row_id, None)
            bases.pop(row_id, None)


WRITE = st.tuples(st.just("first"), st.integers(0, 2), st.sampled_from([A, B, C, None]))
KILL = st.tuples(st.sampled_from(["planned", "written", "late"]), st.integers(0, 2), st.none())


@given(st.lists(st.one_of(WRITE, KILL, st.sampled_from([("late arrival", 0, None), ("pass", 0, None)])), max_size=25))
def test_a_pass_after_any_number_of_killed_ones_leaves_both_collections_equal(
    steps: list[tuple[str, int, bytes | None]],
) -> None:
    """A process is killed after its plan, after its write, or while the store has not carried out the write yet."""
    first: dict[int, bytes] = {}
    second: dict[int, bytes] = {}
    late: dict[int, bytes] = {}
    bases: dict[int, Base] = {}

    for what, row_id, content in steps:
        if what == "first":
            first.pop(row_id, None)
            if content is not None:
                first[row_id] = content
        elif what == "late arrival":
            second |= late
            late.clear()
        elif what == "pass":
            second |= late
            late.clear()
            run_pass(first, second, bases, is_flipped=False)
        else:
            _die_in_pass(what, row_id, first, second, late, bases)
    second |= late
    run_pass(first, second, bases, is_flipped=False)

    assert second == first


def _die_in_pass(
    moment: str,
    row_id: int,
    first: dict[int, bytes],
    second: dict[int, bytes],
    late: dict[int, bytes],
    bases: dict[int, Base],
) -> None:
    """Do a pass over one item, until it is killed."""
    content, base = first.get(row_id), bases.get(row_id, NEW)
    if decide(content, second.get(row_id), base, is_flipped=False) is not Action.WRITE or content is None:
        return
    bases[row_id] = Base(base.written, base.pending | {content})
    if moment == "written":
        second[row_id] = content
        late.pop(row_id, None)  # a store carries out the writes of one item in their order
    elif moment == "late":
        late[row_id] = content
