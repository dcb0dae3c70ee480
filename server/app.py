"""The wiring: routes, refusals as JSON, limits, and what happens while time passes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.engine import Connection
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from . import adapters, administration, dashboard, devices, live
from .context import Context
from .delivery import tick
from .errors import Refused, reason
from .limits import BodyLimit
from .observation import Observed
from .schema import events

log = logging.getLogger("fwdllama.server")
TICK_S = 1.0
KEPT_EVENTS = 20_000


def create_app(context: Context) -> FastAPI:
    """The aggregator over an open, up-to-date database. It is closed by whoever opened it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ticking = asyncio.create_task(_tick(context))
        yield
        context.stopping = True
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking

    app = FastAPI(
        title="fwdllama aggregator",
        version="1",
        description="Hands out seeds, merges losses, keeps the ledger, serves adapters. docs/protocol.md explains the order of things.",
        lifespan=lifespan,
    )
    app.state.context = context
    app.add_middleware(BodyLimit, limits=context.limits)
    app.add_middleware(Observed, requests=context.requests)  # the last one added is the outermost
    for module in (devices, adapters, administration, live):
        app.include_router(module.router)
    app.include_router(dashboard.router(context.model_server))

    @app.exception_handler(Refused)
    async def _refused(request: Request, error: Refused) -> JSONResponse:
        headers = {**error.headers, "x-fwdllama-time": f"{context.now():.3f}"}
        return JSONResponse({"detail": error.sentence}, status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        # Fields that are right one by one and contradict each other are a conflict, which no schema can express.
        contradicts = error.errors()[0]["type"] == "value_error"
        return JSONResponse({"detail": sentence(error)}, status_code=409 if contradicts else 422)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["allow"] = ", ".join(_methods(app, request))
        if error.status_code == 400:  # the framework's word for a body that is not text
            return JSONResponse({"detail": "the body is not JSON in UTF-8."}, status_code=422)
        return JSONResponse({"detail": str(error.detail)}, status_code=error.status_code, headers=headers)

    @app.exception_handler(sa.exc.OperationalError)
    async def _unwritten(request: Request, error: sa.exc.OperationalError) -> JSONResponse:
        log.error("the database refused: %s", reason(error))
        return JSONResponse({"detail": "the database cannot be used at the moment; try again."}, status_code=503, headers={"retry-after": "5"})

    return app


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What the routes of a path can do together."""
    found: set[str] = set()
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path_regex.match(request.url.path):
            found |= route.methods or set()
    return sorted(found)


def sentence(error: RequestValidationError) -> str:
    """The first problem of a malformed request, with its place and value."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if given is None or isinstance(given, dict | list | bytes) else f" (got {str(given)[:80]!r})"
    return f"{place}: {message}{shown}."


def _forget(connection: Connection) -> int:
    """Drop old events; they are news, not records."""
    oldest = sa.select(sa.func.coalesce(sa.func.max(events.c.id), 0) - KEPT_EVENTS).scalar_subquery()
    return connection.execute(events.delete().where(events.c.id < oldest)).rowcount


async def _tick(context: Context) -> None:
    """Deadlines and lost leases, every second; several workers may do it, since what is done is not done again."""
    n = 0
    while True:
        await asyncio.sleep(TICK_S)
        n += 1
        try:
            await context.store.write(lambda c: tick(c, context.registry, context.now()))
            if n % 600 == 0:
                await context.store.write(_forget)
        except Exception:
            log.exception("what is due could not be done; it is tried again")
