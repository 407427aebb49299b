"""Collections to move in real stores, and models whose vectors depend only on the text."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from rich.console import Console

from gateway.bulk.embedder import TextVectors
from gateway.bulk.fields import FieldNames
from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.moving import work
from gateway.bulk.moving.planning import StartRequest
from gateway.bulk.moving.state import Move
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Json, Row, RowId, SpaceNote
from gateway.bulk.stores.protocol import MovableStore, SinkOptions

WIDTHS = {"old": 8, "new": 12, "twin": 8}


def vector_of(model: str, text: str) -> np.ndarray:
    """Return the vector of a text, which depends on the model; texts with the same first word are near each other."""

    def draw(part: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(f"{model} {part}".encode()).digest()[:8])
        return np.random.default_rng(seed).standard_normal(WIDTHS[model]).astype(np.float32)

    vector = 2 * draw(text.split(maxsplit=1)[0]) + draw(text)
    return vector / np.linalg.norm(vector)


class HashModel:
    """An embedder.

    Attributes:
        note_of: notes instead of the usual ones, by model.
    """

    note_of: ClassVar[dict[str, SpaceNote]] = {}

    def __init__(self, model: str, on_call: Callable[[Sequence[str]], None]) -> None:
        usual = SpaceNote(f"{model}@{model:0>12}", model, None, WIDTHS[model], is_normalized=True)
        self.note = self.note_of.get(model, usual)
        self.max_texts, self.max_characters, self.num_calls, self.block_texts = 16, 10_000, 2, 32
        self._on_call = on_call

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        self._on_call(texts)
        dense = np.stack([vector_of(self.note.model, text) for text in texts])
        return TextVectors(dense, len(texts), 0)


@dataclass
class Models:
    """The models, and the effect of a call.

    Attributes:
        texts: that were embedded.
    """

    texts: list[str] = field(default_factory=list)
    on_call: Callable[[Sequence[str]], None] = lambda _texts: None

    def called(self, texts: Sequence[str]) -> None:
        self.texts += texts
        self.on_call(texts)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """Put the models in the place of a gateway's."""
    found = Models()

    @asynccontextmanager
    async def open_embedder(asked: ModelSpec, _models: object, _console: object) -> AsyncIterator[HashModel]:
        if asked.name not in WIDTHS:
            raise BulkError(f"--model {asked.name}: no such model")
        yield HashModel(asked.name, found.called)

    monkeypatch.setattr(work, "open_embedder", open_embedder)
    monkeypatch.setattr(work, "models_at", lambda *_: None)
    return found


@pytest.fixture(scope="session")
def milvus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("milvus") / "m.db"


@pytest.fixture(params=["pgvector", "milvus", "qdrant"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store; its collections may be there already."""
    if request.param == "milvus":
        return f"milvus:{request.getfixturevalue('milvus_file')}"
    if request.param == "qdrant":
        return f"qdrant:{tmp_path / 'qdrant'}"
    return pgvector_url(request.getfixturevalue("postgres"))


@pytest.fixture
def pgvector(postgres: str) -> str:
    """The URL of a PostgreSQL."""
    return pgvector_url(postgres)


def pgvector_url(address: str) -> str:
    socket = parse_qs(urlsplit(address).query)["host"][0]
    return f"pgvector://postgres@{quote(socket, safe='')}/postgres"


class Shop:
    """A collection as an application uses it, in the space of a model. It is closed at the end of its test."""

    open: ClassVar[list[Shop]] = []

    def __init__(self, url: str, collection: str, model: str = "old") -> None:
        place = read_place(url, has_collection=False)
        assert place is not None
        self.store: MovableStore = open_movable(place)
        self.url, self.collection, self.model = url, collection, model
        self._options = SinkOptions("text", place.options.get("vector"))
        self.open.append(self)

    def close(self) -> None:
        """Close the connection, once."""
        if self in self.open:
            self.open.remove(self)
            self.store.close()

    def put(self, items: dict[RowId, str], more: dict[str, Json] | None = None, *, model: str | None = None) -> None:
        """Add or replace items."""
        model = model or self.model
        rows = [Row(row_id, text, {"n": 1, **(more or {})}, str(row_id), None) for row_id, text in items.items()]
        with closing(self.store.sink(self.collection, self._options)) as sink:
            sink.open(HashModel(model, lambda _texts: None).note)
            sink.write(0, EmbeddedRows(rows, np.stack([vector_of(model, row.text) for row in rows])))

    def delete(self, *ids: RowId) -> None:
        self.store.delete_ids(self.collection, ids)

    def content(self) -> dict[RowId, tuple[str, dict[str, Json]]]:
        """Return the text and payload of all items."""
        with closing(self.store.source(self.collection, FieldNames(text="text"))) as source:
            rows = list(source.read())
        assert not [row for row in rows if isinstance(row, BadRow)]
        return {row.id: (row.text, dict(row.payload)) for row in rows if isinstance(row, Row)}

    def check_vectors(self) -> None:
        """Check that each item has the vector that this model makes of its text."""
        content = self.content()
        vectors = self.store.vectors(self.collection, list(content))
        assert vectors.keys() == content.keys()
        for row_id, (text, _payload) in content.items():
            np.testing.assert_allclose(vectors[row_id], vector_of(self.model, text), atol=1e-5)


@pytest.fixture
def shop(pgvector: str) -> Iterator[Shop]:
    """A collection of 50 items in PostgreSQL."""
    with closing_shop(pgvector) as found:
        yield found


@pytest.fixture
def any_shop(store_url: str) -> Iterator[Shop]:
    """The same in each of the stores."""
    with closing_shop(store_url) as found:
        yield found


@contextmanager
def closing_shop(url: str) -> Iterator[Shop]:
    found = Shop(url, f"docs_{uuid.uuid4().hex[:12]}")
    found.put({n: f"word{n % 5} text {n}" for n in range(50)})
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(autouse=True)
def close_shops() -> Iterator[None]:
    """Close everything that a test has opened, even if it fails: an open connection would break a later test."""
    yield
    for shop in [*Shop.open]:
        shop.close()


@pytest.fixture
def console() -> Console:
    """A console whose text can be read: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=400)


def request_for(shop: Shop, **changes: object) -> StartRequest:
    """Return the options of a move to the model ``new``."""
    options: dict[str, object] = {
        "collection": shop.collection, "store": shop.url, "model": "new", "text": None, "into": None,
        "into_vector": None, "alias": None,
        "mem0": None, "url": None, "models": None, "api_key_env": "KEY", "skips": False,
    }  # fmt: skip
    return StartRequest(**(options | changes))  # type: ignore[arg-type]


def copy_of(shop: Shop, move: Move, model: str = "new") -> Shop:
    """Return the new collection of a move."""
    return Shop(shop.url, move.pairs[0].new, model)
