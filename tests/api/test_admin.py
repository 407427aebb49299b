"""``/admin`` requires the operator's key, and refuses every client where none is set."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx
import pytest

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
ADMIN = "operator-key"
OFF = "/admin/reload is for the operator, who has no key yet: set GATEWAY_ADMIN_KEY"
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
    """A client's key does not pass either: it could load and drop all models."""
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
