"""What a client may ask for: sizes and rates. Rates are counted by each worker for itself."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refused

REMEMBERED = 20_000  # clients whose rate is known


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, rates a second; what exceeds them is answered 413 or 429."""

    body_bytes: int = 256 * 1024
    blob_bytes: int = 512 * 1024 * 1024  # an initial adapter, from an administrator
    requests_per_s: float = 20.0  # of one device
    newcomers_per_s: float = 2.0  # enrolments and refused credentials, of one address
    devices: int = 100_000
    ledger_page_bytes: int = 1 << 20


class Bucket:
    """Token buckets by client: `rate` a second on average, ten seconds' worth at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, time)

    def spend(self, client: str, now: float) -> None:
        """Take a token.

        Raises:
            Refused: 429, there is none; the answer says when there will be.
        """
        most = max(1.0, 10 * self.rate)
        tokens, before = self._level.pop(client, (most, now))
        tokens = min(most, tokens + max(0.0, now - before) * self.rate)
        if tokens < 1.0:
            self._level[client] = (tokens, now)
            wait = (1.0 - tokens) / self.rate
            raise Refused(429, f"more than {self.rate:g} requests a second; come back in {wait:.1f} s.", {"retry-after": str(int(wait) + 1)})
        self._level[client] = (tokens - 1.0, now)
        while len(self._level) > REMEMBERED:
            self._level.popitem(last=False)


class BodyLimit:
    """Cuts requests off whose bodies are larger than allowed, whatever their headers claim."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting what arrives of its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        blob = scope["method"] == "PUT" and scope["path"].startswith("/v1/blobs/")
        most = self.limits.blob_bytes if blob else self.limits.body_bytes
        claimed = dict(scope["headers"]).get(b"content-length", b"0")
        if not claimed.isdigit() or len(claimed) > 18 or int(claimed) > most:
            await _answer_too_large(send, most)
            return
        n = 0

        async def counted() -> Message:
            nonlocal n
            message = await receive()
            n += len(message.get("body", b""))
            if n > most:
                # Of this kind, because the framework turns every other one into a 400.
                raise HTTPException(413, sentence(most), {"connection": "close"})
            return message

        await self.app(scope, counted, send)


def sentence(most: int) -> str:
    """Why a body was not read to its end."""
    return f"the body is larger than {most} bytes."


async def _answer_too_large(send: Send, most: int) -> None:
    body = json.dumps({"detail": sentence(most)}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
