"""The fields of a record that become a row, and the errors for invalid fields."""

from __future__ import annotations

import pytest

from gateway.bulk.fields import FieldNames, Fields, resolve_fields
from gateway.bulk.rows import BadRow, BulkError, Row

BEIR = {"_id": "d1", "title": "Title", "text": "Text", "meta": {"lang": "en", "tags": ["a"]}}


def row_of(record: dict[str, object], **names: object) -> Row | BadRow:
    fields = resolve_fields(FieldNames(**names), [record], "docs.jsonl")  # type: ignore[arg-type]
    return fields.row(record, "docs.jsonl:1", 1)  # type: ignore[arg-type]


def test_the_usual_names_are_found_and_all_other_fields_are_payload() -> None:
    assert row_of(BEIR) == Row("d1", "Text", {"title": "Title", "meta": BEIR["meta"]}, "docs.jsonl:1", 1)


def test_a_text_inside_a_field_is_taken_out_of_the_payload() -> None:
    row = row_of({"id": 1, "meta": {"body.raw": "deep", "lang": "en"}, "n": 2}, text="meta.body.raw")
    names = ("meta", "body.raw")
    assert row == Row(1, "deep", {"meta": {"lang": "en"}, "n": 2}, "docs.jsonl:1", 1, text_names=names)


def test_id_is_preferred_to_underscore_id_and_text_to_content() -> None:
    row = row_of({"_id": "b", "id": 7, "content": "no", "text": "yes"})
    assert (row.id, getattr(row, "text", None)) == (7, "yes")


def test_a_title_is_put_before_the_text() -> None:
    assert getattr(row_of(BEIR, title="title"), "text", None) == "Title Text"
    assert getattr(row_of({"text": "Text", "title": None, "id": 1}, title="title"), "text", None) == "Text"


def test_paths_lead_into_fields_and_name_the_payload_by_their_last_part() -> None:
    record = {"id": 1, "payload": {"text": "deep", "a": {"b": 2}}, "dotted.name": "as written"}
    row = row_of(record, text="payload.text", payload=("payload.a.b", "dotted.name", "absent"))
    assert isinstance(row, Row)
    assert (row.text, row.payload) == ("deep", {"b": 2, "name": "as written"})


@pytest.mark.parametrize(
    ("record", "names", "message"),
    [
        ({"id": 1, "body": "x"}, {}, "docs.jsonl: no field is called "
         "`text` or `content` or `page_content` or `document` or `data`: name the text field with "
         "--text FIELD; the fields are: id, body"),
        ({"id": 1, "text": "x"}, {"text": "txet"}, "--text txet: no such field; did you mean `text`?"),
        ({"id": 1, "text": "x"}, {"id": "key"}, "--id key: no such field; the fields are: id, text"),
        ({"id": 1, "text": "x"}, {"payload": ("a.x", "b.x")}, "has a.x and b.x, and both would be stored as `x`"),
        ({}, {}, "the first records have no fields"),
        ({"id": 1, "a": {"text": "x"}}, {}, "the fields are: id, a, a.text"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_an_error_that_lists_the_fields(
    record: dict[str, object], names: dict[str, object], message: str
) -> None:
    with pytest.raises(BulkError) as caught:
        row_of(record, **names)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"id": 1}, "the text in field `text` is missing"),
        ({"id": 1, "text": None}, "the text in field `text` must be text, got nothing"),
        ({"id": 1, "text": 5}, "the text in field `text` must be text, got the number `5`"),
        ({"id": 1, "text": ""}, "the text in field `text` is empty"),
        ({"id": 1, "text": " \n"}, "the text in field `text` is blank"),
        ({"id": 1, "text": "a\ud800"}, "is not valid Unicode: it contains a lone surrogate"),
        ({"text": "x"}, "the id in field `id` is missing"),
        ({"id": 1.5, "text": "x"}, "must be text or an integer, got the number `1.5`"),
        ({"id": True, "text": "x"}, "must be text or an integer, got `true`"),
        ({"id": "", "text": "x"}, "must be text or an integer, got an empty text"),
        ({"id": "i" * 1025, "text": "x"}, "has 1,025 characters; the limit is 1,024"),
        ({"id": "\udc00", "text": "x"}, "the id in field `id` is not valid Unicode"),
        ({"id": 1, "text": "x", "title": 3}, "the title in field `title` must be text, got the number `3`"),
    ],
)
def test_a_record_that_cannot_be_embedded_says_why(record: dict[str, object], problem: str) -> None:
    bad = Fields("id", "text", "title").row(record, "docs.jsonl:9", 9)  # type: ignore[arg-type]
    assert isinstance(bad, BadRow)
    assert problem in bad.problem
    assert (bad.place, bad.position) == ("docs.jsonl:9", 9)
    is_id_known = "the id" not in bad.problem
    assert bad.id == (record["id"] if is_id_known else None)
