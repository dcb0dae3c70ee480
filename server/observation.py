"""Every request observed from outside: a line of the log and a sample of the metrics, named by the template of its route."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fwdllama.federation.signature import DEVICE

from .metrics import Requests

log = logging.getLogger("fwdllama.server.requests")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Observed:
    """Outermost of the application's layers, so that what the others refuse is seen too."""

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what it takes ends with its last byte."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            took_s = time.perf_counter() - began
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = str(getattr(scope.get("route"), "path", "unmatched"))
            self.requests.observe(method, route, status, took_s)
            if log.isEnabledFor(logging.INFO):
                log.info("request", extra={"facts": _facts(scope, method, route, status, took_s)})


def _facts(scope: Scope, method: str, route: str, status: int, took_s: float) -> dict[str, Any]:
    named = scope.get("path_params", {})
    # Who an unproven request claims to come from is not written down as if it were known.
    claimed = dict(scope["headers"]).get(DEVICE.encode()) if status != 401 else None
    device = named.get("device") or (claimed.decode("latin-1") if claimed else None)
    facts = {"method": method, "route": route, "status": status, "ms": round(took_s * 1e3, 2), "device": device}
    return {**facts, "run": named.get("run"), "task": named.get("task")}
