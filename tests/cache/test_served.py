"""The cache of a model in a fleet: reloads, faults, shadows and models that are loaded on demand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import ConfigError
from gateway.fleet import Model
from gateway.routing.names import GATEWAY
from gateway.types import EmbedJob, ModelState, Priority, Truncate

JOB = EmbedJob(["a text"], None, Truncate.END, deadline=time.monotonic() + 3600, caller="me")
CACHE = ", cache: {max_bytes: 2MiB}"


class Served:
    """A deployment of fake models, and the file that it is read from."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "models.yaml"
        self.asked: list[str] = []

    def make(self, entry: ModelEntry) -> FakeBackend:
        info = fake_info(entry.id, fingerprint=entry.source.encode().hex())
        return FakeBackend(info, on_embed=lambda job: self.asked.extend(job.texts))

    def read(self) -> Registry:
        return load_registry(self.file, {})

    def write(self, more: str = "", source: str = "weights", shadows: str = "") -> None:
        entries = f"  - {{id: one, source: ./{source}, enabled: true{more}}}\n"
        other = f"  - {{id: two, source: ./two, enabled: true{CACHE}}}\n"
        self.file.write_text(f"version: 1\nmodels:\n{entries}{other}{shadows}", encoding="utf-8")

    async def start(self, more: str = "", shadows: str = "") -> Deployment:
        self.write(more, shadows=shadows)
        self.deployment = Deployment(self.read(), Settings(), read_registry=self.read, make_backend=self.make)
        await self.deployment.start()
        return self.deployment

    def model(self, name: str = "one") -> Model:
        model = self.deployment.fleet.get(name)
        assert model is not None
        return model

    async def num_cached(self) -> int | None:
        return (await self.model().embed(JOB)).num_cached


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


async def test_a_model_has_no_cache_unless_its_entry_says_so(served: Served) -> None:
    await served.start()
    assert [await served.num_cached() for _ in range(2)] == [None, None]
    await served.deployment.stop()


async def test_a_cache_is_switched_on_and_off_by_a_reload_without_a_load(served: Served) -> None:
    await served.start()
    backend, found = served.model().backend, []
    for more in (CACHE, CACHE + ", required: true", ", cache: {max_bytes: 3MiB}", ""):
        served.write(more)
        reloaded = await served.deployment.reload()
        assert reloaded.kept == ("one", "two")
        found += [[await served.num_cached() for _ in range(2)]]
    assert served.model().backend is backend
    assert found == [[0, 1], [1, 1], [0, 1], [None, None]]
    await served.deployment.stop()


async def test_changed_weights_find_nothing(served: Served, tmp_path: Path) -> None:
    more = f", allow_space_change: true, cache: {{disk: {tmp_path / 'cache'}}}"
    await served.start(more)
    assert [await served.num_cached() for _ in range(2)] == [0, 1]
    served.write(more, source="other")
    await served.deployment.reload()
    assert [await served.num_cached() for _ in range(2)] == [0, 1]
    await served.deployment.stop()


async def test_a_model_that_is_reloaded_after_a_fault_forgets(served: Served) -> None:
    """For example, its golden vectors were wrong: vectors from before the check may be wrong as well."""
    await served.start(CACHE)
    assert [await served.num_cached() for _ in range(2)] == [0, 1]
    served.model().report(ModelState.RECOVERING, "golden vectors: cosine 0.9")
    served.model().report(ModelState.READY, "")
    assert [await served.num_cached() for _ in range(2)] == [0, 1]
    await served.deployment.stop()


async def test_a_model_that_is_unloaded_and_loaded_again_forgets_nothing(served: Served) -> None:
    await served.start(CACHE)
    assert [await served.num_cached() for _ in range(2)] == [0, 1]
    for state in (ModelState.UNLOADED, ModelState.LOADING, ModelState.READY):
        served.model().report(state, "")
    assert await served.num_cached() == 1
    await served.deployment.stop()


async def test_a_shadow_neither_reads_nor_fills_a_cache(served: Served) -> None:
    deployment = await served.start(shadows="shadows:\n  - {of: one, to: two, sample: 1}\n")
    choice = deployment.router.choose("one", GATEWAY)
    for _ in range(2):
        deployment.shadows.offer(choice, ["a text"], None, Truncate.END, 10, Priority.NORMAL)
    async with asyncio.timeout(30):
        while len(served.asked) < 2:  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0)
    assert (await served.model("two").embed(JOB)).num_cached == 0
    await deployment.stop()


async def test_a_reference_is_computed(served: Served) -> None:
    """Another model must be compared with current vectors."""
    await served.start(CACHE)
    await served.num_cached()
    reference = served.model().as_reference()
    assert reference is not None
    assert (await reference.embed(JOB)).num_cached is None
    await served.deployment.stop()


async def test_a_known_text_loads_no_model(make_on_demand: Callable[[], tuple[Model, FakeBackend]]) -> None:
    model, _backend = make_on_demand()
    assert model.cache is not None
    assert (await model.embed(JOB)).num_cached == 0
    model.backend = FakeBackend(fake_info("one"))  # not started: it would refuse
    assert (await model.embed(JOB)).num_cached == 1


@pytest.fixture
def make_on_demand(tmp_path: Path) -> Callable[[], tuple[Model, FakeBackend]]:
    def make() -> tuple[Model, FakeBackend]:
        (tmp_path / "models.yaml").write_text(
            f"version: 1\nmodels:\n  - {{id: one, source: ./one, load: on_demand{CACHE}}}\n", encoding="utf-8"
        )
        [entry] = load_registry(tmp_path / "models.yaml", {}).models
        backend = FakeBackend(fake_info("one"))
        backend._is_running = True
        return Model(entry, backend, ModelState.READY, fake_info("one")), backend

    return make


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        ("{max_bytes: lots}", "max_bytes: must be a size such as `1GiB` or `500MB`, got the text `lots`"),
        ("{max_bytes: 5 XB}", "must be a size"),
        ("{max_bytes: true}", "must be a size"),
        ("{max_bytes: 1000}", "must be at least `1MiB`, got 1000 bytes"),
        ("{redis: 'http://secret@host'}", "must begin with `redis://`, `rediss://` or `unix://`"),
        ("{disk: ./a, redis: 'redis://host'}", "`disk` and `redis` are two places for the same vectors: set only one"),
        ("{max_bytes: 9000TiB}", "max_bytes: must be at most `8192TiB`"),
        (f"{{max_bytes: {'9' * 400}.5}}", "max_bytes: must be"),
        (f"{{disk_bytes: '{'9' * 400} GiB'}}", "disk_bytes: must be at most `8192TiB`"),
        ("{disk: ''}", "disk"),
        ("{size: 1GiB}", "size"),
        ("yes", "cache"),
    ],
)
def test_wrong_settings_are_reported(tmp_path: Path, cache: str, problem: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"version: 1\nmodels:\n  - {{id: one, source: ./one, cache: {cache}}}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_registry(file, {})
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("place", ["disk: ./cache", "redis: 'redis://host'"])
@pytest.mark.parametrize(
    ("golden", "same_space_as", "is_fine"),
    [
        ("", "", False),
        ("golden: golden.json", "", True),
        ("", "same_space_as: here", True),
        ("", "same_space_as: there", False),
        ("", "same_space_as: known", True),
    ],
)
def test_a_cache_that_survives_a_restart_needs_to_know_the_weights(
    tmp_path: Path, place: str, golden: str, same_space_as: str, is_fine: bool
) -> None:
    """Servers may run other weights behind the same name by then, and the cache would mix vectors of both."""
    far = "backend: tei, source: x, upstream: {urls: ['http://gpu:8080']}"
    fields = ", ".join(filter(None, ("id: far", far, golden, same_space_as)))
    others = f"[{{id: here, source: ./here}}, {{id: there, {far}}}, {{id: known, {far}, golden: known.json}}"
    file = tmp_path / "models.yaml"
    file.write_text(f"version: 1\nmodels: {others}, {{{fields}, cache: {{{place}}}}}]\n", encoding="utf-8")

    if is_fine:
        load_registry(file, {})
        return
    with pytest.raises(ConfigError, match=r"models\[3\].cache.*needs `golden`.*`gateway verify far --record`"):
        load_registry(file, {})


def test_a_cache_in_memory_needs_no_golden_vectors(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "version: 1\nmodels: [{id: far, backend: tei, source: x, upstream: {urls: ['http://gpu:8080']}, "
        "cache: {max_bytes: 1MiB}}]\n",
        encoding="utf-8",
    )

    assert load_registry(file, {}).model("far").cache is not None


def test_redis_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.config.cache.find_spec", lambda _name: None)
    file = tmp_path / "models.yaml"
    file.write_text(
        "version: 1\nmodels:\n  - {id: one, source: ./one, cache: {redis: 'redis://host'}}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"pip install 'embedding-gateway\[redis\]'"):
        load_registry(file, {})


@pytest.mark.parametrize(("size", "num_bytes"), [("1GiB", 2**30), ("1.5 GiB", 3 * 2**29), ("20MB", 20_000_000)])
def test_sizes(tmp_path: Path, size: str, num_bytes: int) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        f"version: 1\nmodels:\n  - {{id: one, source: ./one, cache: {{max_bytes: {size}, disk: here}}}}\n",
        encoding="utf-8",
    )
    [entry] = load_registry(file, {}).models
    assert entry.cache is not None
    assert (entry.cache.max_bytes, entry.cache.disk) == (num_bytes, str(tmp_path / "here"))


def test_the_cache_is_imported_only_where_it_is_switched_on() -> None:
    code = "import gateway.app, sys; sys.exit(any(name.startswith('gateway.cache') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
