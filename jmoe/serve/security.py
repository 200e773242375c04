"""Who may ask: web pages of other sites may not, nor who has no key. Slow clients are left."""

import asyncio
import base64
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jmoe.errors import in_short
from jmoe.serve.errors import ApiError
from jmoe.serve.settings import Settings

HEALTH = "/health"
ANY = "*"
PAGE = "/"


class KnownPlaces:
    """Refuses requests whose Host or Origin is foreign.

    A web page of another site, opened in a browser that reaches this server, is one: it says so in Origin, unless its
    name has been made to resolve to this server's address, which Host gives away (DNS rebinding). An IP address cannot
    be made to resolve to another.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """In front of the app."""
        self._app = app
        self._hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in settings.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what comes from a known place."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check(headers.getlist("host"), headers.getlist("origin"))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        if len(hosts) != 1 or not self._is_known(hosts[0]):
            raise ApiError(
                403,
                f"the Host {in_short(', '.join(hosts))} is not this server's: --allow-host names more",
                code="foreign_host",
            )
        own = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
        for origin in origins:
            if not (ANY in self._origins or origin.lower() in self._origins | own):
                raise ApiError(
                    403,
                    f"pages of {in_short(origin)} may not ask this server: --allow-origin names those that may",
                    code="foreign_origin",
                )

    def _is_known(self, host: str) -> bool:
        if ANY in self._hosts:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Keys:
    """Asks for a key on all paths but /health: as Bearer token, or as password, which browsers ask people for."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """In front of the app."""
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what has a key."""
        asked = scope["type"] == "http" and scope["path"] != HEALTH and self._keys
        if asked and not is_one_of(given_key(Headers(scope=scope).get("authorization", "")), self._keys):
            scheme = "Basic" if scope["path"] == PAGE else "Bearer"
            error = ApiError(
                401,
                "a key of this server is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": f'{scheme} realm="jmoe"'},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def given_key(authorization: str) -> bytes:
    """The key in a header; nothing if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def is_one_of(given: bytes, keys: Iterable[bytes]) -> bool:
    """Whether it is one of the keys; how long that takes tells nothing about them."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found


class SlowReaders:
    """Leaves clients that do not take what is sent to them in time."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        """In front of the app."""
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes all on."""

        async def in_time(message: Message) -> None:
            async with asyncio.timeout(self._seconds):
                await send(message)

        await self._app(scope, receive, in_time)
