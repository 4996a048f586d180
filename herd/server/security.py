"""What stands before all routes: who may ask, from where, and how much.

Every route needs the key, if there is one. Browsers send requests of any page to any server that they reach, so the
names by which this one may be called are fixed (DNS rebinding), and pages of other origins are refused.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herd.server.errors import ApiError, response
from herd.server.metrics import Metrics
from herd.server.state import Client, Settings

MAX_DEPTH = 64  # of JSON
PIECE_S = 60  # seconds until the next piece of a body
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # possessive: takes no memory for going back
_BRACKETS = re.compile(rb"[\[\]{}]")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """The ASGI middleware of all that."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        begun = False

        async def say(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if message["status"] >= 400:
                    self._metrics.refused(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        try:
            check_host(headers.getlist("host"), self._settings)
            check_origin(headers.get("origin"), headers["host"])
            key = check_key(headers.get("authorization"), self._keys)
            address = scope["client"][0] if scope.get("client") else ""
            scope["herd.client"] = Client(key, f"{key} {address}")
            body = await _body(headers, receive, self._settings)
            await self._app(scope, body, say)
        except ApiError as error:
            if begun:
                raise
            await response(error)(scope, receive, say)


def check_host(hosts: Sequence[str], settings: Settings) -> None:
    """ApiError unless there is one Host, and it names this machine or is allowed."""
    name = (urlsplit(f"//{hosts[0]}").hostname or "") if len(hosts) == 1 and _is_host(hosts[0]) else ""
    if not name:
        raise ApiError(400, "the request needs one valid Host header", code="invalid_host")
    if "*" in settings.hosts or name in ("localhost", *settings.hosts) or _is_loopback(name):
        return
    raise ApiError(
        403,
        f"this server is not called {name[:200]!r}; start it with --allow-host {name[:200]} if it is",
        code="invalid_host",
    )


def check_origin(origin: str | None, host: str) -> None:
    """ApiError for a request that a page of another origin sends."""
    if origin is None:
        return
    try:
        its = urlsplit(origin).netloc
    except ValueError:
        its = ""
    if its.lower() != host.lower():
        raise ApiError(403, f"pages of {origin[:200]!r} may not ask this server", code="invalid_origin")


def check_key(given: str | None, keys: Sequence[bytes]) -> str:
    """A name of the key that a request has, as a bearer token or as the password of basic authentication; "" if none
    is needed. ApiError without one of them. Takes as long for any wrong key. keys: digests of those that there are."""
    if not keys:
        return ""
    kind, _, value = (given or "").partition(" ")
    token = value.strip().encode()
    if kind.lower() == "basic":
        try:
            token = base64.b64decode(token, validate=True).partition(b":")[2]
        except ValueError:
            token = b""
    elif kind.lower() != "bearer":
        token = b""
    mine = hashlib.sha256(token).digest()
    found = [key for key in keys if hmac.compare_digest(key, mine)]  # of one length, and all are compared
    if not found:
        said = "Incorrect API key provided." if given else "You didn't provide an API key."
        raise ApiError(401, said, code="invalid_api_key")
    return found[0].hex()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def check_depth(body: bytes) -> None:
    """ApiError for JSON that is nested more than MAX_DEPTH deep."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_TEXT.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="too_deep")


async def _body(headers: Headers, receive: Receive, settings: Settings) -> Receive:
    """The body of a request, which ends with an ApiError where it is too large; JSON is read and looked at first."""
    upload = headers.get("content-type", "").startswith("multipart/form-data")
    most, read, more = settings.max_upload if upload else settings.max_body, 0, True
    large = ApiError(413, f"the body is larger than {most:,} bytes", code="too_large")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise ApiError(400, "Content-Length is no number")
    if len(length) > 20 or int(length) > most:
        raise large

    async def counted() -> Message:
        nonlocal read, more
        try:
            message = await asyncio.wait_for(receive(), PIECE_S if more else None)
        except TimeoutError as error:
            raise ApiError(408, f"nothing came of the body for {PIECE_S} seconds", code="timeout") from error
        more = message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > most:
            raise large
        return message

    if upload:
        return counted
    parts = list[bytes]()
    while more:
        message = await counted()
        if message["type"] == "http.disconnect":
            return _replay(None, receive)
        parts.append(message.get("body", b""))
    body = b"".join(parts)
    check_depth(body)
    return _replay(body, receive)


def _replay(body: bytes | None, receive: Receive) -> Receive:
    first: Message | None = {"type": "http.request", "body": body} if body is not None else {"type": "http.disconnect"}

    async def again() -> Message:
        nonlocal first
        message, first = first, None
        return await receive() if message is None else message

    return again


def _is_host(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").netloc == host and urlsplit(f"//{host}").port != 0 and "@" not in host
    except ValueError:
        return False


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
