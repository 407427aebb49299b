"""Access to the console: a key is exchanged for a cookie, and only the console's own pages may change anything."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from fastapi import Request

from gateway.access.keyring import Client, Keyring, key_digest
from gateway.config.settings import Settings
from gateway.errors import Forbidden, Unauthorized
from gateway.http.context import RequestContext

_SESSION_S = 12 * 3600.0
# Only a valid key creates a session.
_MAX_SESSIONS = 1000
# A client that signs in repeatedly must not sign the operator out.
_MAX_SESSIONS_OF_KEY = 50
_OPERATOR = "operator"


class Right(Enum):
    """Who may open a page. The table of paths in ``site.py`` gives each its right.

    The pages of what the API has below ``/admin`` are the operator's, so that the console opens nothing that the API
    refuses.
    """

    ANYONE = "anyone"
    READER = "a reader, who has signed in if the gateway has any key"
    OPERATOR = "a reader who has signed in with the operator's key"


@dataclass(frozen=True, slots=True)
class Visitor:
    """The reader of a page.

    Attributes:
        client: the client, with the rights and quotas of the key.
        is_operator: whether the reader has the operator's key.
        is_signed_in: whether the reader has a session to end.
    """

    client: Client
    is_operator: bool = False
    is_signed_in: bool = False


@dataclass(slots=True)
class _Session:
    digest: str
    expires: float
    message: str = ""


class Gate:
    """Decides who sees the console, and with which rights.

    With ``GATEWAY_CONSOLE=public``, every client of the API sees it, with its own rights. Otherwise only the operator does,
    who needs the operator's key as soon as the gateway has any key; without any key, the API is open as well.
    """

    def __init__(self, settings: Settings, keyring: Keyring, port: int) -> None:
        self._settings = settings
        self._keyring = keyring
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self.is_public = settings.console == "public"
        # Browsers send a cookie to all ports of a host, and two gateways must not sign out each other's readers.
        self.cookie = f"gateway_console_{port}"

    @property
    def has_operator(self) -> bool:
        """Whether the operator has a key to sign in with."""
        return self._settings.admin_key is not None

    @property
    def needs_key(self) -> bool:
        """Whether a reader must sign in first."""
        return bool(self._keyring) or (self.has_operator and not self.is_public)

    @property
    def api_needs_key(self) -> bool:
        """Whether requests to the API need a key."""
        return bool(self._keyring)

    @property
    def clients_port(self) -> int | None:
        """The port of the API, if the console is on another port."""
        return None if self.is_public or self._settings.admin_port is None else self._settings.port

    @property
    def takes_api_keys(self) -> bool:
        """Whether a client's key opens the console."""
        return self.is_public and bool(self._keyring)

    async def visitor(self, request: Request) -> Visitor | None:
        """Return the reader of a page, or ``None`` if a reader must sign in first."""
        address = RequestContext.of(request).client.name
        session = self._find(request.cookies.get(self.cookie, ""))
        if session is not None:
            try:
                return await self._identify(session.digest, address)
            except Unauthorized:  # the key was removed, or has expired
                pass
        if self.needs_key:
            return None
        return Visitor(await self._keyring.identify(None, address))

    def require_operator(self, visitor: Visitor) -> None:
        """Let only the operator pass.

        Raises:
            Forbidden: the reader has not signed in with the operator's key.
        """
        if not visitor.is_operator:
            advice = "sign in with it" if self.has_operator else "set GATEWAY_ADMIN_KEY, then sign in with it"
            raise Forbidden(f"this needs the operator's key: {advice}")

    async def sign_in(self, key: str, address: str) -> str:
        """Exchange a key for the value of the cookie.

        Raises:
            Unauthorized: the key does not open the console.
        """
        digest = key_digest(key.strip())
        await self._identify(digest, address)
        token = secrets.token_urlsafe(32)
        of_key = [place for place, session in self._sessions.items() if session.digest == digest]
        if len(of_key) >= _MAX_SESSIONS_OF_KEY:
            del self._sessions[of_key[0]]
        self._sessions[key_digest(token)] = _Session(digest, time.monotonic() + _SESSION_S)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return token

    def sign_out(self, request: Request) -> None:
        """End the session of a reader."""
        self._sessions.pop(key_digest(request.cookies.get(self.cookie, "")), None)

    def leave_message(self, request: Request, message: str) -> None:
        """Keep a message for the next page of a signed-in reader."""
        if (session := self._find(request.cookies.get(self.cookie, ""))) is not None:
            session.message = message

    def take_message(self, request: Request) -> str:
        """Return the message for this page, once."""
        session = self._find(request.cookies.get(self.cookie, ""))
        if session is None:
            return ""
        message, session.message = session.message, ""
        return message

    async def _identify(self, digest: str, address: str) -> Visitor:
        key = self._settings.admin_key
        if key is not None and hmac.compare_digest(digest, key_digest(key.get_secret_value())):
            limits = self._settings
            client = Client(_OPERATOR, None, limits.requests_per_minute, limits.tokens_per_minute)
            return Visitor(client, is_operator=True, is_signed_in=True)
        if not self.takes_api_keys:
            raise Unauthorized("this is not the operator's key (GATEWAY_ADMIN_KEY)")
        return Visitor(await self._keyring.identify(digest, address), is_signed_in=True)

    def _find(self, token: str) -> _Session | None:
        session = self._sessions.get(key_digest(token)) if token else None
        return session if session is not None and session.expires > time.monotonic() else None


def check_origin(request: Request) -> None:
    """Refuse a form from another site; browsers name the site that a form comes from.

    Raises:
        Forbidden: the form comes from elsewhere, or from no page at all.
    """
    origin = request.headers.get("origin")
    if origin is None:
        is_own = request.headers.get("sec-fetch-site") == "same-origin"
    else:
        is_own = _site_of(origin) == request.headers.get("host", "")
    if not is_own:
        raise Forbidden(
            "a form of the console must come from the console itself; open the page again, and send it there"
        )


def _site_of(origin: str) -> str | None:
    """Return the host and port of an origin; ``None`` if it has no host, or is not an address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
