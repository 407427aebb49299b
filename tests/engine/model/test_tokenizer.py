"""Token ids, counts and truncation are those of the Hugging Face tokenizer, however long the text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gateway.engine.model.encoder import Encoder
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.tokenizer import Tokenizer
from gateway.errors import ContextLengthExceeded
from gateway.types import Truncate
from tests.engine.model.reading import tokenize_chunks, tokenize_pairs

LOREM = "Lorem ipsum dolor sit amet, consectetur adipiscing elit. "

TEXTS = {
    "empty": "",
    "blank": " \n",
    "short": "Hello, world!",
    "emoji": "I 💚 embeddings 👩🏽‍💻",
    "exactly the limit": "word " * 254,
    "one over": "word " * 255,
    "some over": "word " * 300,
    "as long as the shortest window": ("word " * 205)[:1024],
    "as long as a window for 256 tokens": ("word " * 820)[:4096],
    "long": LOREM * 2_000,
    "long without white space": "Donaudampfschifffahrtsgesellschaft." * 3_000,
    "CJK": "向量数据库中的语义搜索。" * 8_000,
    "a word of 100,000 letters": "a" * 100_000,
    "words, then a word of 100,000 letters": LOREM * 5 + "a" * 100_000,
    "a word of 100,000 letters, then words": "a" * 100_000 + " " + LOREM * 50,
    "words of 90 letters": ("x" * 90 + " ") * 500,
    "white space": " " * 100_000,
    "white space, then words": " " * 100_000 + LOREM * 50,
    "white space, then many words": " " * 100_000 + LOREM * 2_000,
    "many words, then white space": LOREM * 2_000 + " " * 100_000,
    "line breaks alone": "word\n" * 20_000,
    "punctuation": "." * 50_000,
    "combining accents": "e\u0301" * 30_000,
    "unknown symbols": "⟁" * 30_000,
}


@pytest.fixture(scope="session")
def hugging_face(bundled_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundled_folder)


@pytest.fixture(scope="session")
def fast(bundled_encoder: Encoder) -> Any:
    return bundled_encoder.tokenizer._tokenizer


@pytest.fixture(scope="session", params=[256, 16, 3, 2])
def tokenizer(request: pytest.FixtureRequest, fast: Any) -> Tokenizer:
    """The bundled model's tokenizer with several limits."""
    return Tokenizer(fast, request.param)


# ------------------------------------------------------------------------------------------------------------- END


@pytest.fixture(scope="session")
def whole_ids(hugging_face: Any) -> dict[str, list[int]]:
    """Return the ids of each text, uncut: for one of 100,000 characters they take longer than the rest of a test."""
    return {name: hugging_face(text, verbose=False)["input_ids"] for name, text in TEXTS.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_the_ids_are_those_of_hugging_face(
    tokenizer: Tokenizer, hugging_face: Any, whole_ids: dict[str, list[int]], name: str
) -> None:
    [tokens] = tokenizer.tokenize([TEXTS[name]], "", Truncate.END)

    limit = tokenizer.max_tokens
    assert tokens.ids == hugging_face(TEXTS[name], truncation=True, max_length=limit)["input_ids"]
    assert tokens.is_truncated == (len(whole_ids[name]) > limit)


def test_texts_of_all_lengths_together_are_tokenized_as_each_alone(tokenizer: Tokenizer) -> None:
    together = tokenizer.tokenize(list(TEXTS.values()), "", Truncate.END)

    assert together == [tokenizer.tokenize([text], "", Truncate.END)[0] for text in TEXTS.values()]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("name", TEXTS)
def test_the_ids_are_those_of_hugging_face_for_every_kind_of_tokenizer(
    plain_checkpoints: Callable[[str], Path], model_type: str, name: str
) -> None:
    reference: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(plain_checkpoints(model_type))
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(plain_checkpoints(model_type)).backend_tokenizer, 40)

    [tokens] = tokenizer.tokenize([TEXTS[name]], "", Truncate.END)

    assert tokens.ids == reference(TEXTS[name], truncation=True, max_length=40)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab ü漢.\n💚\u0301"), max_size=50),
    times=st.integers(1, 60),
    max_tokens=st.integers(2, 40),
)
def test_any_text_is_cut_as_hugging_face_cuts_it(
    fast: Any, hugging_face: Any, text: str, times: int, max_tokens: int
) -> None:
    [tokens] = Tokenizer(fast, max_tokens).tokenize([text * times], "", Truncate.END)

    assert tokens.ids == hugging_face(text * times, truncation=True, max_length=max_tokens)["input_ids"]


# ------------------------------------------------------------------------------------------------------- START, REFUSE


@pytest.mark.parametrize("name", TEXTS)
def test_start_keeps_the_last_tokens(tokenizer: Tokenizer, whole_ids: dict[str, list[int]], name: str) -> None:
    [tokens] = tokenizer.tokenize([TEXTS[name]], "", Truncate.START)

    whole = whole_ids[name]
    limit = tokenizer.max_tokens
    assert tokens.ids == (whole if len(whole) <= limit else [whole[0], *whole[len(whole) - limit + 1 :]])
    assert tokens.is_truncated == (len(whole) > limit)


@pytest.mark.parametrize("name", ["some over", "long", "CJK", "a word of 100,000 letters, then words"])
def test_start_keeps_the_instruction(
    bundled_encoder: Encoder, hugging_face: Any, whole_ids: dict[str, list[int]], name: str
) -> None:
    instruction = "represent the query: "

    [tokens] = bundled_encoder.tokenizer.tokenize([TEXTS[name]], instruction, Truncate.START)

    before = hugging_face(instruction)["input_ids"][:-1]
    whole = whole_ids[name]
    assert tokens.ids == [*before, *whole[-(256 - len(before)) :]]


def test_an_instruction_longer_than_the_model_takes_leaves_no_text(bundled_encoder: Encoder) -> None:
    [tokens] = bundled_encoder.tokenizer.tokenize(["hello"], "word " * 300, Truncate.START)

    assert len(tokens.ids) == 256


@pytest.mark.parametrize("name", ["one over", "long", "CJK"])
def test_refuse_says_the_limit_and_the_length(bundled_encoder: Encoder, name: str) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        bundled_encoder.tokenizer.tokenize(["fine", TEXTS[name]], "", Truncate.REFUSE, first_index=64)

    message = caught.value.message
    assert message.startswith("This model's maximum context length is 256 tokens, however input[65] has ")
    assert ("has 257 tokens" in message) == (name == "one over")
    assert ("has at least " in message) == (name != "one over")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_the_first_text_has_index_0_if_the_server_omits_it(bundled_encoder: Encoder) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"input\[0\] has 257 tokens"):
        bundled_encoder.tokenizer.tokenize([TEXTS["one over"]], "", Truncate.REFUSE)


def test_refuse_takes_a_text_of_exactly_the_limit(bundled_encoder: Encoder) -> None:
    [tokens] = bundled_encoder.tokenizer.tokenize([TEXTS["exactly the limit"]], "", Truncate.REFUSE)

    assert len(tokens.ids) == 256


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("truncate", [Truncate.END, Truncate.START, Truncate.REFUSE])
@pytest.mark.parametrize("text", ["lorem ipsum " * 200_000, "a" * 2_000_000], ids=["words", "one word"])
def test_a_huge_text_does_not_stop_other_threads(bundled_encoder: Encoder, text: str, truncate: Truncate) -> None:
    """The event loop runs in one of them."""
    gaps = []
    is_done = threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not is_done.wait(0.001):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    other = threading.Thread(target=tick)
    other.start()
    try:
        bundled_encoder.tokenizer.tokenize([text], "query: ", truncate)
    except ContextLengthExceeded:
        pass
    finally:
        is_done.set()
        other.join()

    assert max(gaps, default=0) < 0.4


@pytest.mark.parametrize("truncate", [Truncate.END, Truncate.START])
@pytest.mark.parametrize("around", ["", " " * 1_000_000], ids=["words", "words in white space"])
def test_the_cost_of_tokenizing_depends_on_the_kept_part_of_a_text(
    bundled_encoder: Encoder, truncate: Truncate, around: str
) -> None:
    text = f"{around}{LOREM * 100_000}{around}"  # 5.7 million characters: some 4 s if it were tokenized whole
    started = time.process_time()  # other processes on this machine do not count

    bundled_encoder.tokenizer.tokenize([text], "query: ", truncate)

    assert time.process_time() - started < 1


@pytest.mark.parametrize("vocabulary", [["д", "м"], ["д", "м", "a"]])
def test_a_cut_text_keeps_the_templates_tokens_whatever_the_vocabulary_has(vocabulary: list[str]) -> None:
    """A vocabulary of another script may drop every letter of English."""
    special = {"[CLS]": 0, "[SEP]": 1}
    fast = FastTokenizer(BPE(vocab=special | {word: 2 + i for i, word in enumerate(vocabulary)}, merges=[]))
    fast.add_special_tokens([*special])
    fast.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[*special.items()]
    )
    tokenizer = Tokenizer(fast, 5)

    cut = [tokenizer.tokenize(["ддмдмм"], "", truncate)[0].ids for truncate in (Truncate.END, Truncate.START)]

    assert cut == [[0, 2, 2, 3, 1], [0, 2, 3, 3, 1]]
    assert tokenizer.room("д") == 2
    assert tokenize_chunks(tokenizer, ["дд", "м"], "").ids == [0, 2, 2, 3, 1]
    pairs = PairTokenizer(fast, 7, has_segments=False)
    assert tokenize_pairs(pairs, "дм", ["мддд"], Truncate.END)[0].ids == [0, 2, 3, 1, 3, 2, 1]


@pytest.mark.parametrize("text", [TEXTS["empty"], TEXTS["short"], TEXTS["emoji"], TEXTS["some over"]])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_all_tokens_of_a_text_with_their_places(
    hugging_face: Any, bundled_tokenizer: Tokenizer, text: str, add_special_tokens: bool
) -> None:
    [row] = bundled_tokenizer.split([text], add_special_tokens=add_special_tokens)

    assert [token.id for token in row] == hugging_face(text, add_special_tokens=add_special_tokens)["input_ids"]
    for token in row:
        if token.is_special:
            assert token.text in ("[CLS]", "[SEP]")
            assert (token.start, token.stop) == (None, None)
        else:
            assert token.text == text[token.start : token.stop]


def test_token_ids_become_texts_again(bundled_tokenizer: Tokenizer) -> None:
    rows = bundled_tokenizer.split(["hello world", "a"], add_special_tokens=True)
    ids = [[token.id for token in row] for row in rows]

    assert bundled_tokenizer.join(ids, skip_special_tokens=True) == ["hello world", "a"]
    assert bundled_tokenizer.join(ids, skip_special_tokens=False) == ["[CLS] hello world [SEP]", "[CLS] a [SEP]"]
    assert bundled_tokenizer.join([[2**32 - 1]], skip_special_tokens=True) == [""]


@pytest.fixture
def bundled_tokenizer(bundled_folder: Path) -> Tokenizer:
    """Return the tokenizer of the bundled model."""
    return Tokenizer(AutoTokenizer.from_pretrained(bundled_folder).backend_tokenizer, 256)
