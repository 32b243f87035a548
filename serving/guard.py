"""What every HTTP request passes first: its id, the host and the origin, the key; and what every response carries.

A web page elsewhere can make a browser send requests to this machine. The checks of `Host` (against DNS rebinding), of
`Origin`, and of the content type (`read_body`) keep such requests out, with or without a key.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError
from serving.limits import Limits

REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
OPEN_PATHS = ("/health",)  # says nothing about requests, and is asked by programs that hold no key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
RESPONSE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(self), geolocation=()",
    "cache-control": "no-store",
}

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Guard:
    """The outermost ASGI application.

    Args:
        hosts: names and addresses that `Host` may give, without a port, in lower case.
        keys: of which one must be given; none: no key is needed.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], keys: Sequence[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                found = MutableHeaders(scope=message)
                for name, value in RESPONSE_HEADERS.items():
                    found[name] = value
                found["x-request-id"] = request_id
            await send(message)

        try:
            self._check_host(headers)
            scope["state"]["tenant"] = self._tenant(headers, scope["path"])
            await self.app(scope, receive, send_guarded)
        except ApiError as error:
            await error_response(error)(scope, receive, send_guarded)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request %s has failed", request_id)
            if started:
                raise
            failed = ApiError(500, f"the server has failed on request {request_id}: see its log")
            await error_response(failed)(scope, receive, send_guarded)

    def _check_host(self, headers: Headers) -> None:
        """Raises: ApiError: 403, the request is meant for another host, or comes from another one's page."""
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            raise ApiError(403, f"this server is not {host[:100]!r}: see --allowed-host", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and (urlsplit(origin).netloc.lower() != host.lower()):
            raise ApiError(403, "pages of other origins may not use this server", code="wrong_origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "pages of other sites may not use this server", code="wrong_origin")

    def _tenant(self, headers: Headers, path: str) -> str:
        """Whose request this is: a digest of the key, empty without keys.

        Raises:
            ApiError: 401, no key or a wrong one.
        """
        if not self.keys or path in OPEN_PATHS:
            return ""
        given = _given_key(headers.get("authorization", ""))
        digest = hashlib.sha256(given).digest()
        # All keys are compared, each in constant time, so that the time tells nothing about them.
        if not any([hmac.compare_digest(digest, key) for key in self.keys]):
            message = (
                "give a key of this server: Authorization: Bearer KEY, or in a browser as the password of any name"
            )
            basic = 'Basic realm="mm", charset="UTF-8"'
            raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate=basic)
        return hashlib.sha256(given).hexdigest()


def _given_key(authorization: str) -> bytes:
    """The key of a header: a bearer's token, or the password of the form that a browser asks for."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _name(host: str) -> str:
    """A Host header without its port, in lower case; IPv6 addresses in brackets."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def error_response(error: ApiError) -> JSONResponse:
    """The response of a refused request."""
    return JSONResponse(error.body(), error.status, error.headers)


async def read_body(request: Request, limits: Limits, content_type: str = "application/json") -> bytes:
    """The body of a request; its type and size are checked before it is read whole.

    Raises:
        ApiError: 408, 413, 415.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != content_type:
        raise ApiError(415, f"the content type is {given[:100]!r}; it must be {content_type}", code="content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not taken", code="content_encoding")
    too_large = ApiError(413, f"the body has more than {limits.body_bytes:,} bytes", code="too_large")
    length: Any = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for block in request.stream():
                body += block
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body has not arrived in {limits.body_seconds:g} s", code="timeout") from None
    return bytes(body)


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(disconnect()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
