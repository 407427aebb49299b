"""Texts are laid out in rows so that little of a forward is padding, and a token sees its own text and nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.model.runtimes.attention import FULL, SLIDING, AttentionRule, make_masks, positions
from gateway.engine.model.runtimes.rows import (
    LONGEST_SHARED,
    MAX_FORWARD_TOKENS,
    Layout,
    lay_out,
    plan_forwards,
    round_length,
)

WIDTHS = st.sampled_from([32, 384, 1024])
LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=60)


def tokens_of(layout: Layout) -> int:
    return len(layout.rows) * layout.length


@given(st.integers(1, 100_000))
def test_lengths_are_rounded_up_by_little(length: int) -> None:
    rounded = round_length(length)

    assert rounded % 16 == 0
    assert length <= rounded <= max(length + 15, length * 17 / 16)
    assert round_length(rounded) == rounded


@given(LENGTHS, WIDTHS)
def test_each_text_is_in_one_forward_and_one_row(lengths: list[int], width: int) -> None:
    forwards = plan_forwards(lengths, width)

    assert sorted(text for forward in forwards for text in forward) == list(range(len(lengths)))
    for forward in forwards:
        texts = [lengths[text] for text in forward]
        layout = lay_out(texts, width)
        assert sorted(text for row in layout.rows for text in row) == list(range(len(texts)))
        assert all(sum(texts[text] for text in row) <= layout.length for row in layout.rows)
        assert len(texts) == 1 or max(texts) <= LONGEST_SHARED
        assert len(texts) == 1 or tokens_of(layout) <= MAX_FORWARD_TOKENS + LONGEST_SHARED


def test_texts_of_all_lengths_are_laid_out_in_one_forward() -> None:
    assert lay_out([300, 40, 30, 20], 384) == Layout([[0], [1, 2, 3]], 304)
    assert lay_out([20], 384) == Layout([[0]], 32)
    assert lay_out([5, 9, 30], 384) == Layout([[2, 1, 0]], 48)
    assert lay_out([300, 150, 150], 384) == Layout([[0], [1, 2]], 304)


def test_a_text_may_be_as_long_as_a_row() -> None:
    assert plan_forwards([256, 256, 256], 384) == [[0, 1], [2]]
    assert plan_forwards([32] * 3 + [257], 384) == [[3], [0, 1, 2]]
    assert sorted(map(sorted, plan_forwards([256, 256, *[32] * 16], 384))) == [[0, 1], list(range(2, 18))]


@pytest.mark.parametrize(("num_texts", "most"), [(8, 0.10), (16, 0.10), (25, 0.08), (32, 0.08), (90, 0.05)])
def test_little_is_padding(num_texts: int, most: float) -> None:
    """With sentences: 20 tokens on average, 5 to 80."""
    numbers = random.Random(1)
    computed = needed = 0
    for _ in range(50):
        lengths = [min(80, 5 + int(numbers.expovariate(1 / 15))) for _ in range(num_texts)]
        forwards = plan_forwards(lengths, 384)
        computed += sum(tokens_of(lay_out([lengths[i] for i in forward], 384)) for forward in forwards)
        needed += sum(lengths)

    assert 1 - needed / computed <= most


def test_few_shapes_recur() -> None:
    """A kernel is compiled for each number of tokens in a forward; they fit into the cache of kernels."""
    numbers = random.Random(1)
    shapes = set()
    for _ in range(500):
        lengths = [min(256, 5 + int(numbers.expovariate(1 / 25))) for _ in range(numbers.randint(1, 40))]
        forwards = plan_forwards(lengths, 384)
        shapes |= {tokens_of(lay_out([lengths[i] for i in forward], 384)) for forward in forwards}

    assert len(shapes) < 60


# -------------------------------------------------------------------------------------------------------------- masks

# Row 0 has two texts and padding, row 1 has one and padding, row 2 has one.
OWNERS = np.array([[0, 0, 0, 2, 2, 2, 2, -1], [1, 1, 1, 1, 1, -1, -1, -1], [3] * 8])
# Of text 2 the last two tokens are not seen, of text 3 the last five.
IS_KEY = (OWNERS >= 0) & ~np.isin(np.arange(24).reshape(3, 8), [5, 6, 19, 20, 21, 22, 23])


@pytest.mark.parametrize("is_key", [None, IS_KEY], ids=["all are seen", "some are not seen"])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_token_sees_its_own_text(is_causal: bool, window: int | None, is_key: np.ndarray | None) -> None:
    rule = AttentionRule(is_causal, window, (FULL,) if window is None else (FULL, SLIDING))

    masks = make_masks(OWNERS, is_key, rule)

    assert tuple(masks) == rule.mask_names
    for name, mask in masks.items():
        assert mask.shape == (3, 1, 8, 8)
        for row, query, key in np.ndindex(3, 8, 8):
            if OWNERS[row, query] < 0:
                assert mask[row, 0, query, query]  # without a token that it sees, NaN
                continue
            expected = OWNERS[row, query] == OWNERS[row, key] and (is_key is None or is_key[row, key])
            expected &= not is_causal or key <= query
            expected &= name == FULL or window is None or abs(query - key) <= window
            assert mask[row, 0, query, key] == expected


@pytest.mark.parametrize("is_key", [None, IS_KEY[1:]], ids=["all are seen", "some are not seen"])
def test_one_text_a_row_needs_one_line_of_mask(is_key: np.ndarray | None) -> None:
    [mask] = make_masks(OWNERS[1:], is_key, AttentionRule()).values()

    assert mask.shape == (2, 1, 1, 8)
    assert (mask[:, 0, 0] == (OWNERS[1:] >= 0 if is_key is None else is_key)).all()


def test_positions_begin_with_0_or_behind_the_padding_id() -> None:
    assert positions([7, 1, 9], None).tolist() == [0, 1, 2]
    assert positions([7, 1, 9], 1).tolist() == [2, 1, 3]
