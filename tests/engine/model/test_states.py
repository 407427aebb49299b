"""Token states are pooled as a plain loop over the tokens of each text pools them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.model.states import TokenStates, to_host

WIDTH = 5
LENGTHS = {
    "one text": [7],
    "one token": [1],
    "equal lengths": [4, 4, 4],
    "any lengths": [3, 1, 9, 2, 9, 1],
    "longest first": [9, 5, 1],
    "the shortest with as many tokens as a state has numbers": [WIDTH + 2, WIDTH],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def padded(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return states ``(b, t, width)``; those of the padding are not finite, so that reading one is noticed."""
    generator = torch.Generator().manual_seed(5)
    states = torch.full((len(lengths), max(lengths), WIDTH), float("nan"), dtype=dtype)
    for row, length in enumerate(lengths):
        states[row, :length] = torch.randn(length, WIDTH, generator=generator).to(dtype)
    return states


def texts_of(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return the same states text by text, in float32."""
    return [row[:length].float() for row, length in zip(padded(lengths, dtype), lengths, strict=True)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_padding_is_dropped(lengths: list[int]) -> None:
    states = TokenStates.from_padded(padded(lengths), lengths)

    assert states.flat.shape == (sum(lengths), WIDTH)
    assert torch.equal(states.flat, torch.cat(texts_of(lengths)))
    assert [text.shape[0] for text in states.texts()] == lengths
    assert all(torch.equal(a, b) for a, b in zip(states.texts(), texts_of(lengths), strict=True))
    assert states.starts == [sum(lengths[:i]) for i in range(len(lengths))]
    assert states.num_padding == len(lengths) * max(lengths) - sum(lengths)


def test_a_batch_that_is_padded_beyond_its_longest_text() -> None:
    wider = torch.cat([padded([3, 5]), torch.full((2, 4, WIDTH), float("nan"))], dim=1)

    assert torch.equal(TokenStates.from_padded(wider, [3, 5]).flat, torch.cat(texts_of([3, 5])))


def pooled_by_a_loop(text: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    match pooling:
        case Pooling.CLS:
            return text[0]
        case Pooling.LAST:
            return text[-1]
        case Pooling.MAX:
            return torch.stack([max(column.tolist(), key=float) * torch.ones(()) for column in text.T])
        case Pooling.MEAN:
            return torch.stack([torch.tensor(sum(column.tolist()) / len(text)) for column in text.T])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("pooling", Pooling)
def test_pooling(pooling: Pooling, lengths: list[int], dtype: torch.dtype) -> None:
    pooled = TokenStates.from_padded(padded(lengths, dtype), lengths).pool(pooling)

    assert pooled.dtype is torch.float32
    expected = torch.stack([pooled_by_a_loop(text, pooling) for text in texts_of(lengths, dtype)])
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


def test_the_mean_of_many_tokens_adds_up_in_float32() -> None:
    """In float16 the sum of these would stop growing at 2,048, and in bfloat16 at 256."""
    for dtype in (torch.float16, torch.bfloat16):
        states = TokenStates(torch.ones(8192, WIDTH, dtype=dtype), [8192])

        assert states.pool(Pooling.MEAN).tolist() == [[1.0] * WIDTH]


Spans = list[list[tuple[int, int]]]


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        pytest.param([6], [[(0, 2), (2, 5), (5, 6)]], id="one text"),
        pytest.param([6, 3, 4], [[(0, 3), (3, 6)], [(0, 3)], [(0, 1), (1, 4)]], id="several texts"),
        pytest.param([6, 2], [[(1, 2), (4, 5)], [(0, 1)]], id="not all tokens"),
        pytest.param([6], [[(4, 6), (0, 2)]], id="in any order"),
        pytest.param([4, 5, 3], [[(0, 4)], [], [(0, 3)]], id="a text without spans"),
    ],
)
def test_spans_are_averaged(lengths: list[int], spans: Spans) -> None:
    pooled = TokenStates.from_padded(padded(lengths), lengths).pool_spans(spans)

    expected = [
        pooled_by_a_loop(text[first:end], Pooling.MEAN)
        for text, text_spans in zip(texts_of(lengths), spans, strict=True)
        for first, end in text_spans
    ]
    torch.testing.assert_close(pooled, torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_span_of_the_whole_text_is_its_mean(lengths: list[int]) -> None:
    states = TokenStates.from_padded(padded(lengths), lengths)

    whole = states.pool_spans([[(0, length)] for length in lengths])

    assert torch.equal(whole, states.pool(Pooling.MEAN))


def test_a_text_does_not_depend_on_its_neighbors() -> None:
    lengths = [3, 8, 2]
    together = TokenStates.from_padded(padded(lengths), lengths)

    for pooling in Pooling:
        alone = [TokenStates(text, [len(text)]).pool(pooling) for text in texts_of(lengths)]
        torch.testing.assert_close(together.pool(pooling), torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_numbers_on_the_host_are_not_copied_through_pinned_memory() -> None:
    """A machine without a card has none."""
    tensor = torch.arange(6.0).reshape(2, 3)

    assert to_host(tensor).tolist() == [[0, 1, 2], [3, 4, 5]]
