"""Other jobs and people at work in the same store: a job never mixes its vectors with those of another space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import chromadb
import lancedb
import psycopg
import pytest
from chromadb.config import Settings
from qdrant_client import models

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError, CountedSink, Row, Sink, SpaceNote
from gateway.bulk.stores.chroma_connection import Connection
from gateway.bulk.stores.protocol import MovableStore, SinkOptions
from gateway.bulk.stores.qdrant_sink import QdrantSink
from tests.bulk.stores.rows import NOTE, by_id, embedded, name_of, open_url, row, write
from tests.bulk.stores.test_contract import MOVABLE, STORES

OTHER = replace(NOTE, space="other@ba9876543210")
WIDE = replace(NOTE, space="wide@0123456789ab", model="wide", dimensions=6)


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{kind}_url"))


@pytest.fixture
def store(url: str) -> Iterator[MovableStore]:
    place = read_place(url)
    assert place is not None
    with closing(open_movable(place)) as opened:
        yield opened


@contextmanager
def sink_of(url: str, options: SinkOptions | None = None) -> Iterator[Sink]:
    store, collection = open_url(url)
    with closing(store), closing(store.sink(collection, options or SinkOptions())) as sink:
        yield sink


def drop(url: str, kind: str) -> None:
    """Delete a collection, as a person does with the store's own tools."""
    place = read_place(url)
    assert place is not None
    if kind == "lancedb":
        lancedb.connect(place.location).drop_table(place.collection)
    elif kind == "chroma":
        client = chromadb.PersistentClient(place.location, Settings(anonymized_telemetry=False))
        client.delete_collection(place.collection)
    else:
        with closing(open_movable(place)) as opened:
            opened.delete_collection(place.collection)


def test_two_jobs_that_create_one_collection_do_not_mix_their_spaces(
    url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look for the collection before either has created it."""
    with sink_of(url) as one, sink_of(url) as other:
        if kind == "chroma":  # which creates it at once
            find = Connection.find
            answers: list[Callable[..., object]] = [lambda *_: None]
            monkeypatch.setattr(
                Connection, "find", lambda self, name: answers.pop()(self) if answers else find(self, name)
            )
            one.open(NOTE)
            answers.append(lambda *_: None)
        elif kind == "qdrant":
            one.open(NOTE)
        else:
            other.open(OTHER)
            one.open(NOTE)
        one.write(0, embedded([row(1, "a")]))

        def write_other() -> None:
            if kind in {"chroma", "qdrant"}:
                other.open(OTHER)
            other.write(0, embedded([row(2, "b")], OTHER))

        with pytest.raises(BulkError, match=r"has vectors of tiny@0123456789ab, which cannot be compared with"):
            write_other()
    assert by_id(url) == {1: ("a", {})}


@pytest.mark.parametrize("note", [OTHER, WIDE, None], ids=["another space", "another width", "without a note"])
def test_a_collection_that_is_created_again_midway_gets_no_more_rows(
    url: str, kind: str, note: SpaceNote | None, request: pytest.FixtureRequest
) -> None:
    if note is None and kind not in MOVABLE:
        pytest.skip("only the gateway's own collections can be used there")
    with sink_of(url) as sink:
        sink.open(NOTE)
        sink.write(0, embedded([row(1, "a")]))
        drop(url, kind)
        write(url, [row(2, "b")], note or NOTE)
        if note is None:
            forget_note(url, kind, request)
        with pytest.raises(BulkError):
            sink.write(1, embedded([row(3, "c")]))
    assert by_id(url) == {2: ("b", {})}


def forget_note(url: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Let a collection look like that of another program."""
    name = name_of(url)
    store, _ = open_url(url)
    with closing(store):
        if kind == "qdrant":
            store._connection.client.update_collection(name, metadata={"embedding_gateway": None})  # type: ignore[attr-defined]
        elif kind == "milvus":
            store._client.drop_collection_properties(name, ["embedding_gateway"])  # type: ignore[attr-defined]
        else:
            store._connection.execute(f"COMMENT ON COLUMN {name}.embedding IS NULL".encode())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", MOVABLE)
def test_an_alias_that_is_redirected_midway_redirects_no_job(url: str, store: MovableStore) -> None:
    old, new, live = name_of(url), f"{name_of(url)}_2", f"{name_of(url)}_live"
    write(url, [row(n, f"text {n}") for n in range(3)])
    write(url.replace(old, new), [row(100, "new")], OTHER)
    store.flip(live, old)
    with (
        sink_of(url.replace(old, live)) as sink,
        closing(store.source(live, FieldNames())) as source,
    ):
        sink.open(NOTE)
        reading = source.read()
        assert isinstance(next(reading), Row)
        store.flip(live, new)
        sink.write(0, embedded([row(9, "late")]))
        rest = [found.id for found in reading if isinstance(found, Row)]
    assert set(by_id(url)) == {0, 1, 2, 9}
    assert set(by_id(url.replace(old, new))) == {100}
    assert set(rest) <= {1, 2, 9}
    assert len(rest) >= 2
    store.delete_alias(live)


def test_a_folder_of_qdrant_that_nothing_was_written_to_is_still_a_new_one(tmp_path: Path) -> None:
    with sink_of(f"qdrant:{tmp_path / 'q'}#docs") as sink:
        assert isinstance(sink, CountedSink)
        assert sink.count() == 0


def test_a_collection_that_a_program_creates_at_the_same_moment_is_not_deleted(
    qdrant_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = QdrantSink._create

    def late(sink: QdrantSink, note: SpaceNote, like: models.CollectionInfo | None) -> None:
        params = models.VectorParams(size=NOTE.dimensions, distance=models.Distance.COSINE)
        sink._call(lambda client: client.create_collection("docs", params))
        point = models.PointStruct(id=7, vector=[1.0] * NOTE.dimensions, payload={"text": "theirs"})
        sink._call(lambda client: client.upsert("docs", [point]))
        create(sink, note, like)

    monkeypatch.setattr(QdrantSink, "_create", late)
    with sink_of(qdrant_url) as sink, pytest.raises(BulkError, match="has 1 item and no note of"):
        sink.open(NOTE)
    assert by_id(qdrant_url) == {7: ("theirs", {})}


def test_views_that_are_dropped_while_they_are_listed_do_not_matter(pgvector_url: str, postgres: str) -> None:
    base, _, name = pgvector_url.rpartition("/")
    write(pgvector_url, [row(1, "a")], NOTE)
    place = read_place(base, has_collection=False)
    assert place is not None
    with (
        closing(open_movable(place)) as opened,
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(postgres) as other,
    ):
        for number in range(4):
            other.execute(f"CREATE VIEW v{number}_{name} AS SELECT * FROM {name}".encode())  # noqa: S608
        other.commit()
        other.execute(f"LOCK TABLE {name}".encode())
        listing = pool.submit(opened.aliases)
        while other.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is None:
            assert not listing.done()
        for number in range(1, 4):
            other.execute(f"DROP VIEW v{number}_{name}".encode())
        other.commit()
        assert [view for view in listing.result() if view.endswith(name)] == [f"v0_{name}"]
