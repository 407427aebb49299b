"""Look at the model hub: whether it can be reached, through which proxy, and with which token."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gateway.doctor.finding import Check, Detail, Finding, Status
from gateway.engine.checkpoint.hub import cache_folder, endpoint, first_line, without_password

_TIMEOUT_S = 5.0
_LIMIT_S = 20.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")


def hub_checks() -> list[Check]:
    """Return the checks of the hub."""
    return [
        Check("cache", lambda: list(_cache()), _LIMIT_S),
        Check("hub", lambda: list(_hub()), _LIMIT_S),
        Check("token", lambda: list(_token()), _LIMIT_S),
    ]


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    names = [name for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME") if os.environ.get(name)]
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob("models--*"))
    text = f"{folder} ({f'by {names[0]}' if names else 'the default; HF_HOME moves it'}), {len(models)} repositories"
    yield Finding("cache", Status.OK, text, details={"folder": str(folder), "repositories": models})


def _hub() -> Iterator[Finding]:
    from huggingface_hub.utils._http import get_session

    url = endpoint()
    proxy = next((f"{name}={without_password(os.environ[name])}" for name in _PROXIES if os.environ.get(name)), "")
    details: dict[str, Detail] = {"url": url, "proxy": proxy, "is_reachable": False, "is_offline": is_offline()}
    if is_offline():
        yield Finding(
            "hub",
            Status.NOTE,
            "not checked, because HF_HUB_OFFLINE is set: only downloaded models are served",
            details=details,
        )
        return
    way = f"{url}{f', through {proxy}' if proxy else ''}"
    try:
        answer = get_session().head(url, timeout=_TIMEOUT_S)
    except Exception as error:  # the HTTP library has changed its classes of errors between releases
        text = f"{way} cannot be reached: {first_line(error)}"
        is_url = url.startswith(("https://", "http://"))
        mend = "HTTPS_PROXY sets a proxy, HF_ENDPOINT a mirror" if is_url else "HF_ENDPOINT must begin with https://"
        yield Finding("hub", Status.NOTE, text, mend, details)
        return
    if answer.status_code >= 500 or answer.status_code == 407:
        yield Finding("hub", Status.NOTE, f"{way} answers {answer.status_code}", details=details)
        return
    yield Finding("hub", Status.OK, f"{way} can be reached", details={**details, "is_reachable": True})


def _token() -> Iterator[Finding]:
    from huggingface_hub import get_token
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session

    try:
        token = get_token()
    except OSError as error:  # from reading the file in HF_HOME; the disk check has the details
        yield Finding("token", Status.NOTE, f"the token's file cannot be read: {error}", details={"is_set": False})
        return
    if token is None:
        yield Finding(
            "token", Status.OK, "no HF_TOKEN: gated and private repositories need one", details={"is_set": False}
        )
        return
    if is_offline():
        yield Finding("token", Status.OK, "HF_TOKEN is set", details={"is_set": True})
        return
    try:
        answer = get_session().get(f"{endpoint()}/api/whoami-v2", headers=build_hf_headers(), timeout=_TIMEOUT_S)
    except Exception:  # the hub check has the reason
        yield Finding("token", Status.OK, "HF_TOKEN is set, but was not checked", details={"is_set": True})
        return
    details = {"is_set": True, "is_valid": answer.status_code == 200}
    if answer.status_code == 401:
        mend = f"create a new one on {endpoint()}/settings/tokens, or unset it"
        yield Finding("token", Status.TODO, "the hub refuses HF_TOKEN: it is wrong or has expired", mend, details)
    else:
        yield Finding(
            "token", Status.OK, "HF_TOKEN is set" + (" and valid" if answer.status_code == 200 else ""), details=details
        )


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return constants.is_offline_mode()
