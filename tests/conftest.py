"""Models without a checkpoint, for every test that needs some."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read when numpy and torch are imported, here and in processes that the tests start. The workers share the cores: threads
# that wait for each other spin on them. (A gateway sets the number for its models itself.)
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import fastapi.routing
import pynvml
import pytest
import structlog
from fastapi.dependencies import models
from fastapi.dependencies.models import Dependant
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from gateway.backends.base import Backend
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Alias, Experiment, ModelEntry, Registry, Source
from gateway.engine import cards
from gateway.fleet import Fleet, Model
from gateway.types import ModelState
from tests.hub import Hub, running_hub, use

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# FastAPI analyzes each route of each of the thousand applications that the tests make, which is nearly all the time that one
# takes. The result is the same each time: the validator of a documented response, and the parameters and answer of a method.
fastapi.routing.create_model_field = functools.cache(fastapi.routing.create_model_field)  # type: ignore[attr-defined]
_get_dependant, _get_answer = fastapi.routing.get_dependant, fastapi.routing.get_typed_return_annotation  # type: ignore[attr-defined]
_dependants: dict[tuple[object, ...], Dependant] = {}
_answers: dict[object, object] = {}


def _dependant(*, path: str, call: Callable[..., Any], **others: Any) -> Dependant:
    if not inspect.ismethod(call):
        return _get_dependant(path=path, call=call, **others)
    key = (path, call.__func__, *others.items())
    if key not in _dependants:
        _dependants[key] = _get_dependant(path=path, call=call, **others)
    return replace(_dependants[key], call=call, dependencies=[])


def _answer(call: Callable[..., Any]) -> object:
    if not inspect.ismethod(call):
        return _get_answer(call)
    if call.__func__ not in _answers:
        _answers[call.__func__] = _get_answer(call)
    return _answers[call.__func__]


fastapi.routing.get_dependant, fastapi.routing.get_typed_return_annotation = _dependant, _answer  # type: ignore[attr-defined]


# It also remembers 4,096 handlers, and with them the last 35 applications: the garbage collector looks through all of that.
_HANDLER_CACHES = [function for function in vars(models).values() if hasattr(function, "cache_clear")]


def pytest_runtest_teardown() -> None:
    """Release the test's applications."""
    for function in _HANDLER_CACHES:
        function.cache_clear()


# A folder for all workers instead of the user's: a model is compiled once in a run, not at each start of a gateway.
_CACHE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the user's cache out of the tests, and let each worker of pytest-xdist begin to collect in another folder."""
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None or not config.getoption("numprocesses", None):  # the process with workers collects no tests
        gc.disable()  # until everything is collected: nothing becomes garbage earlier
    if worker is None:
        config.stash[_CACHE] = tempfile.TemporaryDirectory(prefix="gateway-tests-", ignore_cleanup_errors=True)
        os.environ["XDG_CACHE_HOME"] = config.stash[_CACHE].name  # the workers inherit it
    elif config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        # All workers collect all tests. The first to import a file also compiles it; the others find the result.
        ignored = {Path(path).resolve() for path in config.getoption("ignore") or ()}
        found = (path for path in Path(__file__).parent.iterdir() if path.is_dir() or path.match("test_*.py"))
        entries = sorted(str(path) for path in found if path not in ignored)
        start = len(entries) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        config.args = entries[start:] + entries[:start]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    if (folder := config.stash.get(_CACHE, None)) is not None:
        folder.cleanup()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests, a million objects that stay to the end."""
    gc.collect()
    gc.freeze()
    gc.enable()


# No logger keeps the setup of the log that it was first used with, not even one by a fixture of a session:
# `structlog.testing.capture_logs` would see nothing of it later.
_configure = structlog.configure
structlog.configure = lambda **how: _configure(**{**how, "cache_logger_on_first_use": False})

# The session fixtures of these folders take long to create, so one worker runs all of their tests.
_TOGETHER = ("clients", "cluster", "models")


def _group(file: str) -> str:
    """Return the name of the tests that one worker runs: a folder or a file, below ``tests``."""
    folder, *others = file.removeprefix("tests/").split("/")
    return folder if others and folder in _TOGETHER else file


class _ByFile(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Hands out the tests by file or folder: the marker ``xdist_group`` of pytest-xdist 3.8 has no effect in pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.split("::", 1)[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    """Put the tests of a file on one worker."""
    return _ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first: no worker is left with one when the others are done. The order is the same in all workers."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    num_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -num_tests[item.path], item.path))


@contextmanager
def _same_logs() -> Iterator[None]:
    before = structlog.get_config()
    loggers = [logging.getLogger(name) for name in ("", "gateway", "uvicorn")]
    states = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    hooks = sys.unraisablehook, threading.excepthook  # pytest's, which fail the test
    yield
    sys.unraisablehook, threading.excepthook = hooks
    structlog.configure(**before)
    for logger, handlers, propagate, level in states:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def no_card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the graphics cards of the machine and their driver; a test of cards installs its own (``tests.nvml``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pynvml, "nvmlInit", _no_driver)
        patch.setattr(cards, "_PCI", tmp_path_factory.mktemp("no_cards"))
        yield


def _no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.fixture(autouse=True)
def same_logs() -> Iterator[None]:
    """Undo a test's setup of the log."""
    with _same_logs():
        yield


@pytest.fixture(autouse=True, scope="module")
def same_logs_after_a_module() -> Iterator[None]:
    """Undo the setup of the log by a fixture of a module."""
    with _same_logs():
        yield


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a model hub without repositories, which downloads ask, with an empty cache."""
    with running_hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """Return a function that makes one model of a fleet, ready by default; its backend is not started."""

    def make(
        model_id: str = "mini",
        *,
        source: str | None = None,
        backend: Backend | None = None,
        state: ModelState = ModelState.READY,
        reason: str = "",
        **info: object,
    ) -> Model:
        source = source or f"owner/{model_id.replace('/', '-')}"
        revision = "0" * 40 if Source.parse(source).kind == "hub" else None
        entry = ModelEntry(id=model_id, source=source, revision=revision, enabled=True)
        known = fake_info(model_id, **{"source": source, **info})
        is_ready = state is ModelState.READY
        return Model(entry, backend or FakeBackend(known), state, known if is_ready else None, reason, int(is_ready))

    return make


@pytest.fixture
def make_fleet() -> Callable[..., tuple[Registry, Fleet]]:
    """Return a function that puts models, aliases and experiments together."""

    def make(
        *models: Model,
        aliases: Mapping[str, str | tuple[str, str]] | None = None,
        experiments: Sequence[Experiment] = (),
    ) -> tuple[Registry, Fleet]:
        pairs = {name: (to, None) if isinstance(to, str) else to for name, to in (aliases or {}).items()}
        registry = Registry(
            path=Path("models.yaml"),
            version=1,
            models=tuple(model.entry for model in models),
            aliases={name: Alias(name=name, model=model, task=task) for name, (model, task) in pairs.items()},
            experiments=tuple(experiments),
        )
        return registry, Fleet(models)

    return make
