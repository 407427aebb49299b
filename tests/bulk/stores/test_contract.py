"""The rules for every store as a source and a sink, and for every store whose collections can move.

Files with the name of a store test its own settings and limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gateway.bulk.blocks import BlockReader
from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError, Json, Row, RowId, RowValidator
from gateway.bulk.stores.protocol import MovableStore, SinkOptions
from tests.bulk.stores.rows import (
    HYBRID,
    NOTE,
    WIDTH,
    by_id,
    count,
    embedded,
    name_of,
    open_url,
    read,
    row,
    vector_of,
    write,
)

PAYLOAD: dict[str, Json] = {
    "nested": {"list": [1, None, {"a": "ü"}]},
    "yes": True,
    "count": 3,
    "number": 0.1,
    "日本": "語\n\t\U0001f600",
}
WIDE = replace(NOTE, space="wide@0123456789ab", model="wide", dimensions=6)
OTHER = replace(NOTE, space="other@ba9876543210")

STORES = ["qdrant", "chroma", "lancedb", "milvus", "pgvector"]
MOVABLE = ["qdrant", "milvus", "pgvector"]
DENSE_ONLY = {"chroma": "can store only dense vectors", "pgvector": "one dense vector per row"}
NO_MULTIVECTORS = {**DENSE_ONLY, "milvus": "but no multi-vectors"}
SCORES = {"qdrant": 1, "milvus": 1, "pgvector": 0}
"""The score of an item whose vector is the query."""

_PAGES = {
    "qdrant": ["qdrant_source._PAGE"],
    "chroma": ["chroma_source._PAGE"],
    "lancedb": ["lancedb_source._BATCH"],
    "milvus": ["milvus_rows.PAGE"],
    "pgvector": ["pgvector_rows.PAGE", "pgvector._DIGEST_PAGE"],
}


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> str:
    """A collection that only this test uses; it does not exist yet."""
    return str(request.getfixturevalue(f"{kind}_url"))


@pytest.fixture
def _small_pages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _PAGES[kind]:
        monkeypatch.setattr(f"gateway.bulk.stores.{name}", 3)
    if kind == "milvus":
        monkeypatch.setattr("gateway.bulk.stores.milvus_rows.read_page.__defaults__", (3,))


@pytest.fixture
def store(url: str) -> Iterator[MovableStore]:
    place = read_place(url)
    assert place is not None
    with closing(open_movable(place)) as opened:
        yield opened


@pytest.fixture(params=[[5, 3, -1, 8, 2**62, 21, 34], ["5", "b", "B", "a/b'c\"d\ne\t", "Z", "ä", "{p}", "%s", "\\"]])
def ids(request: pytest.FixtureRequest) -> list[RowId]:
    return list(request.param)


# ----------------------------------------------------------------------------------------------------------- a sink


def test_rows_come_back_with_their_ids_text_and_payload(url: str, kind: str, ids: list[RowId]) -> None:
    payload = {**PAYLOAD, "nested": "flat"} if kind == "chroma" else PAYLOAD
    rows = [row(row_id, f"text of {row_id}", payload) for row_id in ids]

    write(url, rows)

    assert by_id(url) == {item.id: (item.text, item.payload) for item in rows}


def test_a_shard_again_replaces_its_rows(url: str, ids: list[RowId]) -> None:
    one, other = ids[:2]
    assert count(url) == 0
    write(url, [row(one, "a", {"old": 1}), row(other, "b")])
    assert count(url) == 2

    write(url, [row(one, "c", {"new": 2}), row(other, "b")])

    assert by_id(url) == {one: ("c", {"new": 2}), other: ("b", {})}


def test_a_job_continues_with_the_next_shard(url: str) -> None:
    write(url, [row(1, "a"), row(2, "b")])
    write(url, [row(3, "c")], shard=1)

    assert by_id(url) == {1: ("a", {}), 2: ("b", {}), 3: ("c", {})}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"space": "other@ba9876543210"},
            r"has vectors of tiny@0123456789ab, which cannot be compared with those of other@",
        ),
        ({"task": "query"}, r"has vectors for the task 'passage', but this job embeds for the task 'query'"),
        ({"task": None}, r"for the task 'passage', but this job embeds without a task"),
        ({"dimensions": 8}, r"has vectors of (width 4|4 dimensions), but this job's have 8"),
    ],
)
def test_another_space_is_refused_before_the_first_write(url: str, change: dict[str, object], message: str) -> None:
    write(url, [row(1, "a")])

    with pytest.raises(BulkError, match=message):
        write(url, [row(2, "b")], replace(NOTE, **change))

    assert list(by_id(url)) == [1]


def test_the_same_space_under_another_model_id_is_the_same(url: str) -> None:
    write(url, [row(1, "a")])
    write(url, [row(2, "b")], replace(NOTE, space="renamed@0123456789ab", model="renamed"))

    assert sorted(by_id(url), key=str) == [1, 2]


@pytest.mark.parametrize("kind", DENSE_ONLY)
def test_sparse_weights_that_a_store_cannot_keep_are_refused(url: str, kind: str) -> None:
    with pytest.raises(BulkError, match=DENSE_ONLY[kind]):
        write(url, [row(1, "a")], replace(NOTE, has_sparse=True))


@pytest.mark.parametrize("kind", NO_MULTIVECTORS)
def test_multivectors_that_a_store_cannot_keep_are_refused(url: str, kind: str) -> None:
    with pytest.raises(BulkError, match=NO_MULTIVECTORS[kind]):
        write(url, [row(1, "a")], replace(NOTE, token_width=3))


@pytest.mark.parametrize("kind", ["qdrant", "lancedb"])
def test_rows_with_all_outputs_come_back(url: str) -> None:
    rows = [row(n, "text" + "!" * n, {"n": n}) for n in range(5)]

    write(url, rows, HYBRID)
    write(url, rows[1:3], HYBRID)

    assert by_id(url) == {item.id: (item.text, item.payload) for item in rows}


@pytest.mark.parametrize("kind", ["qdrant", "chroma", "milvus", "pgvector"])
def test_a_note_of_another_space_is_not_overruled(url: str) -> None:
    """The user vouches for vectors without a note, not for those whose note says something else."""
    write(url, [row(1, "a")])

    with pytest.raises(BulkError, match="cannot be compared"):
        write(url, [row(2, "b")], OTHER, SinkOptions(adopts=True))


@pytest.mark.parametrize("kind", ["chroma", "milvus", "pgvector"])
@pytest.mark.parametrize(("first", "other"), [(1, "x"), ("x", 1)])
def test_an_id_of_another_kind_is_a_problem_of_its_row(url: str, kind: str, first: RowId, other: RowId) -> None:
    """The first row determines the kind of ids, and later the collection does."""
    for does_exist in [False, True]:
        opened, collection = open_url(url)
        sink = opened.sink(collection, SinkOptions())
        opened.close()
        with closing(sink):
            sink.open(NOTE)
            assert isinstance(sink, RowValidator)
            if not does_exist:
                assert sink.problem(row(first, "a")) == ""
            found = sink.problem(row(other, "b"))
            kinds = ("text", "integers") if isinstance(other, str) else ("an integer", "texts")
            assert found.startswith(f"its id {other!r} is {kinds[0]}, but the ids of ")
            assert found.endswith(f" are {kinds[1]}: use one kind of ids")
            sink.write(0, embedded([row(first, "a")]))
    assert list(by_id(url)) == [first]


class _Numbered:
    """A source of items with numbers as ids."""

    name, text_field, has_unique_ids = "numbers", "text", True

    def __init__(self, ids: range) -> None:
        self._ids = ids

    def read(self, after: Json = None) -> Iterator[Row]:
        yield from (row(number, f"text {number}") for number in self._ids)


RESERVED = {
    "qdrant": ("x", ["gateway_id"]),
    "chroma": (1, ["gateway_id", "", "$schema", "#x", "chroma:document"]),
    "milvus": (1, ["id", "vector", "sparse", "$meta"]),
}
"""Fields that a store needs itself, with an id for which it does."""


def test_a_field_that_a_store_would_lose_is_a_problem_of_its_row(url: str, kind: str) -> None:
    """Other stores keep fields of any name."""
    row_id, names = RESERVED.get(kind, (1, []))
    found, collection = open_url(url)
    with closing(found), closing(found.sink(collection, SinkOptions())) as sink:
        sink.open(NOTE)
        for name in names:
            assert isinstance(sink, RowValidator)
            assert f"it has a field `{name}`" in sink.problem(row(row_id, "x", {name: 1})) or not name
            assert sink.problem(row(row_id, "x", {name: 1}))
        payload: dict[str, Json] = {} if names else {"vector": 1, "$meta": {"a": 2}, "gateway_id": 3, "": 4}
        rows = [row(row_id, "x", {**payload, "kept": 5})]
        assert not isinstance(sink, RowValidator) or not sink.problem(rows[0])
        sink.write(0, embedded(rows))
    assert by_id(url) == {row_id: ("x", {**payload, "kept": 5})}


ODD: list[tuple[str, dict[str, Json]]] = [
    ("nul \0 in the text", {}),
    ("text", {"k": "nul \0"}),
    ("text", {"k": ["nul \0", {"l": "\0"}]}),
    ("text", {"nul \0": 1}),
    ("text\r\nof lines\u2028", {"k": "\r\n\x1f\u2029\ufeff"}),
    ("text", {"k": 2**63}),
    ("text", {"k": -(2**63)}),
    ("text", {"k": 2**64}),
    ("text", {"k": [2**63]}),
    ("text", {"k": {"l": [-(2**70)]}}),
    ("text", {"_score": 1, "_distance": 2.5, "_rowid": 3, "_rowaddr": 4, "_index": "x"}),
    ("text", {"k": 1e-300}),
    ("text", {"k": 0.1 + 0.2}),
    ("text", {"k": True}),
    ("text", {"a.b": 1, "a": "x", " ": "y", "'": "z", '"': "w"}),
    ("text", {"k": "x" * 70_000}),
]


def test_a_value_is_kept_exactly_or_is_a_problem_of_its_row(url: str, kind: str) -> None:
    kept = {}
    opened, collection = open_url(url)
    with closing(opened), closing(opened.sink(collection, SinkOptions())) as sink:
        sink.open(NOTE)
        for number, (text, payload) in enumerate(ODD):
            one = row(number, text, payload)
            if isinstance(sink, RowValidator) and sink.problem(one):
                continue
            sink.write(number, embedded([one]))
            kept[number] = (text, payload)
    found = by_id(url)
    assert found.keys() == kept.keys()
    for number, (text, payload) in kept.items():
        as_text = {
            name: str(value) if isinstance(value, str | int) else json.dumps(value) for name, value in payload.items()
        }
        assert found[number] in [(text, payload), *([(text, as_text)] if kind == "chroma" else [])], number


@pytest.mark.parametrize("kind", ["chroma", "lancedb", "milvus", "pgvector"])
def test_chunks_of_items_with_numbers_as_ids_are_stored_in_every_run(url: str, kind: str) -> None:
    """A chunk's id is a text, whatever the id of its item."""

    def expand(item: Row) -> list[Row]:
        return [replace(item, id=f"{item.id}#{number}") for number in range(2)]

    for run in range(2):  # the second one finds a collection of texts
        opened, collection = open_url(url)
        sink = opened.sink(collection, SinkOptions())
        opened.close()
        with closing(sink):
            sink.open(NOTE)
            assert isinstance(sink, RowValidator)
            source: Any = _Numbered(range(2 * run, 2 * run + 2))
            reader = BlockReader(source, lambda _ids: set(), 1, "stop", expand, sink.problem)
            for shard, block in enumerate(reader.read(None, 0)):
                sink.write(shard, embedded(block.rows))
    assert set(by_id(url)) == {f"{item}#{number}" for item in range(4) for number in range(2)}


# --------------------------------------------------------------------------------------------------------- a source


@pytest.mark.usefixtures("_small_pages")
def test_reading_continues_after_any_row(url: str, kind: str, ids: list[RowId]) -> None:
    write(url, [row(row_id, f"t {row_id}") for row_id in ids])
    rows = read(url)

    assert sorted(found.id for found in rows) == sorted(ids)  # type: ignore[type-var]
    if kind in {"milvus", "pgvector"}:
        assert [found.id for found in rows] == sorted(ids)  # type: ignore[type-var]
    for index, found in enumerate(rows):
        assert isinstance(found, Row)
        assert [other.id for other in read(url, after=found.position)] == [other.id for other in rows[index + 1 :]]


def test_a_source_knows_its_number_of_rows_and_its_text(url: str) -> None:
    write(url, [row(n, f"t {n}") for n in range(7)])
    opened, collection = open_url(url)
    source = opened.source(collection, FieldNames())
    opened.close()

    with closing(source):
        assert source.count() == 7
        assert source.text_field in {"text", "document"}
        assert source.fingerprint() == source.fingerprint()


def test_the_fingerprint_changes_with_the_fields(url: str) -> None:
    write(url, [row(1, "a", {"body": "b"})])
    opened, collection = open_url(url)
    fingerprints = set()
    for names in (FieldNames(), FieldNames(text="body")):
        with closing(opened.source(collection, names)) as source:
            fingerprints.add(source.fingerprint())
    opened.close()

    assert len(fingerprints) == 2


@pytest.mark.parametrize("kind", ["qdrant", "chroma"])
def test_an_empty_collection_has_no_rows(url: str) -> None:
    write(url, [])
    assert read(url) == []


def test_a_field_of_the_payload_can_be_the_id_and_the_text(url: str) -> None:
    write(url, [row(1, "a", {"key": "x", "body": "one"}), row(2, "b", {"key": "y", "body": "two"})])

    found = by_id(url, FieldNames(id="key", text="body"))

    assert {row_id: text for row_id, (text, _payload) in found.items()} == {"x": "one", "y": "two"}


def test_a_field_that_does_not_exist_is_an_error(url: str) -> None:
    write(url, [row(1, "a", {"body": "one"})])

    with pytest.raises(BulkError, match=r"--text bdoy: no such field; did you mean `body`\?"):
        read(url, FieldNames(text="bdoy"))


def test_a_collection_that_does_not_exist_is_an_error(url: str, kind: str) -> None:
    write(url, [row(1, "a")])
    name = name_of(url)
    hint = "" if kind in {"milvus", "pgvector"} else rf"; did you mean `{name}`\? it has `"

    with pytest.raises(BulkError, match=rf"no (collection|table) `{name[:-1]}`{hint}"):
        read(url.replace(name, name[:-1]))


def test_a_source_and_a_sink_share_a_store(url: str) -> None:
    write(url, [row(n, f"text {n}") for n in range(10)])
    copy = f"{name_of(url)}_copy"
    opened, collection = open_url(url)
    source, sink = opened.source(collection, FieldNames()), opened.sink(copy, SinkOptions())
    opened.close()

    sink.open(NOTE)
    with closing(source):
        rows = [found for found in source.read() if isinstance(found, Row)]
    with closing(sink):
        sink.write(0, embedded(rows))

    assert by_id(url) == by_id(url.replace(name_of(url), copy))


# ------------------------------------------------------------------------------------------------ a store that moves


@pytest.mark.parametrize("kind", MOVABLE)
@pytest.mark.usefixtures("_small_pages")
def test_digests_are_in_the_order_of_the_keys(url: str, store: MovableStore, ids: list[RowId]) -> None:
    write(url, [row(row_id, f"t {row_id}") for row_id in ids])

    assert [row_id for row_id, _digest in store.digests(name_of(url))] == sorted(ids, key=store.sort_key)


@pytest.mark.parametrize("kind", MOVABLE)
@pytest.mark.usefixtures("_small_pages")
def test_digests_find_the_changes_in_one_pass(url: str, store: MovableStore) -> None:
    name, copy = name_of(url), f"{name_of(url)}_copy"
    write(url, [row(n, f"text {n}", {"a": n, "b": [n]}) for n in range(20)])
    write(url.replace(name, copy), [row(n, f"text {n}", {"b": [n], "a": n}) for n in range(20)])
    assert list(store.digests(name)) == list(store.digests(copy))

    write(url, [row(7, "text 7", {"a": 7, "b": [8]}), row(50, "added")])
    store.delete_ids(name, [9, 99])

    changed = set(store.digests(name)) ^ set(store.digests(copy))
    assert {row_id for row_id, _ in changed} == {7, 9, 50}
    assert store.digests_of(name, [7, 9, 50]) == {
        row_id: digest for row_id, digest in store.digests(name) if row_id in (7, 50)
    }


@pytest.mark.parametrize("kind", MOVABLE)
def test_items_are_found_by_id_by_vector_and_deleted(
    url: str, kind: str, store: MovableStore, ids: list[RowId]
) -> None:
    name = name_of(url)
    write(url, [row(row_id, f"text of {row_id}", PAYLOAD) for row_id in ids])

    vectors = store.vectors(name, ids)
    hits = store.search(name, vector_of(f"text of {ids[2]}"), 3)
    found = [item for item in store.read_ids(name, [*ids[:3], 99, "absent"], FieldNames()) if isinstance(item, Row)]
    store.delete_ids(name, [*ids[1:], 99, "absent"])

    for row_id in ids:
        assert vectors[row_id].dtype == np.float32
        np.testing.assert_allclose(
            vectors[row_id], vector_of(f"text of {row_id}"), atol=1e-6 if kind == "qdrant" else 0
        )
    assert (hits[0].id, hits[0].score) == (ids[2], pytest.approx(SCORES[kind], abs=1e-5))
    assert len(hits) == 3
    assert {item.id: item.text for item in found} == {row_id: f"text of {row_id}" for row_id in ids[:3]}
    assert list(by_id(url)) == ids[:1]
    assert store.describe(name).count == 1


@pytest.mark.parametrize("kind", MOVABLE)
def test_a_name_flips_and_flips_back(url: str, store: MovableStore) -> None:
    old, new, live = name_of(url), f"{name_of(url)}_2", f"{name_of(url)}_live"
    write(url, [row(1, "old")])
    write(url.replace(old, new), [row(1, "new")], WIDE, SinkOptions(like=old))
    assert re.search("the name of an existing collection|is itself a table", store.why_not_flip(old))
    with pytest.raises(BulkError, match=re.escape(store.why_not_flip(old))):
        store.flip(old, new)
    assert store.why_not_flip(live) == ""

    for collection, text, note in ((old, "old", NOTE), (new, "new", WIDE), (old, "old", NOTE), (new, "new", WIDE)):
        store.flip(live, collection)
        assert store.aliases()[live] == collection
        found = store.describe(live)
        assert (found.name, list(found.notes.values())) == (collection, [note])
        assert by_id(url.replace(old, live))[1][0] == text

    with pytest.raises(BulkError, match=r"no (collection|table) `gone`"):
        store.flip(live, "gone")
    with pytest.raises(BulkError, match=r"still (points to the collection|in use by the view)"):
        store.delete_collection(new)
    store.delete_collection(old)
    store.delete_alias(live)
    assert live not in store.aliases()
    assert {old, new} & set(store.collections()) == {new}
    info = store.describe(new)
    assert (info.count, list(info.widths.values())) == (1, [WIDE.dimensions])


@pytest.mark.parametrize("kind", MOVABLE)
def test_a_copy_of_another_width_has_the_same_items(url: str, store: MovableStore) -> None:
    old, new = name_of(url), f"{name_of(url)}_wide"
    write(url, [row(n, f"text {n}", PAYLOAD) for n in range(5)])
    items = [found for found in read(url) if isinstance(found, Row)]

    for _ in range(2):
        write(url.replace(old, new), items, WIDE, SinkOptions(like=old))

    assert list(store.digests(old)) == list(store.digests(new))
    assert [list(store.describe(name).widths.values()) for name in (old, new)] == [[WIDTH], [WIDE.dimensions]]
    assert store.search(new, vector_of("text 3", WIDE.dimensions), 1)[0].id == 3
