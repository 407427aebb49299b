"""A PostgreSQL server that stops responding, or is slow for a good reason."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg
import pytest

from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError
from gateway.bulk.stores import pgvector_connection
from gateway.bulk.stores.protocol import MovableStore


@contextmanager
def frozen(address: str) -> Iterator[None]:
    """Stop all processes of a server within the context; its kernel still accepts connections."""
    folder = Path(parse_qs(urlsplit(address).query)["host"][0])
    server = psutil.Process(int((folder / "postmaster.pid").read_text().splitlines()[0]))
    _send(server, signal.SIGSTOP)  # first: it starts the others
    others = server.children(recursive=True)
    for process in others:
        _send(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in (server, *others):
            _send(process, signal.SIGCONT)


def _send(process: psutil.Process, signum: signal.Signals) -> None:
    # A worker of the server may end at any moment, and the server may collect it as soon as it runs again.
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


@pytest.fixture
def store(pgvector_base: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[MovableStore]:
    monkeypatch.setattr(pgvector_connection, "_SILENCE_S", 0.2)
    monkeypatch.setattr(pgvector_connection, "_CONNECT_S", 2)
    monkeypatch.setattr("gateway.bulk.stores.pgvector_session.PATIENCE_S", 0.0)
    place = read_place(pgvector_base, has_collection=False)
    assert place is not None
    with closing(open_movable(place)) as opened:
        yield opened


def test_a_frozen_server_ends_a_request_and_can_be_used_again_later(store: MovableStore, postgres: str) -> None:
    with (
        frozen(postgres),
        pytest.raises(
            BulkError,
            match=r"cannot be reached, or has gone away: no response for \d+ s, and none to a new connection either",
        ),
    ):
        store.collections()
    store.collections()


def test_a_frozen_server_ends_the_attempt_to_connect(store: MovableStore, pgvector_base: str, postgres: str) -> None:
    place = read_place(pgvector_base, has_collection=False)
    assert place is not None
    with frozen(postgres), pytest.raises(BulkError, match="connection timeout expired"):
        open_movable(place)


def test_a_statement_may_take_as_long_as_it_needs(store: MovableStore) -> None:
    connection = store._connection  # type: ignore[attr-defined]
    assert connection.execute("SELECT 1 FROM pg_sleep(1)").fetchone() == (1,)


def test_a_lock_that_another_program_holds_is_named(store: MovableStore, postgres: str) -> None:
    connection = store._connection  # type: ignore[attr-defined]
    assert connection.execute("SHOW lock_timeout").fetchone() == ("1min",)
    connection.execute("SET lock_timeout = '50ms'")
    connection.execute("CREATE TABLE locked (id bigint PRIMARY KEY, embedding vector(3), text text)")
    with psycopg.connect(postgres) as other:
        other.execute("LOCK TABLE locked")
        with pytest.raises(
            BulkError, match=r"another program's transaction holds a lock: end that transaction or wait for it, and run"
        ):
            store.delete_ids("locked", [1])


@pytest.mark.parametrize("mode", ["requir", "on"])
def test_an_unknown_sslmode_is_rejected_with_those_that_exist(pgvector_base: str, mode: str) -> None:
    place = read_place(f"{pgvector_base}?sslmode={mode}", has_collection=False)
    assert place is not None
    with pytest.raises(BulkError, match=f"PostgreSQL has no sslmode `{mode}`.* its modes are `disable`, "):
        open_movable(place)
