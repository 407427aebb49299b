"""A collection in each store that a test has for itself; the store's server or folder is shared where it is slow to open."""

from __future__ import annotations

import uuid
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psycopg
import pytest


@pytest.fixture
def qdrant_url(tmp_path: Path) -> str:
    return f"qdrant:{tmp_path / 'q'}#docs"


@pytest.fixture
def lancedb_url(tmp_path: Path) -> str:
    return f"lancedb:{tmp_path / 'lance'}#docs"


@pytest.fixture(scope="session")
def chroma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all tests, since opening one takes a quarter of a second."""
    return tmp_path_factory.mktemp("chroma")


@pytest.fixture
def chroma_url(chroma_folder: Path) -> str:
    return f"chroma:{chroma_folder}#c{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def milvus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for all tests, since a server runs for each until the process ends."""
    return tmp_path_factory.mktemp("milvus") / "m.db"


@pytest.fixture
def milvus_url(milvus_file: Path) -> str:
    return f"milvus:{milvus_file}#t{uuid.uuid4().hex}"


@pytest.fixture
def pgvector_base(postgres: str) -> str:
    """The database's URL, without a table."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    socket = parse_qs(urlsplit(postgres).query)["host"][0]
    return f"pgvector://postgres@{quote(socket, safe='')}/postgres"


@pytest.fixture
def pgvector_url(pgvector_base: str) -> str:
    return f"{pgvector_base}/t{uuid.uuid4().hex}"
