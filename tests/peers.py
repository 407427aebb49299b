"""Programs and packages that some tests need. A developer need not install them; CI must."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any, NoReturn

import pytest

IS_CI = os.environ.get("CI", "") not in ("", "0", "false")


def needs(command: str, package: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if a command is missing; in CI, the test runs and fails instead."""
    is_there = shutil.which(command) is not None
    return pytest.mark.skipif(not is_there and not IS_CI, reason=f"{command} (Debian: {package}) is not installed")


def find(command: str, package: str) -> str:
    """Return the path of a command; where it is missing, skip the test, or fail it in CI."""
    path = shutil.which(command)
    if path is None:
        is_missing(f"{command} (Debian: {package}) is not installed")
    return path


def find_module(name: str) -> Any:
    """Import a package that a developer need not install; where it is missing, skip the tests, or fail them in CI."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        is_missing(f"{error.name} is not installed: make install-dev")


def is_missing(what: str) -> NoReturn:
    """Skip a test because something is missing, or fail it in CI."""
    if IS_CI:
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)
