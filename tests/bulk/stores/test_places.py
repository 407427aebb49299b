"""The URL of a source or sink names a store and a collection, and never a secret."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.opening import open_source
from gateway.bulk.places import open_store, read_place
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import MEM0_KEY, Place


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (
            "qdrant://localhost/docs",
            Place("qdrant", "docs", host="localhost", port=6333, key="QDRANT_API_KEY"),
        ),
        (
            "QDRANT+HTTPS://q.example.com:443/prefix/my%20docs?vector=dense&key_env=PROD_KEY",
            Place(
                "qdrant", "my docs", host="q.example.com", port=443, path="prefix", is_secure=True, key="PROD_KEY",
                options={"vector": "dense"},
            ),
        ),
        ("qdrant://host/prefix#a/b", Place("qdrant", "a/b", host="host", port=6333, path="prefix", key="QDRANT_API_KEY")),
        ("qdrant://[::1]:7000/docs", Place("qdrant", "docs", host="::1", port=7000, key="QDRANT_API_KEY")),
        ("qdrant:///data/q#docs", Place("qdrant", "docs", location="/data/q", key="QDRANT_API_KEY")),
        ("qdrant:/data/q#docs", Place("qdrant", "docs", location="/data/q", key="QDRANT_API_KEY")),
        ("qdrant:./q#docs", Place("qdrant", "docs", location="./q", key="QDRANT_API_KEY")),
        ("qdrant://./q#docs", Place("qdrant", "docs", location="./q", key="QDRANT_API_KEY")),
        ("qdrant:q#docs?vector=v", Place("qdrant", "docs", location="q", key="QDRANT_API_KEY", options={"vector": "v"})),
        ("qdrant:q?vector=v#docs", Place("qdrant", "docs", location="q", key="QDRANT_API_KEY", options={"vector": "v"})),
        ("milvus:./milvus.db#docs", Place("milvus", "docs", location="./milvus.db", key="MILVUS_TOKEN")),
        (
            "postgresql://ann@db/shop/docs",
            Place("pgvector", "docs", host="db", port=5432, user="ann", path="shop", key="PGPASSWORD"),
        ),
        ("lancedb:s3://bucket/folder#docs", Place("lancedb", "docs", location="s3://bucket/folder")),
        ("lance://data/lance#docs", Place("lancedb", "docs", location="data/lance")),
        ("chroma+https://c:1/docs", Place("chroma", "docs", host="c", port=1, is_secure=True, key="CHROMA_AUTH_TOKEN")),
    ],
)  # fmt: skip
def test_a_url_names_a_store_and_a_collection(url: str, place: Place) -> None:
    assert read_place(url) == place


@pytest.mark.parametrize(
    "path",
    [
        "docs.jsonl",
        "./data/*.parquet",
        "/data",
        "s3://bucket/docs.parquet",
        "hf://datasets/a/b",
        "file:///a.csv",
        "C:\\a.csv",
    ],
)
def test_everything_else_is_a_file(path: str) -> None:
    assert read_place(path) is None


@pytest.mark.parametrize(
    "url",
    ["qdrant://localhost:6334/docs", "qdrant+https://q/a/docs", "qdrant:./q#docs", "pgvector://ann@db:1/shop/docs"],
)
def test_the_name_of_a_place_opens_it_again(url: str) -> None:
    place = read_place(url)
    assert place is not None
    again = read_place(place.named(place.collection))
    assert again == place


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("qdrant://localhost/docs", "qdrant://LOCALHOST:6333/docs?vector=v", True),
        ("qdrant://localhost/docs", "qdrant+https://127.0.0.1:6333/docs?key_env=K", True),
        ("qdrant://localhost/docs", "qdrant://[::1]/docs", True),
        ("qdrant://localhost/docs", "qdrant://localhost/b/docs", False),
        ("qdrant://localhost/docs", "qdrant://127.0.0.2/docs", False),
        ("qdrant://localhost/docs", "qdrant://localhost:6334/docs", False),
        ("qdrant://no-such-host.invalid/docs", "qdrant://other.invalid/docs", False),
        ("milvus://localhost/docs", "milvus://root@localhost/default/docs", True),
        ("milvus://localhost/docs", "milvus://localhost/other/docs", False),
        ("chroma://h/docs", "chroma://h/docs?database=default_database", True),
        ("chroma://h/docs", "chroma://h/docs?database=archive", False),
        ("chroma://h/docs?tenant=a", "chroma://h/docs?tenant=b", False),
        ("qdrant:./q#docs", "qdrant:q/#docs", True),
        ("qdrant:./q#docs", "qdrant:./p#docs", False),
        ("lancedb:s3://b/f#docs", "lancedb:s3://b/f/#docs", True),
        ("lancedb:s3://b/f#docs", "lancedb:s3://b/g#docs", False),
        ("pgvector://%2Frun%2Fa/shop/docs", "pgvector://%2Frun%2Fb/shop/docs", False),
    ],
)
def test_two_urls_of_one_collection_are_recognized(one: str, other: str, are_same: bool) -> None:
    first, second = read_place(one), read_place(other)
    assert first is not None
    assert second is not None
    assert first.is_same_collection(second) is second.is_same_collection(first) is are_same


def test_servers_behind_one_proxy_are_not_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may tell them apart by their names; an address has no other name."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", ("203.0.113.7", 0))])
    hosts = ("a.cloud.example", "b.cloud.example", "203.0.113.7")
    one, other, address = (read_place(f"qdrant+https://{host}/docs") for host in hosts)
    assert one is not None
    assert other is not None
    assert address is not None
    assert not one.is_same_collection(other)
    assert one.is_same_collection(address)


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    place = read_place("qdrant://~/q#docs")
    assert place is not None
    assert place.location == "/home/ann/q"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("qdrnt://localhost/docs", "no store has the scheme `qdrnt`; did you mean `qdrant`? the stores are `qdrant`, "),
        ("qdant:./folder#docs", "no store has the scheme `qdant`; did you mean `qdrant`? the stores are `qdrant`, "),
        ("weaviate://localhost/docs", "no store has the scheme `weaviate`; the stores are `qdrant`, `milvus`, "),
        ("http://localhost:6333/docs", "`http://` does not name the kind of store: write one of `qdrant`"),
        ("qdrant+ssl://localhost/docs", "`qdrant+ssl` is not a scheme; write `qdrant` or `qdrant+https`"),
        ("lancedb+https:./lance#docs", "`lancedb+https` is not a scheme; write `lancedb`"),
        ("qdrant://localhost", "the URL of qdrant must end in a collection, such as `qdrant://localhost:6333/docs`"),
        ("qdrant:./q", "the URL of qdrant must end in a collection, such as `qdrant:./folder#docs`"),
        ("lancedb:./lance", "the URL of lancedb must end in a table"),
        ("qdrant:#docs", "the URL of qdrant has neither a host nor a folder"),
        ("pgvector:///shop#docs", "pgvector needs a server: write it like `pgvector://"),
        ("qdrant://localhost:port/docs", "the URL of qdrant has a malformed host or port"),
        (
            "qdrant://localhost/docs?vectr=a",
            "no option `vectr`; did you mean `vector`? its options are `key_env`, `vector`",
        ),
        ("qdrant://localhost/docs?vector=a&vector=b", "the URL of qdrant has the option `vector` twice"),
        ("qdrant:./q#docs?key_env=KEY", "a folder of qdrant needs no key: leave out `key_env=KEY`"),
        ("chroma://localhost/docs?x=a", "chroma has no option `x`; its options are `key_env`, `tenant`, `database`"),
    ],
)
def test_an_unusable_url_says_what_to_write(url: str, message: str) -> None:
    with pytest.raises(BulkError) as caught:
        read_place(url)
    assert message in str(caught.value)


def test_a_source_has_no_vector_to_name(tmp_path: Path) -> None:
    with pytest.raises(BulkError, match=r"the texts are read, but no vectors: leave out \?vector=, which is for --to"):
        open_source([f"qdrant:{tmp_path}#docs?vector=a"], FieldNames())


@pytest.mark.parametrize(
    "url",
    [
        "qdrant://:hunter2@localhost/docs",
        "qdrant://hunter2@localhost/docs",
        "pgvector://ann:hunter2@db/shop/docs",
        "pgvector://ann:hunter2/3@db/shop/docs",
        "qdrant://localhost/docs?api_key=hunter2",
        "qdrnt://:hunter2@localhost/docs",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BulkError) as caught:
        read_place(url)
    assert "hunter2" not in str(caught.value)


def test_the_place_of_a_key_is_named() -> None:
    place = read_place("qdrant://localhost/docs?key_env=MINE")
    assert place is not None
    assert place.remedy == "set the environment variable MINE, or name another with ?key_env=NAME"
    for key in (None, MEM0_KEY):
        assert replace(place, key=key).secret == "Mem0's configuration"
        assert replace(place, key=key).remedy == "set it in Mem0's configuration"


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    place = read_place("qdrant:./q#docs")
    assert place is not None
    with pytest.raises(BulkError, match=r'not installed: pip install "embedding-gateway\[qdrant\]"'):
        open_store(place)


def test_a_place_without_a_collection_is_a_store() -> None:
    place = read_place("qdrant+https://q/a", has_collection=False)
    assert place == Place("qdrant", host="q", port=6333, path="a", is_secure=True, key="QDRANT_API_KEY")
    assert place.store == "qdrant+https://q:6333/a"
