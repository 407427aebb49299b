"""Servers for the tests of stores."""

from tests.postgres import postgres as postgres  # noqa: PLC0414
