"""What every request passes before any route: who asks, from where, how much; and the headers of every answer."""

import asyncio
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dougong.serve.errors import ApiError
from dougong.serve.keys import Client, Keys
from dougong.serve.metrics import Metrics
from dougong.serve.settings import LOOPBACK, ServeConfig
from dougong.serve.stream import ClientLeft

OPEN = frozenset({"/health"})
"""The only paths that need no key."""

_PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_HEADER_NAME = re.compile(r"[a-z0-9-]+")
_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Guard:
    """ASGI middleware: names, origins and keys, deny by default. `client` of the scope's state is who asks."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys | None, metrics: Metrics) -> None:
        self._app, self._config, self._keys, self._metrics = app, config, keys, metrics
        self._everyone = Client("this machine")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        told = self._told(scope, headers, send)
        try:
            answer = self._preflight(scope, headers)
            if answer is None:
                self._check_place(scope, headers)
                scope.setdefault("state", {})["client"] = self._client(scope, headers)
        except ApiError as error:
            answer = error.response()
        await (answer or self._app)(scope, receive, told)

    def _client(self, scope: Scope, headers: Headers) -> Client:
        if self._keys is None or scope["path"] in OPEN:
            return self._everyone
        client = self._keys.of_header(headers.get("authorization", ""))
        if client is None:
            came = "the API key is not known" if "authorization" in headers else "an API key is needed"
            raise ApiError(401, f"{came}: send Authorization: Bearer KEY.", code="invalid_api_key")
        return client

    def _check_place(self, scope: Scope, headers: Headers) -> None:
        """Without keys a browser is the danger: pages of other hosts can make it send requests here."""
        host = headers.get("host", "")
        if self._keys is None and _name(host) not in (*LOOPBACK, *self._config.hostnames):
            raise ApiError(403, f"this server does not go by the name {host[:100]!r}. Use 127.0.0.1 or localhost, or "
                           "name it with --hostname.", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, host) and origin not in self._config.allow_origins:
            raise ApiError(403, f"pages of {origin[:100]!r} may not use this server. Name them with --allow-origin.",
                           code="origin_not_allowed")

    @staticmethod
    def _own(origin: str, host: str) -> bool:
        try:
            return bool(host) and urlsplit(origin).netloc == host
        except ValueError:
            return False

    def _preflight(self, scope: Scope, headers: Headers) -> Response | None:
        """A browser asks before it lets a page of another origin ask; it brings no key.

        Clients add headers of their own (OpenAI's sends `x-stainless-…`), so an allowed origin may send any.
        """
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
            return None
        if headers.get("origin") not in self._config.allow_origins:
            raise ApiError(403, "pages of this origin may not use this server.", code="origin_not_allowed")
        asked = headers.get("access-control-request-headers", "").lower().split(",")
        return Response(status_code=204, headers={
            "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Headers": ", ".join(filter(_HEADER_NAME.fullmatch, map(str.strip, asked)))})

    def _told(self, scope: Scope, asked: Headers, send: Send) -> Send:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                if (origin := asked.get("origin")) in self._config.allow_origins:
                    headers["Access-Control-Allow-Origin"] = origin or ""
                    headers["Access-Control-Expose-Headers"] = "Retry-After"
                    headers["Cross-Origin-Resource-Policy"] = "cross-origin"
                    headers.add_vary_header("Origin")
                self._metrics.requests.labels(_route(scope), str(message["status"])).inc()
            await send(message)

        return told


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """The whole body, if it is JSON, small enough and comes in time. Raises ClientLeft where the client goes first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":   # what a form of another page can send without asking is never JSON
        raise ApiError(415, f"the body must be application/json, not {kind[:60] or 'of no type'!r}.",
                       code="unsupported_media_type")
    too_large = ApiError(413, f"the body is larger than {config.body_bytes:,} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > config.body_bytes):
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > config.body_bytes:
                    raise too_large
                parts.append(part)
    except ClientDisconnect:
        raise ClientLeft from None
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {config.body_seconds:g} s.", code="body_timeout") from None
    return b"".join(parts)


def _name(host: str) -> str:
    """The host of a Host header without its port: `localhost:8000`, `[::1]:8000`."""
    return host[1:host.find("]")] if host.startswith("[") else host.partition(":")[0]


def _route(scope: Scope) -> str:
    """The route's own path: what clients make up must not become a label."""
    route = scope.get("route")
    return getattr(route, "path", None) or "none"
