"""Text of which a tokenizer makes few tokens costs little to read, and gives the tokens of the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from gateway.engine.model.long_runs import LongRuns
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.tokenizer import Tokenizer, at_once
from gateway.errors import ContextLengthExceeded
from gateway.types import Truncate
from tests.models.checkpoints import bpe_tokenizer, unigram_tokenizer, wordpiece_tokenizer

NUM_CHARS = 200_000
LITTLE = {
    "one letter": "a",
    "blanks": " ",
    "line breaks": "\n",
    "blanks of all kinds": " \n\t\u00a0\u2003",
    "zero-width spaces": "\u200b",
    "blanks and zero-width spaces": " \u200b",
    "combining acute": "\u0301",
    "two combining accents": "\u0301\u0316",
    "letters with accents": "e\u0301",
    "emoji": "💚",
    "Korean": "한",
    "digits and letters": "0f3a9",
    "soft hyphens in a word": "so\u00adft",
}
UNIGRAM_LITTLE = {
    **{name: LITTLE[name] for name in ("blanks", "line breaks", "zero-width spaces", "emoji", "Korean")},
    "digit and hyphen": "1-",
    "combining acute": "\u0301",
    "two combining accents": "\u0301\u0316",
}


class Counting:
    """A tokenizer that counts the characters that it is given.

    Attributes:
        most: in one call.
        total: in all calls.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self.most = self.total = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *others: Any, **options: Any) -> Any:
        size = len(text)
        self.most, self.total = max(self.most, size), self.total + size
        return self._tokenizer.encode(text, *others, **options)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        size = sum(map(len, texts))
        self.most, self.total = max(self.most, size), self.total + size
        return self._tokenizer.encode_batch_fast(texts, **options)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "WordPiece": wordpiece_tokenizer,
    "Unigram": unigram_tokenizer,
    "byte-level BPE": bpe_tokenizer,
}


_written: dict[str, str] = {}


def fresh(kind: str) -> FastTokenizer:
    """Return a tokenizer of its kind: a copy, as training one twice gives two."""
    if kind not in _written:
        _written[kind] = TOKENIZERS[kind]().backend_tokenizer.to_str()
    fast: FastTokenizer = FastTokenizer.from_str(_written[kind])
    fast.no_truncation()
    fast.no_padding()
    return fast


CASES = [("WordPiece", name, text) for name, text in LITTLE.items()]
CASES += [("Unigram", name, text) for name, text in UNIGRAM_LITTLE.items()]


@pytest.mark.parametrize("truncate", [Truncate.END, Truncate.START, Truncate.REFUSE])
@pytest.mark.parametrize(("kind", "name", "text"), CASES, ids=[f"{kind}, {name}" for kind, name, _text in CASES])
def test_megabytes_that_are_few_tokens_are_hardly_given_to_the_tokenizer(
    kind: str, name: str, text: str, truncate: Truncate
) -> None:
    counting = Counting(fresh(kind))
    tokenizer = Tokenizer(counting, 64)  # type: ignore[arg-type]
    whole = text * (NUM_CHARS // len(text))

    [tokens] = tokenizer.tokenize([f"fox {whole} Berlin"], "", truncate)

    assert tokens.ids == fresh(kind).encode(f"fox {whole} Berlin").ids
    assert not tokens.is_truncated
    assert counting.total < NUM_CHARS / 10


@pytest.mark.parametrize("truncate", [Truncate.END, Truncate.START])
@pytest.mark.parametrize(("kind", "name", "text"), CASES, ids=[f"{kind}, {name}" for kind, name, _text in CASES])
def test_text_before_or_after_them_is_cut_where_the_whole_text_is(
    kind: str, name: str, text: str, truncate: Truncate
) -> None:
    words = "near vectors mean near texts. " * 200
    some = text * (50_000 // len(text))
    whole = f"{some} {words}" if truncate is Truncate.END else f"{words} {some}"

    [tokens] = Tokenizer(fresh(kind), 64).tokenize([whole], "", truncate)

    ids = fresh(kind).encode(whole).ids
    assert tokens.ids == ([*ids[:63], ids[-1]] if truncate is Truncate.END else [ids[0], *ids[-63:]])
    assert tokens.is_truncated


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_shortened_text_has_the_tokens_of_the_whole_one(kind: str, data: st.DataObject) -> None:
    fast = fresh(kind)
    piece = st.tuples(
        st.text(
            st.sampled_from("ab1-. \n\té漢한💚⟁[]UNK\u0301\u0316\u0327\u0308\u200b\u200d\u00ad\ufe0f\u1161"),
            min_size=1,
            max_size=4,
        ),
        st.sampled_from([1, 2, 7, 60, 99, 101, 250]),
    )
    text = "".join(chars * times for chars, times in data.draw(st.lists(piece, min_size=1, max_size=6)))

    short = LongRuns(fast).shortened(text)

    assert fast.encode(short).ids == fast.encode(text).ids
    assert len(short) <= len(text)


def test_a_token_that_was_added_is_found_within_a_long_word() -> None:
    fast = fresh("WordPiece")
    fast.add_tokens(["zebra"])
    text = "a" * 5000 + "zebra" + "a" * 5000

    short = LongRuns(fast).shortened(text)

    assert len(short) < 1000
    assert fast.encode(short).ids == fast.encode(text).ids


def test_the_bundled_model_s_tokenizer_is_one_whose_long_runs_are_known(bundled_folder: Path) -> None:
    assert LongRuns(AutoTokenizer.from_pretrained(bundled_folder).backend_tokenizer).are_known


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("text", ["word " * 60_000, "a" * 300_000, "漢" * 300_000, "." * 300_000])
def test_no_step_reads_more_than_it_announced(text: str) -> None:
    """The time that one client's text keeps a thread busy is bounded, and known in advance."""
    counting = Counting(fresh("WordPiece"))
    tokenizer = Tokenizer(counting, 64)  # type: ignore[arg-type]
    steps = tokenizer.read([text] * 3, "", Truncate.END)
    announced = 0

    while True:
        before = counting.total
        try:
            size = next(steps)
        except StopIteration:
            break
        finally:
            assert counting.total - before <= max(announced, 3 * 1024)
        announced = size

    assert counting.most < 20_000


@pytest.mark.parametrize("text", [". " * 1_000_000, "word " * 400_000, "fox. " * 14])
def test_chunks_are_read_until_they_are_too_many_and_no_further(text: str) -> None:
    counting = Counting(fresh("WordPiece"))
    tokenizer = Tokenizer(counting, 64)  # type: ignore[arg-type]

    with pytest.raises(ContextLengthExceeded, match="late_chunking cannot cut any of them away") as caught:
        at_once(tokenizer.read_chunks([text] * 1000, "Represent the document for retrieval: "))

    assert counting.total < 50_000
    assert "at least" in caught.value.message


def test_a_long_query_is_read_once_for_all_pairs() -> None:
    fast = fresh("WordPiece")
    fast.post_processor = _pair_template(fast)
    counting = Counting(fast)
    tokenizer = PairTokenizer(counting, 64, has_segments=False)  # type: ignore[arg-type]
    query = at_once(tokenizer.read_query("word " * 400_000))
    after_query = counting.total

    for first in range(0, 1000, 100):
        at_once(tokenizer.read_pairs(query, ["fox"] * 100, Truncate.END, first_index=first))

    assert after_query < 50_000
    assert counting.total - after_query == 3000


def _pair_template(fast: FastTokenizer) -> Any:
    names = [(name, fast.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=names
    )
