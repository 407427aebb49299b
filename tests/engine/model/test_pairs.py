"""A pair is put together as the checkpoint's template says; a template that says something else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gateway.engine.model.pairs import PairTokenizer
from gateway.errors import ContextLengthExceeded
from gateway.types import Truncate
from tests.engine.model.reading import tokenize_pairs

WORDS = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "q": 3, "r": 4, "s": 5, "a": 6, "b": 7, "c": 8, "d": 9}


def tokenizer(pair: str, **special: int) -> Tokenizer:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [(f"[{name}]", id_) for name, id_ in {"CLS": 1, "SEP": 2, **special}.items()]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=tokens)
    return made


BERT = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
ROBERTA = "[CLS] $A [SEP] [SEP] $B [SEP]"


def pairs(
    query: str,
    texts: Sequence[str],
    max_tokens: int = 20,
    *,
    template: str = BERT,
    has_segments: bool = True,
    truncate: Truncate = Truncate.END,
    max_text_tokens: int | None = None,
) -> list[tuple[list[int], int | None, bool]]:
    made = PairTokenizer(tokenizer(template), max_tokens, has_segments=has_segments)
    rows = tokenize_pairs(made, query, texts, truncate, max_text_tokens=max_text_tokens)
    return [(row.ids, row.second, row.is_truncated) for row in rows]


@pytest.mark.parametrize(
    ("template", "has_segments", "ids", "second"),
    [
        pytest.param(BERT, True, [1, 3, 4, 2, 6, 7, 2], 4, id="segments"),
        pytest.param(BERT, False, [1, 3, 4, 2, 6, 7, 2], None, id="segments that the model is not told"),
        pytest.param(ROBERTA, True, [1, 3, 4, 2, 2, 6, 7, 2], None, id="a template without segments"),
        pytest.param("[CLS]:0 $A:0 [SEP]:1 $B:1 [SEP]:1", True, [1, 3, 4, 2, 6, 7, 2], 3, id="segment before the text"),
        pytest.param("$A:0 $B:1", True, [3, 4, 6, 7], 2, id="nothing around them"),
    ],
)
def test_a_pair_follows_the_template(template: str, has_segments: bool, ids: list[int], second: int | None) -> None:
    made = PairTokenizer(tokenizer(template), 20, has_segments=has_segments)

    [row] = tokenize_pairs(made, "q r", ["a b"], Truncate.END)

    assert (row.ids, row.second, row.is_truncated) == (ids, second, False)
    assert made.has_segments == (second is not None)


@pytest.mark.parametrize(
    ("template", "max_tokens", "reason"),
    [
        ("[CLS] $B [SEP] $A [SEP]", 20, "puts no query before a text"),
        ("[CLS] $A [SEP] $B [SEP] $A", 20, "puts no query before a text"),
        (BERT, 3, "the special tokens of a pair take all 3 tokens of the limit"),
        (BERT, 2, "the special tokens of a pair take all 2 tokens of the limit"),
        ("[CLS]:1 $A:1 [SEP]:1 $B:0 [SEP]:0", 20, "marks other tokens than those of the text"),
        ("[CLS]:0 $A:1 [SEP]:1 $B:1 [SEP]:1", 20, "marks other tokens than those of the text"),
        ("[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:1", 20, "marks other tokens than those of the text"),
        ("[CLS]:0 $A:0 [SEP]:0 $B:2 [SEP]:2", 20, "marks other tokens than those of the text"),
        ("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:2", 20, "marks other tokens than those of the text"),
    ],
)
def test_a_template_that_does_not_fit_pairs_is_refused(template: str, max_tokens: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PairTokenizer(tokenizer(template), max_tokens, has_segments=True)


def test_a_limit_of_one_token_more_than_the_template_is_taken() -> None:
    assert pairs("", ["a b"], 4) == [([1, 2, 6, 2], 2, True)]


def test_the_largest_id_may_be_one_of_the_template() -> None:
    assert PairTokenizer(tokenizer(BERT), 20, has_segments=True).largest_id == 9
    assert PairTokenizer(tokenizer(BERT, SEP=777), 20, has_segments=True).largest_id == 777
    between = tokenizer("[CLS] $A [MID] $B [SEP]", MID=778)  # one that no single text has
    assert PairTokenizer(between, 20, has_segments=True).largest_id == 778


@pytest.mark.parametrize(
    ("query", "text", "max_tokens", "truncate", "ids", "is_cut"),
    [
        pytest.param("q", "a b c", 7, Truncate.END, [1, 3, 2, 6, 7, 8, 2], False, id="just fits"),
        pytest.param("q", "a b c d", 7, Truncate.END, [1, 3, 2, 6, 7, 8, 2], True, id="the end of the text goes"),
        pytest.param("q", "a b c d", 7, Truncate.START, [1, 3, 2, 7, 8, 9, 2], True, id="the start of the text goes"),
        pytest.param(
            "q r s", "a", 6, Truncate.END, [1, 3, 4, 2, 6, 2], True, id="the longer one goes first: the query"
        ),
        pytest.param("q r s q", "a b c", 7, Truncate.END, [1, 3, 4, 2, 6, 7, 2], True, id="both are cut to one length"),
        pytest.param(
            "q r s", "a b c d", 8, Truncate.END, [1, 3, 4, 2, 6, 7, 8, 2], True, id="the longer one has the rest"
        ),
        pytest.param("q r s q", "", 7, Truncate.END, [1, 3, 4, 5, 3, 2, 2], False, id="a query alone fills it"),
        pytest.param("q r s q r", "", 7, Truncate.END, [1, 3, 4, 5, 3, 2, 2], True, id="a query alone is too long"),
    ],
)
def test_long_pairs_are_cut(
    query: str, text: str, max_tokens: int, truncate: Truncate, ids: list[int], is_cut: bool
) -> None:
    [(got, _second, was_cut)] = pairs(query, [text], max_tokens, truncate=truncate)

    assert (got, was_cut) == (ids, is_cut)


@pytest.mark.parametrize("max_tokens", [4, 7, 8, 13])
def test_pairs_are_cut_as_tokenizers_own_strategy_does_it(max_tokens: int) -> None:
    theirs = tokenizer(BERT)
    theirs.enable_truncation(max_tokens, strategy="longest_first")
    for query, text in product(["q r s"[: 2 * n] for n in range(4)] + ["q r s q r s q r s q"], repeat=2):
        expected = theirs.encode(query, text)

        [(ids, second, is_cut)] = pairs(query, [text], max_tokens)

        assert ids == expected.ids
        assert second == sum(type_ == 0 for type_ in expected.type_ids)
        assert is_cut == bool(expected.overflowing)


def test_each_text_is_cut_where_the_request_says() -> None:
    rows = pairs("q", ["a b c", "a", "a b"], max_text_tokens=2)

    assert [(ids, is_cut) for ids, _second, is_cut in rows] == [
        ([1, 3, 2, 6, 7, 2], True),
        ([1, 3, 2, 6, 2], False),
        ([1, 3, 2, 6, 7, 2], False),
    ]


def test_a_pair_that_may_not_be_cut_is_refused_with_its_length_and_place() -> None:
    made = PairTokenizer(tokenizer(BERT), 7, has_segments=True)
    assert len(tokenize_pairs(made, "q", ["a b c"], Truncate.REFUSE)) == 1

    with pytest.raises(ContextLengthExceeded, match="is 7 tokens, however the query and text 5 have 8 tokens together"):
        tokenize_pairs(made, "q", ["a", "a b c d"], Truncate.REFUSE, first_index=4)


@pytest.mark.parametrize(
    ("query", "text", "max_text_tokens", "length"),
    [
        pytest.param("q", "a " * 5, None, "have 9 tokens", id="all is read"),
        pytest.param("q", "a " * 5000, None, r"have at least \d+ tokens", id="not all of the text"),
        pytest.param("q " * 5000, "a", None, r"have at least \d+ tokens", id="not all of the query"),
        pytest.param("q " * 5, "a " * 5000, 2, "have 10 tokens", id="as much of the text as is wanted"),
        pytest.param("q " * 5000, "a " * 5000, 2, r"have at least \d+ tokens", id="but not all of the query"),
    ],
)
def test_a_length_is_exact_where_everything_was_read(
    query: str, text: str, max_text_tokens: int | None, length: str
) -> None:
    made = PairTokenizer(tokenizer(BERT), 7, has_segments=True)

    with pytest.raises(ContextLengthExceeded, match=length):
        tokenize_pairs(made, query, [text], Truncate.REFUSE, max_text_tokens=max_text_tokens)
