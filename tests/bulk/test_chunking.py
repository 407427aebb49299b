"""Chunks: exact slices in order that omit nothing, never exceed the limit, and end at sentences or words if possible."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gateway.bulk.borders import Borders
from gateway.bulk.chunking import Chunk, Chunker, Chunking, ModelTokens
from gateway.bulk.rows import BadRow, BulkError, Row
from gateway.engine.model.tokenizer import Tokenizer
from gateway.types import Token

INSTRUCTION = "passage: "
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was not amused! Was it? No.",
    "def f(x):\n    return x + 1\n\nclass A:\n    pass\n",
    "日本語の文章です。もう一つの文。",
    "นี่คือประโยคภาษาไทย ไม่มีช่องว่างระหว่างคำ",
    "Ещё одно предложение. И ещё одно!",
    "Dr. J. Doe said: 'Yes.' 3. Fish",
]


def wordpiece() -> FastTokenizer:
    tokenizer = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def byte_level() -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    return tokenizer


def metaspace() -> FastTokenizer:
    tokenizer = FastTokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 1)])
    return tokenizer


MAKERS = {"WordPiece": wordpiece, "byte-level BPE": byte_level, "Unigram": metaspace}
_MADE: dict[str, ModelTokens] = {}


def tokens_of(kind: str) -> ModelTokens:
    """Return the tokens of a small model of a kind, trained once."""
    if kind not in _MADE:
        tokenizer = Tokenizer(MAKERS[kind](), max_tokens=512)

        def count(texts: Sequence[str]) -> list[int]:
            rows = tokenizer.split([INSTRUCTION + text for text in texts], add_special_tokens=True)
            return [len(row) for row in rows]

        _MADE[kind] = ModelTokens(
            lambda texts: tokenizer.split(texts, add_special_tokens=False), count, 512, can_chunk_late=True
        )
    return _MADE[kind]


def row(text: str, num_title: int = 0) -> Row:
    return Row("d1", text, {"kept": 1}, "docs.jsonl:1", 7, num_title)


def chunks_of(text: str, model: ModelTokens, num_title: int = 0, **options: object) -> list[Chunk]:
    chunking = Chunking(**{"tokens": 32, **options})  # type: ignore[arg-type]
    chunks = list(Chunker(chunking, model).expand(row(text, num_title)))
    assert all(isinstance(chunk, Chunk) for chunk in chunks), chunks
    return chunks  # type: ignore[return-value]


def spans(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    return [(int(str(chunk.payload["chunk_start"])), int(str(chunk.payload["chunk_stop"]))) for chunk in chunks]


pieces = st.sampled_from(
    [
        *CORPUS,
        " ",
        "\n\n",
        "x" * 300,
        "👩‍👩‍👧‍👦" * 5,
        "é" * 40,
        "日本" * 60,
        "...",
        "\u0000\u200b",
        "ด" * 80,
        "1.",
        " J.",
        "\t",
        ")" * 30,
    ]
)
texts = st.one_of(st.lists(pieces, min_size=1, max_size=12).map("".join), st.text(min_size=1, max_size=300)).filter(
    str.strip
)
kinds = pytest.mark.parametrize("kind", MAKERS)


@kinds
@given(text=texts, tokens=st.sampled_from([24, 40, 90]), overlap=st.sampled_from([0, 4, 9]))
@settings(max_examples=60, deadline=None)
def test_chunks_are_slices_that_cover_the_text_within_the_limit(
    kind: str, text: str, tokens: int, overlap: int
) -> None:
    model = tokens_of(kind)
    chunks = chunks_of(text, model, tokens=tokens, overlap=overlap)
    ends = spans(chunks)
    assert [chunk.id for chunk in chunks] == [f"d1#{number}" for number in range(len(chunks))]
    for chunk, (start, stop) in zip(chunks, ends, strict=True):
        assert chunk.text == text[start:stop]
        assert chunk.text.strip() == chunk.text != ""
        assert chunk.payload["kept"] == 1
        assert (chunk.place, chunk.position, chunk.payload["chunk_of"]) == ("docs.jsonl:1", 7, "d1")
    assert max(model.count([chunk.text for chunk in chunks])) <= tokens
    covered = bytearray(len(text))
    for start, stop in ends:
        covered[start:stop] = b"\1" * (stop - start)
    assert all(covered[i] or character.isspace() for i, character in enumerate(text))
    for (start, stop), (next_start, next_stop) in pairwise(ends):
        assert start < next_start
        assert stop < next_stop
        if not overlap:
            assert next_start >= stop
        elif next_start < stop:  # as tokens of the text: by themselves, they may be others
            shared = model.split([text[:stop]])[0]
            assert sum(token.start is not None and token.start >= next_start for token in shared) <= overlap + 4


@kinds
@given(text=texts)
@settings(max_examples=30, deadline=None)
def test_a_text_is_cut_the_same_way_each_time(kind: str, text: str) -> None:
    model = tokens_of(kind)
    assert chunks_of(text, model, overlap=3) == chunks_of(text, model, overlap=3)


@kinds
def test_chunks_end_at_sentences_and_are_well_filled(kind: str) -> None:
    model = tokens_of(kind)
    sentences = [f"The quick brown fox jumps over dog {i}. " for i in range(200)]
    chunks = chunks_of("".join(sentences), model, tokens=100)
    assert all(chunk.text.endswith(".") for chunk in chunks)
    counts = model.count([chunk.text for chunk in chunks])
    assert min(counts[:-1]) > 60


@kinds
def test_an_overlap_begins_at_a_sentence(kind: str) -> None:
    model = tokens_of(kind)
    text = " ".join(f"It was {i}." for i in range(100))
    chunks = chunks_of(text, model, tokens=60, overlap=20)
    ends = spans(chunks)
    assert all(start < before for (start, _), (_, before) in zip(ends[1:], ends, strict=False))
    assert all(chunk.text.startswith("It was") for chunk in chunks)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four… Five", ["One.", " Two!", " Three?", " Four…", " Five"]),
        ('He said "No." Then he left.', ['He said "No."', " Then he left."]),
        ("J. R. Doe came. Then e.g. others", ["J. R. Doe came.", " Then e.g. others"]),
        ("1. Fish\n2. Bread", ["1. Fish\n", "2. Bread"]),
        ("日本語です。「はい。」次！最後", ["日本語です。", "「はい。」", "次！", "最後"]),  # noqa: RUF001
        ("पहला। दूसरा॥", ["पहला।", " दूसरा॥"]),
        ("كيف؟ جيد۔ نعم", ["كيف؟", " جيد۔", " نعم"]),  # noqa: RUF001
        ("a.b.c 3.14 x", ["a.b.c 3.14 x"]),
        ("one\n\n  two", ["one\n\n  ", "two"]),
    ],
)
def test_sentences_end_by_simple_rules(text: str, sentences: Sequence[str]) -> None:
    ends = [end for end in Borders(text)._sentences if end < len(text)]
    parts = [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert parts == list(sentences)


@kinds
def test_a_title_begins_the_first_chunk_or_all_of_them(kind: str) -> None:
    model = tokens_of(kind)
    title, body = "Fox and dog ", " ".join(CORPUS[:1] * 20)
    first = chunks_of(title + body, model, len(title), tokens=60)
    every = chunks_of(title + body, model, len(title), tokens=60, repeats_title=True)
    assert [chunk.text.startswith(title) for chunk in first] == [True] + [False] * (len(first) - 1)
    assert all(chunk.text.startswith(title) for chunk in every)
    for chunks in (first, every):
        assert max(model.count([chunk.text for chunk in chunks])) <= 60
        for chunk, (start, stop) in zip(chunks, spans(chunks), strict=True):
            assert chunk.text.removeprefix(title) == body[start:stop]
            assert chunk.num_title == (len(title) if chunk.text.startswith(title) else 0)


def test_a_title_as_long_as_a_text_is_cut_like_one() -> None:
    model = tokens_of("WordPiece")
    title, body = "fox " * 60, "and dog " * 60
    chunks = chunks_of(title + body, model, len(title), tokens=30, repeats_title=True)
    assert "".join(chunk.text.replace(" ", "") for chunk in chunks) == "fox" * 60 + "anddog" * 60
    slices = [body[start:stop] for start, stop in spans(chunks)]
    assert all(chunk.text.endswith(part) for chunk, part in zip(chunks, slices, strict=True))
    assert "".join(slices).replace(" ", "") == "anddog" * 60, "the positions are those in the text"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tokens": 6}, "so a chunk needs at least"),
        ({"tokens": 513}, "reads 512 tokens at most"),
        ({"tokens": 60, "overlap": 40}, "--overlap 40: it must be at most half"),
        ({"tokens": 60, "overlap": 4, "is_late": True}, "cannot be combined with --overlap or --repeat-title"),
        ({"tokens": 60, "repeats_title": True, "is_late": True}, "cannot be combined"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(BulkError, match=problem):
        Chunking(**options).check(tokens_of("WordPiece"), "mini")  # type: ignore[arg-type]
    Chunking(60, 20).check(tokens_of("WordPiece"), "mini")


def test_late_chunks_are_in_windows_that_the_model_reads() -> None:
    model = tokens_of("WordPiece")
    text = " ".join(CORPUS[:1] * 200)
    chunks = chunks_of(text, model, tokens=60, is_late=True)
    windows: dict[int | None, int] = {}
    for chunk in chunks:
        windows[chunk.window] = windows.get(chunk.window, 0) + len(model.split([chunk.text])[0])
    assert list(windows) == list(range(len(windows)))
    assert len(windows) > 2
    room = 512 - model.count([""])[0]
    assert all(room - 60 < num_tokens <= room for num_tokens in list(windows.values())[:-1])


def test_characters_that_make_too_many_tokens_are_a_bad_row() -> None:
    def count(texts: Sequence[str]) -> list[int]:
        return [2 + 100 * len(text) for text in texts]

    model = ModelTokens(tokens_of("WordPiece").split, count, 512)
    [bad] = Chunker(Chunking(50), model).expand(row("abc"))
    assert isinstance(bad, BadRow)
    assert "cannot be cut into chunks of 50 tokens" in bad.problem


def test_a_text_that_always_has_a_token_too_many_is_a_bad_row_after_some_attempts() -> None:
    attempts = 0

    def count(texts: Sequence[str]) -> list[int]:
        nonlocal attempts
        attempts += 1
        assert attempts < 100
        return [51 if text else 2 for text in texts]

    [bad] = Chunker(Chunking(50), ModelTokens(tokens_of("WordPiece").split, count, 512)).expand(row("a b c " * 100))

    assert isinstance(bad, BadRow)


@pytest.mark.parametrize(("num_words", "is_title"), [(10, True), (11, False)])
def test_a_title_has_at_most_half_of_a_chunk(num_words: int, is_title: bool) -> None:
    def count(texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    title = "fox " * num_words
    model = ModelTokens(tokens_of("WordPiece").split, count, 512)

    chunks = [*Chunker(Chunking(20, repeats_title=True), model).expand(row(title + "dog " * 50, len(title)))]

    assert [isinstance(chunk, Chunk) and chunk.num_title for chunk in chunks[:2]] == [len(title) if is_title else 0] * 2


@pytest.mark.parametrize("text", ["x", "ab " * 200, ("x" * 500 + " ") * 100])
def test_a_call_has_some_texts_but_neither_too_many_nor_too_large_ones(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A gateway refuses a request without texts, and one with too many."""
    monkeypatch.setattr("gateway.bulk.chunking._CALL_TEXTS", 8)
    monkeypatch.setattr("gateway.bulk.chunking._CALL_CHARACTERS", 1000)
    monkeypatch.setattr("gateway.bulk.chunking._WINDOW_CHARACTERS", 100)
    known, sizes = tokens_of("WordPiece"), list[int]()

    def split(texts: Sequence[str]) -> Sequence[Sequence[Token]]:
        assert 1 <= len(texts) <= 8
        assert sum(map(len, texts)) <= 1000 or len(texts) == 1
        sizes.append(len(texts))
        return known.split(texts)

    def count(texts: Sequence[str]) -> Sequence[int]:
        split(texts)
        return known.count(texts)

    title = "fox "
    chunker = Chunker(Chunking(24, is_late=True), ModelTokens(split, count, 512, can_chunk_late=True))

    assert all(isinstance(chunk, Chunk) for chunk in chunker.expand(row(title + text, len(title))))
    assert max(sizes) == (8 if len(text) > 10 else 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "." * n,
        lambda n: "\n" * n + "x",
        lambda n: ".)" * (n // 2),
        lambda n: "a" * n,
        lambda n: "日" * n,
        lambda n: "word. " * (n // 6),
        lambda n: "J. " * (n // 3),
    ],
    ids=["dots", "lines", "closers", "letters", "ideographs", "sentences", "initials"],
)
def test_no_text_takes_long(make: Callable[[int], str]) -> None:
    model = tokens_of("byte-level BPE")

    def seconds(length: int) -> float:
        started = time.thread_time()
        chunks_of(make(length), model, tokens=256, overlap=64)
        return time.thread_time() - started

    # The shortest of three, as other processes can make one several times as long.
    short, long = (min(seconds(length) for _ in range(3)) for length in (20_000, 80_000))
    assert long < 12 * max(short, 0.01)


def test_words_are_not_cut_in_code() -> None:
    model = tokens_of("byte-level BPE")
    code = "\n".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(40))
    names = set(re.findall(r"\w+", code))
    assert all(set(re.findall(r"\w+", chunk.text)) <= names for chunk in chunks_of(code, model, tokens=60))
