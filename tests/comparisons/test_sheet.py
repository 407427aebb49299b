"""The file for people's grades: changed one grade at a time, with every other byte kept."""

from __future__ import annotations

import pytest

from gateway.comparisons.sheet import HEADER, Sheet, form_line, form_text
from gateway.errors import CompareError

ROWS = [
    ("q1", "d1", "", 'a "query"', '"quoted" text'),
    ("q1", 'd "2"', "2", 'a "query"', " =1+1"),
    ("q 2", "d1", "", "another", "tab\tand é"),
]
PLAIN = b"".join(map(form_line, [HEADER, *ROWS]))


def scores(content: bytes) -> dict[tuple[str, str], int | None]:
    return {pair: row.score for pair, row in Sheet(content).pairs.items()}


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN.replace(b"\n", b"\r\n"),  # as Windows writes it
        PLAIN.removesuffix(b"\n"),
        PLAIN.replace(b"\n", b"\n\n"),
        b"".join(form_line(columns[:3]) for columns in (HEADER, *ROWS)),  # without the texts
        b"".join(form_line((*columns, "my note")) for columns in (HEADER, *ROWS)),
    ],
    ids=["as written", "with a mark and CR LF", "no last line end", "blank lines", "no texts", "a column more"],
)
def test_a_grade_changes_only_its_own_line(content: bytes) -> None:
    changed = b"".join(Sheet(content).with_score("q 2", "d1", 3))
    assert scores(changed) == {("q1", "d1"): None, ("q1", 'd "2"'): 2, ("q 2", "d1"): 3}
    others = [[line for line in one.splitlines() if b"q 2" not in line] for one in (changed, content)]
    assert others[0] == others[1]
    assert b"".join(Sheet(changed).with_score("q 2", "d1", None)) == content


def test_texts_are_read_as_people_should_see_them() -> None:
    first, second, third = Sheet(PLAIN).pairs.values()
    assert (first.query_text, first.document_text) == ('a "query"', '"quoted" text')
    assert second.document_text == "=1+1"  # the space is for spreadsheets
    assert third.document_text == "tab\tand é"
    assert next(iter(Sheet(b"query-id\tcorpus-id\tscore\nq\td\t1\n").pairs.values())).document_text == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one\0two", "one two"),
        ("\x1b[31mred\x07\x7f\x85 \u2028two", "[31mred two"),
        ("\0=1+1", " =1+1"),
        ("Füße 日本 e\u0301", "Füße 日本 e\u0301"),
        ("\ud800", "?"),
    ],
)
def test_a_text_that_a_spreadsheet_would_cut_or_refuse_is_kept_as_words(text: str, kept: str) -> None:
    line = form_line(("q", "d", "1", form_text(text), "next"))
    assert line.decode() == f"q\td\t1\t{kept}\tnext\n"
    assert next(iter(Sheet(form_line(HEADER) + line).pairs.values())).document_text == "next"


def test_a_pair_in_two_lines_is_one_pair() -> None:
    twice = PLAIN + form_line(("q1", "d1", "1", "", ""))
    assert scores(twice)["q1", "d1"] == 1
    assert b"\t1\t" not in b"".join(Sheet(twice).with_score("q1", "d1", 0))
    with pytest.raises(
        CompareError, match=r"judge_check.tsv:6: query 'q1' and document 'd1' have score 3, and 1 earlier"
    ):
        Sheet(twice + form_line(("q1", "d1", "3", "", "")))


def test_a_file_with_very_many_pairs_is_refused() -> None:
    with pytest.raises(CompareError, match="has 60,000 pairs; the limit is 50,000"):
        Sheet(PLAIN[: PLAIN.index(b"\n") + 1] + b"q\td\t\n" * 60_000)


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"a\tb\tc\n", PLAIN + b"q\td\t4\n", PLAIN + b"\xff\n", PLAIN + b"q\n"]
)
def test_a_mistake_is_named_with_its_line(content: bytes) -> None:
    if content.strip():
        with pytest.raises(CompareError, match=r"judge_check.tsv:\d"):
            Sheet(content)
    else:
        assert not Sheet(content).pairs
