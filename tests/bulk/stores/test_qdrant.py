"""Qdrant as a source, a sink and a store that can be moved: a real one, in a folder."""

from __future__ import annotations

import resource
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BadRow, BulkError, Json, Row, RowId
from gateway.bulk.stores.protocol import Since, SinkOptions
from gateway.bulk.stores.qdrant import QdrantStore
from gateway.bulk.stores.qdrant_points import point_id, problem_of, row_id_of
from tests.bulk.stores.rows import HYBRID, NOTE, by_id, embedded, open_url, read, row, vector_of, write

UUID = "9f0c2a56-7f0e-4c5e-a0b9-1d2f3a4b5c6d"
PAYLOAD: dict[str, Json] = {
    "nested": {"list": [1, None, {"a": "ü"}], "empty": {}},
    "none": None,
    "yes": True,
    "number": 0.1,
    "large": 2**53 + 1,
    "日本": "語\n\t\u0000\U0001f600",
    "date": "2026-11-26T03:30:00+00:00",
}


@pytest.fixture
def url(qdrant_url: str) -> str:
    return qdrant_url


@pytest.fixture
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_source._PAGE", 16)


def client(url: str) -> QdrantClient:
    place = read_place(url)
    assert place is not None
    return QdrantClient(path=place.location)


def store_of(url: str) -> QdrantStore:
    place = read_place(url)
    assert place is not None
    store = open_movable(place)
    assert isinstance(store, QdrantStore)
    return store


@pytest.mark.parametrize(
    ("row_id", "is_kept"),
    [(0, True), (2**64 - 1, True), (UUID, True), (-1, False), (2**64, False), ("5", False), ("a/ü", False), ("", False),
     (UUID.upper(), False), (UUID.replace("-", ""), False)],
)  # fmt: skip
def test_ids_that_qdrant_allows_are_kept_and_others_are_mapped(row_id: RowId, is_kept: bool) -> None:
    point = point_id(row_id)
    assert (point == row_id) is is_kept
    if isinstance(point, str):
        assert str(uuid.UUID(point)) == point
    assert row_id_of(point, {"gateway_id": row_id, "a": 1} if not is_kept else {"a": 1}) == (row_id, {"a": 1})


@pytest.mark.parametrize(
    ("row_id", "payload", "named"),
    [(2**64, {}, "id"), (-(2**63) - 1, {}, "id"), (1, {"a": {"b": [2**64]}}, "a"), ("x", {"a": 1, "c": -(2**70)}, "c")],
)
def test_an_integer_that_a_server_would_round_is_a_problem_of_its_row(
    row_id: RowId, payload: dict[str, Json], named: str
) -> None:
    """A server reads it as a floating-point number; a local folder would keep it."""
    assert named in problem_of(row(row_id, "text", payload))


def test_different_ids_are_different_points() -> None:
    ids: list[RowId] = [5, "5", -5, "-5", "int:5", "str:5", 2**64, str(2**64), UUID, UUID.replace("-", "")]
    assert len({point_id(row_id) for row_id in ids}) == len(ids)


def test_an_id_of_another_program_in_the_payload_is_payload() -> None:
    assert row_id_of(7, {"gateway_id": "x"}) == (7, {"gateway_id": "x"})
    assert row_id_of(7, {"gateway_id": [1]}) == (7, {"gateway_id": [1]})


def test_rows_come_back_with_their_ids_text_and_payload(url: str) -> None:
    rows = [row(3, "three", PAYLOAD), row("doc-1", "one"), row(UUID, "uuid", {"a": 1}), row(-4, "minus", PAYLOAD)]
    write(url, rows)
    assert by_id(url) == {row.id: (row.text, row.payload) for row in rows}
    qdrant = client(url)
    [point] = qdrant.retrieve("docs", [3], with_vectors=True)
    assert point.payload == {**PAYLOAD, "text": "three"}
    np.testing.assert_allclose(point.vector, vector_of("three"), atol=1e-6)
    [mapped] = qdrant.retrieve("docs", [str(point_id("doc-1"))])
    assert mapped.payload == {"text": "one", "gateway_id": "doc-1"}
    qdrant.close()


def test_all_outputs_are_kept_by_name(url: str) -> None:
    rows = [row(n, f"text {n}" + "!" * n) for n in range(6)]
    write(url, rows, HYBRID)
    qdrant = client(url)
    params = qdrant.get_collection("docs").config.params
    assert isinstance(params.vectors, dict)
    assert {name: (vector.size, vector.distance.value) for name, vector in params.vectors.items()} == {
        "dense": (4, "Cosine"),
        "multivector": (3, "Dot"),
    }
    expected = embedded(rows, HYBRID)
    assert expected.sparse
    assert expected.multivectors
    for index, point in enumerate(qdrant.scroll("docs", with_vectors=True)[0]):
        assert isinstance(point.vector, dict)
        np.testing.assert_allclose(point.vector["multivector"], expected.multivectors[index], atol=1e-6)
        sparse = point.vector["sparse"]
        assert isinstance(sparse, models.SparseVector)
        assert sparse.indices == expected.sparse[index].indices.tolist()
        assert sparse.values == expected.sparse[index].values.tolist()
    qdrant.close()
    store = store_of(url)
    for index, item in enumerate(rows):
        assert store.search("docs", vector_of(item.text), 1)[0].id == index
    assert store.search("docs", expected.sparse[5], 1)[0].id == 5
    store.close()


@pytest.mark.parametrize(
    ("note", "kinds"),
    [
        (replace(HYBRID, dimensions=0, token_width=0), ([], ["sparse"])),
        (replace(HYBRID, dimensions=0, has_sparse=False), (["multivector"], [])),
        (replace(HYBRID, token_width=0), (["dense"], ["sparse"])),
    ],
)
def test_each_mixture_of_outputs_has_its_vectors(url: str, note, kinds) -> None:
    write(url, [row(1, "one"), row(2, "two!")], note)
    qdrant = client(url)
    params = qdrant.get_collection("docs").config.params
    assert (list(params.vectors or {}), list(params.sparse_vectors or {})) == kinds
    assert all(point.vector for point in qdrant.scroll("docs", with_vectors=True)[0])
    qdrant.close()
    write(url, [row(3, "three")], note)
    assert len(by_id(url)) == 3


def test_vectors_that_are_not_normalized_get_the_dot_product(url: str) -> None:
    write(url, [row(1, "a")], replace(NOTE, is_normalized=False))
    qdrant = client(url)
    params = qdrant.get_collection("docs").config.params.vectors
    assert isinstance(params, models.VectorParams)
    assert params.distance == models.Distance.DOT
    qdrant.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_sparse": True}, "has no sparse vector, but this job has one per item"),
        ({"token_width": 3}, "has no multi-vector, but this job has one per item"),
        (
            {"is_normalized": False},
            "uses the distance Cosine, but tiny needs Dot, because its vectors are not normalized",
        ),
    ],
)
def test_other_outputs_and_distances_are_refused_before_the_first_write(
    url: str, change: dict[str, object], message: str
) -> None:
    write(url, [row(1, "a")])
    with pytest.raises(BulkError) as caught:
        write(url, [row(2, "b")], replace(NOTE, **change))
    assert message in str(caught.value)
    assert list(by_id(url)) == [1]


def test_vectors_without_a_note_are_refused_unless_the_user_knows_them(url: str) -> None:
    qdrant = client(url)
    qdrant.create_collection("docs", models.VectorParams(size=4, distance=models.Distance.COSINE), metadata={"mine": 1})
    qdrant.upsert("docs", [models.PointStruct(id=1, vector=[1, 0, 0, 0], payload={"text": "a"})])
    qdrant.close()
    with pytest.raises(BulkError, match=r"#docs has 1 item and no note of their space.* or add --adopt if"):
        write(url, [row(2, "b")])
    write(url, [row(2, "b")], options=SinkOptions(adopts=True))
    write(url, [row(3, "c")])
    with pytest.raises(BulkError, match="cannot be compared"):
        write(url, [row(3, "c")], replace(NOTE, space="other@ba9876543210"), SinkOptions(adopts=True))
    assert list(by_id(url)) == [1, 2, 3]
    store = store_of(url)
    assert store.describe("docs").notes == {"": NOTE}
    store.close()
    qdrant = client(url)
    assert (qdrant.get_collection("docs").config.metadata or {})["mine"] == 1
    qdrant.close()


def test_an_empty_collection_of_the_right_width_is_fine(url: str) -> None:
    qdrant = client(url)
    qdrant.create_collection("docs", {"body": models.VectorParams(size=4, distance=models.Distance.EUCLID)})
    qdrant.close()
    write(url, [row(1, "a")])
    assert list(by_id(url)) == [1]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"a": ("Cosine", 4), "b": ("Cosine", 4)}, "has several dense vectors, `a`, `b`: name one with ?vector="),
        ({"a": ("Cosine", 5)}, "the vector `a` of "),
        ({"a": ("Manhattan", 4)}, "uses the distance Manhattan, but tiny needs Dot or Cosine or Euclid"),
    ],
)
def test_an_empty_collection_that_does_not_fit_is_refused(url: str, vectors: dict, message: str) -> None:
    qdrant = client(url)
    config = {name: models.VectorParams(size=size, distance=distance) for name, (distance, size) in vectors.items()}
    qdrant.create_collection("docs", config)
    qdrant.close()
    with pytest.raises(BulkError) as caught:
        write(url, [row(1, "a")])
    assert message in str(caught.value)


def test_a_full_disk_is_an_error_of_the_job_and_the_same_rows_can_be_written_later(url: str) -> None:
    store, collection = open_url(url)
    rows = [row(n, f"text {n} " * 500) for n in range(200)]
    with closing(store), closing(store.sink(collection, SinkOptions())) as sink:
        sink.open(NOTE)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(BulkError, match=r"#docs: (disk I/O error|database or disk is full)"):
                sink.write(0, embedded(rows))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(url, rows)
    assert len(by_id(url)) == 200


def test_a_second_vector_is_added_to_items_that_stay_as_they_are(url: str) -> None:
    qdrant = client(url)
    qdrant.create_collection("docs", {"old": models.VectorParams(size=2, distance=models.Distance.DOT)})
    points = [
        models.PointStruct(id=n, vector={"old": [n, 1]}, payload={"data": f"memory {n}", "k": n}) for n in (1, 2, 3)
    ]
    qdrant.upsert("docs", points)
    qdrant.close()
    items = [item for item in read(url) if isinstance(item, Row)]
    qdrant = client(url)
    qdrant.delete("docs", [2])
    qdrant.close()
    write(f"{url}?vector=new", items, options=SinkOptions(updates=True))
    write(f"{url}?vector=new", items, options=SinkOptions(updates=True))
    qdrant = client(url)
    found = qdrant.scroll("docs", with_vectors=True)[0]
    assert [(point.id, point.payload) for point in found] == [(n, {"data": f"memory {n}", "k": n}) for n in (1, 3)]
    for point in found:
        assert isinstance(point.vector, dict)
        assert point.vector["old"] == [point.id, 1]
        np.testing.assert_allclose(point.vector["new"], vector_of(f"memory {point.id}"), atol=1e-6)
    qdrant.close()


@pytest.mark.usefixtures("_small_pages")
def test_reading_continues_after_a_position_while_points_come_and_go(url: str) -> None:
    write(url, [row(n, f"text {n}") for n in range(0, 120, 2)] + [row(str(uuid.UUID(int=n)), "u") for n in range(3)])
    store, collection = open_url(url)
    source = store.source(collection, FieldNames(text="text"))
    assert source.count() == 63
    reader = source.read()
    first = [next(reader) for _ in range(20)]
    assert [item.id for item in first] == list(range(0, 40, 2))
    write(url, [row(41, "later"), row(21, "before")])
    store_of(url).delete_ids("docs", [40, 42])
    rest = list(source.read(first[-1].position))
    expected = [41, *range(44, 120, 2), *(str(uuid.UUID(int=n)) for n in range(3))]
    assert [item.id for item in rest] == expected
    assert [item.id for item in source.read(rest[-1].position)] == []
    source.close()
    store.close()


def fill(url: str, *payloads: dict[str, Json]) -> None:
    """Make a collection without a note, as another program does."""
    qdrant = client(url)
    qdrant.create_collection("docs", models.VectorParams(size=4, distance=models.Distance.COSINE))
    points = [models.PointStruct(id=8 + n, vector=[1, 0, 0, 0], payload=payload) for n, payload in enumerate(payloads)]
    qdrant.upsert("docs", points)
    qdrant.close()


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ({"body": {"txt": "x"}, "n": 1}, "the text in field `body.text` is missing"),
        ({}, "the text in field `body.text` is missing"),
        ({"body": {"text": 5}}, "the text in field `body.text` must be text, got the number `5`"),
        ({"body": {"text": " \n"}}, "the text in field `body.text` is blank"),
    ],
)
def test_an_item_without_a_text_is_named_by_its_id(url: str, payload: dict[str, Json], problem: str) -> None:
    fill(url, {"body": {"text": "good"}}, payload)
    [good, bad] = read(url, FieldNames(text="body.text"))
    assert isinstance(good, Row)
    assert bad == BadRow(f"id 9 of {url}", problem, 9, 9)


def test_the_fields_that_exist_are_listed_for_one_that_does_not(url: str) -> None:
    fill(url, {"body": {"txt": "x"}, "n": 1})
    with pytest.raises(
        BulkError, match=r"--text body.text: no such field; did you mean `body.txt`\?.*body, body.txt, n"
    ):
        read(url, FieldNames(text="body.text"))


def test_a_field_called_id_is_payload_unless_it_is_asked_for(url: str) -> None:
    fill(url, {"id": "mine", "text": "a"}, {"id": "yours", "text": "b"})
    assert by_id(url) == {8: ("a", {"id": "mine"}), 9: ("b", {"id": "yours"})}
    assert by_id(url, FieldNames(id="id")) == {"mine": ("a", {}), "yours": ("b", {})}


def test_a_nested_text_goes_back_to_where_it_was(url: str) -> None:
    payload: dict[str, Json] = {"meta": {"body": "hello", "lang": "en"}, "k": 1}
    fill(url, payload)
    items = [item for item in read(url, FieldNames(text="meta.body")) if isinstance(item, Row)]
    assert [(item.text, item.payload) for item in items] == [("hello", {"meta": {"lang": "en"}, "k": 1})]
    write(url.replace("#docs", "#copy"), items, options=SinkOptions(text="meta.body"))
    store = store_of(url)
    assert list(store.digests("docs")) == list(store.digests("copy"))
    store.close()
    [chosen] = read(url, FieldNames(text="meta.body", payload=("meta.lang", "absent")))
    assert isinstance(chosen, Row)
    assert chosen.payload == {"lang": "en"}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"data": "memory", "user_id": "u"}, "memory"),
        ({"page_content": "page", "metadata": {}}, "page"),
        ({"content": 5, "text": "a"}, "a"),
    ],
)
def test_the_text_is_found_by_its_usual_name(url: str, payload: dict[str, Json], text: str) -> None:
    fill(url, payload)
    [item] = read(url)
    assert isinstance(item, Row)
    assert item.text == text


def test_a_text_without_a_usual_name_must_be_named(url: str) -> None:
    fill(url, {"summary": "a"})
    with pytest.raises(BulkError, match="name the text field with --text FIELD; the fields are: summary"):
        read(url)


# The client leaves the file of the lock open that it does not get.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_another_process_uses_is_an_error(url: str) -> None:
    qdrant = client(url)
    with pytest.raises(BulkError, match="cannot be opened as a Qdrant store: another process uses it"):
        write(url, [row(1, "a")])
    qdrant.close()
    write(url, [row(1, "a")])


def test_items_since_a_point_in_time(url: str) -> None:
    write(url, [row(n, "x", {"at": f"2026-11-2{n}T00:00:00Z", "n": n, "s": {"t": n * 1.5}}) for n in range(1, 6)])
    store, collection = open_url(url)
    for since in (Since("at", datetime(2026, 11, 23, tzinfo=UTC)), Since("n", 3), Since("s.t", 4.5)):
        source = store.source(collection, FieldNames(), since)
        assert [item.id for item in source.read()] == [4, 5]
        assert source.count() == 2
        source.close()
    store.close()


@pytest.mark.usefixtures("_small_pages")
def test_digests_find_the_changes_in_one_pass(url: str) -> None:
    store = store_of(url)
    write(url, [row(n, f"text {n}", {"a": n, "b": [n]}) for n in range(40)] + [row("x", "mapped")])
    write(
        url.replace("#docs", "#new"),
        [row(n, f"text {n}", {"b": [n], "a": n}) for n in range(40)] + [row("x", "mapped")],
    )
    before = list(store.digests("docs"))
    assert before == list(store.digests("new"))
    keys = [store.sort_key(row_id) for row_id, _ in before]
    assert keys == sorted(keys)
    write(url, [row(7, "text 7", {"a": 7, "b": [8]}), row("y", "added")])
    store.delete_ids("docs", [9, "absent"])
    changed = set(store.digests("docs")) ^ set(store.digests("new"))
    assert {row_id for row_id, _ in changed} == {7, 9, "y"}
    assert {item.id for item in store.read_ids("docs", [7, 9, "y", "x"], FieldNames())} == {7, "y", "x"}
    store.close()


def test_a_note_that_a_program_has_damaged_is_an_error(url: str) -> None:
    write(url, [row(1, "a")])
    qdrant = client(url)
    qdrant.update_collection("docs", metadata={"embedding_gateway": {"": {"space": 5}}})
    qdrant.close()
    with pytest.raises(BulkError, match=r"the note 'embedding_gateway' in the metadata of .* cannot be read"):
        write(url, [row(1, "a")])


def test_a_collection_like_another_one_has_its_settings_and_other_vectors(url: str) -> None:
    qdrant = client(url)
    qdrant.create_collection(
        "docs",
        {"": models.VectorParams(size=2, distance=models.Distance.EUCLID, on_disk=True)},
        sparse_vectors_config={"bm25": models.SparseVectorParams(modifier=models.Modifier.IDF)},
        metadata={"mine": 1},
    )
    bm25 = models.SparseVector(indices=[7], values=[0.5])
    vectors: list[models.VectorStruct] = [{"": [1, 2], "bm25": bm25}, {"": [2, 1]}]
    points = [models.PointStruct(id=n, vector=vector, payload={"data": f"{n}"}) for n, vector in enumerate(vectors)]
    qdrant.upsert("docs", points)
    qdrant.close()
    items = [item for item in read(url) if isinstance(item, Row)]
    copy = url.replace("#docs", "#copy")
    for _ in range(2):
        write(copy, [*items, row(9, "new")], options=SinkOptions(text="data", like="docs"))
    store = store_of(url)
    assert list(store.digests("copy"))[:2] == list(store.digests("docs"))
    found = store.vectors("copy", [0, 9, 5])
    assert list(found) == [0, 9]
    np.testing.assert_allclose(found[0], vector_of("0"), atol=1e-6)
    assert found[0].dtype == np.float32
    store.close()
    qdrant = client(url)
    config = qdrant.get_collection("copy").config
    assert isinstance(config.params.vectors, models.VectorParams)
    assert (config.params.vectors.size, config.params.vectors.on_disk) == (4, True)
    assert config.params.sparse_vectors == {"bm25": models.SparseVectorParams(modifier=models.Modifier.IDF)}
    assert config.metadata is not None
    assert config.metadata["mine"] == 1
    found_points = qdrant.scroll("copy", with_vectors=["bm25"])[0]
    assert {point.id: point.vector for point in found_points} == {0: {"bm25": bm25}, 1: {}, 9: {}}
    qdrant.close()


def test_a_large_shard_is_several_requests(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_sink._MAX_NUMBERS", 10)
    sizes = []
    upsert = QdrantClient.upsert

    def counting_upsert(
        self: QdrantClient, name: str, points: list[models.PointStruct], wait: bool
    ) -> models.UpdateResult:
        sizes.append(len(points))
        return upsert(self, name, points, wait)

    monkeypatch.setattr(QdrantClient, "upsert", counting_upsert)
    write(url, [row(n, f"text {n}") for n in range(7)])
    assert sizes == [2, 2, 2, 1]
    assert len(by_id(url)) == 7
