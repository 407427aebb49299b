"""``/admin`` requires the operator's key, and refuses every client where none is set."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import pynvml
import pytest

from gateway import golden
from gateway.fleet import Model
from gateway.golden import GoldenVector
from tests.api.conftest import MakeModel
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_torch

VectorsOf = Callable[..., np.ndarray]
Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
ADMIN = "operator-key"
OFF = "/admin/reload requires the operator's key, and none is configured: set GATEWAY_ADMIN_KEY"
KEY_NEEDED = "/admin/reload needs the operator's key: send `Authorization: Bearer KEY`"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def reload(client: httpx.AsyncClient, key: str | None, path: str = "/admin/reload") -> httpx.Response:
    return await client.post(path, headers=bearer(key) if key is not None else {})


@pytest.mark.parametrize("key", [None, "", ADMIN, "client-key"])
@pytest.mark.parametrize("settings", [{}, {"api_keys": "client-key"}])
async def test_without_an_operators_key_every_client_is_refused(
    connect: Connect, check_error: CheckError, settings: dict[str, str], key: str | None
) -> None:
    client = await connect(**settings)

    assert check_error(await reload(client, key), 403, "forbidden", type_="permission_error") == OFF


@pytest.mark.parametrize("key", [None, "", "wrong-key", ADMIN + "x", ADMIN.upper(), "client-key"])
@pytest.mark.parametrize("settings", [{}, {"api_keys": "client-key"}])
async def test_no_other_key_passes(
    connect: Connect, check_error: CheckError, settings: dict[str, str], key: str | None
) -> None:
    """A client's key is refused, too: with it, a client could load and unload all models."""
    client = await connect(admin_key=ADMIN, **settings)

    assert check_error(await reload(client, key), 403, "forbidden", type_="permission_error") == KEY_NEEDED


@pytest.mark.parametrize("settings", [{}, {"api_keys": "client-key"}])
@pytest.mark.parametrize("path", ["/admin/reload", "/admin//reload/"])
async def test_the_operators_key_passes(connect: Connect, settings: dict[str, str], path: str) -> None:
    client = await connect(admin_key=ADMIN, **settings)

    answer = await reload(client, ADMIN, path)

    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.pop("seconds") >= 0
    assert body == {
        "status": "reloaded",
        "loaded": [],
        "kept": ["mini", "jina", "team/small"],
        "removed": [],
        "aliases": {},
        "experiments": {},
    }


async def test_the_operators_key_opens_nothing_else(connect: Connect, check_error: CheckError) -> None:
    client = await connect(admin_key=ADMIN, api_keys="client-key")

    check_error(
        await client.get("/v1/models", headers=bearer(ADMIN)), 401, "invalid_api_key", type_="authentication_error"
    )
    assert (await client.get("/v1/models", headers=bearer("client-key"))).status_code == 200


async def test_a_reload_is_a_post(connect: Connect, check_error: CheckError) -> None:
    client = await connect(admin_key=ADMIN)

    check_error(await client.get("/admin/reload", headers=bearer(ADMIN)), 405, "method_not_allowed")


# ------------------------------------------------------------------------------------------------------- cards, verify


async def test_the_cards_of_the_machine_are_listed_with_the_processes_on_them(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = ((4711, "/usr/bin/ollama", 5 * GIB, True), (1, "", None, True))
    used = FakeCard(free=4 * GIB, processes=others)
    old = FakeCard(name="Tesla K80", capability=(3, 7), uuid="GPU-old")
    install(monkeypatch, FakeDriver([used, old]))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    client = await connect(admin_key=ADMIN)

    body = (await client.get("/admin/cards", headers=bearer(ADMIN))).json()

    first, second = body["data"]
    assert (body["driver"], body["problem"]) == ("580.95.05", None)
    assert (first["device"], first["total_bytes"], first["free_bytes"], first["problem"]) == (
        "cuda:0", 24 * GIB, 4 * GIB, None,
    )  # fmt: skip
    assert {(one["pid"], one["memory_bytes"]) for one in first["others"]} == {(4711, 5 * GIB), (1, None)}
    assert (second["device"], second["name"]) == (None, "Tesla K80")
    assert "has no kernels for a Tesla K80" in second["problem"]
    assert (await client.get("/admin/cards")).status_code == 403


async def test_without_a_driver_there_are_no_cards(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver([], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    client = await connect(admin_key=ADMIN)

    body = (await client.get("/admin/cards", headers=bearer(ADMIN))).json()

    assert (body["data"], body["driver"]) == ([], None)
    assert body["problem"]


def with_golden(make_random_model: MakeModel, path: Path) -> Model:
    """Return a model that has golden vectors in a file."""
    model = make_random_model("mini", width=8)
    model.entry = model.entry.model_copy(update={"golden": str(path)})
    return model


async def test_a_model_is_compared_with_its_golden_vectors(
    connect: Connect, make_random_model: MakeModel, vectors_of: VectorsOf, tmp_path: Path
) -> None:
    path = tmp_path / "golden.json"
    right = golden.golden_vectors(golden.TEXTS, None, vectors_of(golden.TEXTS, 8))
    model = with_golden(make_random_model, path)
    assert model.info is not None
    client = await connect(model, aliases={}, admin_key=ADMIN)

    golden.write(path, model.info.fingerprint, right)
    good = await client.post("/admin/models/mini/verify", headers=bearer(ADMIN))
    wrong = [*right[:-1], GoldenVector(right[-1].text, None, -right[-1].vector)]
    golden.write(path, model.info.fingerprint, wrong)
    bad = await client.post("/admin/models/mini/verify", headers=bearer(ADMIN))

    assert good.json() | {"seconds": 0} == {
        "id": "mini", "ok": True, "problem": None, "cosine": pytest.approx(1), "limit": 0.9999, "seconds": 0,
    }  # fmt: skip
    assert (bad.json()["ok"], bad.json()["cosine"]) == (False, pytest.approx(-1))
    assert "golden vectors: cosine -1.000000" in bad.json()["problem"]


async def test_only_a_ready_model_with_golden_vectors_is_compared(
    connect: Connect, make_random_model: MakeModel, check_error: CheckError, tmp_path: Path
) -> None:
    model = with_golden(make_random_model, tmp_path / "missing.json")
    client = await connect(model, make_random_model("plain"), aliases={}, admin_key=ADMIN)

    async def verify(name: str, key: str = ADMIN) -> httpx.Response:
        return await client.post(f"/admin/models/{name}/verify", headers=bearer(key))

    assert "has no golden vectors here" in check_error(await verify("plain"), 400, "invalid_input")
    assert "there is no such file" in check_error(await verify("mini"), 400, "invalid_input")
    assert "available: mini, plain" in check_error(await verify("none"), 404, "model_not_found")
    check_error(await verify("mini", "wrong"), 403, "forbidden", type_="permission_error")
