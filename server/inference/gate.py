"""What every request must pass before it is looked at: the key, and the size of its body."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .fault import Fault

MAX_BODY_BYTES = 2 << 20  # a context of 128,000 tokens is about 600 KB of text


class Gate:
    """ASGI middleware. Paths under /v1/ need the key, where there is one; the probes of a supervisor do not."""

    def __init__(self, app: ASGIApp, *, key: str | None, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._key = _digest(key) if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 401 or 413, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        fault = self._fault(scope["path"], headers)
        if fault is not None:
            more = {"WWW-Authenticate": "Bearer"} if fault.status == 401 else {"Connection": "close"}
            await JSONResponse(fault.body(), fault.status, more)(scope, receive, send)
            return
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large(n_bytes).message)
            return message

        await self._app(scope, counted, send)

    def _fault(self, path: str, headers: Headers) -> Fault | None:
        if self._key is not None and path.startswith("/v1/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                what = "is wrong" if given else "is missing: send it as `Authorization: Bearer KEY`"
                return Fault(401, f"the API key {what}.", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            return self._too_large(int(length[:20]))
        return None

    def _too_large(self, n_bytes: int) -> Fault:
        return Fault(413, f"the body has {n_bytes} bytes or more, but at most {self._max_body_bytes} are accepted.")


def _digest(key: str) -> bytes:
    """Of equal length whatever the key, so that comparing takes equally long."""
    return hashlib.sha256(key.encode()).digest()
