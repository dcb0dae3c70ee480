"""What goes on: events as they happen, figures for Prometheus, and whether the aggregator lives and can work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Security
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.engine import Connection
from starlette.responses import JSONResponse, Response, StreamingResponse

from .administration import progress_view
from .context import ACTIVE_S, BEARER, Context, context_of, is_local, refusals
from .metrics import standing
from .schema import events, runs
from .state import run_named

router = APIRouter()
POLL_S = 0.5
COMMENT_S = 15.0  # between signs of life, so that proxies keep the stream open
PAGE = 200


@router.get(
    "/v1/events",
    tags=["administration"],
    dependencies=[Security(BEARER)],
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **refusals(401, 404, 422, 429)},
)
async def stream(
    request: Request,
    run: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = None,
    after: Annotated[int, Query(ge=-1, lt=1 << 53, description="The last event that was seen; -1: only new ones.")] = -1,
    limit: Annotated[int | None, Query(ge=1, le=1000, description="End after so many events, or at the first pause.")] = None,
) -> Response:
    """Events as a stream of server-sent events, with `progress` of open rounds in between."""
    context = context_of(request)
    context.administrator(request)
    known = await context.store.read(lambda c: _start(c, context, run, after))
    return StreamingResponse(_events(request, context, *known, limit), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _start(connection: Connection, context: Context, run: str | None, after: int) -> tuple[str | None, int]:
    id_ = None if run is None else run_named(connection, context.registry, run).id
    if after < 0:
        after = connection.execute(sa.select(sa.func.coalesce(sa.func.max(events.c.id), 0))).scalar_one()
    return id_, after


async def _events(request: Request, context: Context, run: str | None, after: int, limit: int | None) -> AsyncIterator[str]:
    seen: dict[str, str] = {}
    sent, quiet = 0, 0.0
    while not context.stopping and not await request.is_disconnected():
        found, standing = await context.store.read(lambda c, after=after: _news(c, context, run, after))  # type: ignore[misc]
        for id_, kind, data in found:
            after = id_
            sent += 1
            yield f"id: {id_}\nevent: {kind}\ndata: {data}\n\n"
        for name, text in standing.items():
            if seen.get(name) != text:
                seen[name] = text
                found = found or [(after, "", "")]
                yield f"event: progress\ndata: {text}\n\n"
        if limit is not None and (sent >= limit or not found):
            return
        quiet = 0.0 if found else quiet + POLL_S
        if quiet >= COMMENT_S:
            quiet = 0.0
            yield ": still here\n\n"
        if len(found) < PAGE:
            await asyncio.sleep(POLL_S)


def _news(connection: Connection, context: Context, run: str | None, after: int) -> tuple[list[tuple[int, str, str]], dict[str, str]]:
    wanted = sa.select(events).where(events.c.id > after).order_by(events.c.id).limit(PAGE)
    if run is not None:
        wanted = wanted.where(events.c.run == run)
    found = [(row.id, row.kind, json.dumps({"at": row.at, **json.loads(row.data)})) for row in connection.execute(wanted)]
    open_ = sa.select(runs.c.id).where(runs.c.status == "open")
    if run is not None:
        open_ = open_.where(runs.c.id == run)
    ids = connection.execute(open_.limit(20)).scalars().all()
    return found, {id_: progress_view(connection, context, id_).model_dump_json() for id_ in ids}


@router.get(
    "/metrics",
    tags=["operation"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals(401, 429)},
)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus: from this machine without a key, from elsewhere with the administrator's, unless they are public."""
    context = context_of(request)
    if not (context.public_metrics or is_local(request)):
        context.administrator(request)
    text = await context.store.read(lambda c: standing(c, context.registry, context.now(), ACTIVE_S))
    return Response(text + await asyncio.to_thread(context.requests.text), media_type=CONTENT_TYPE_LATEST)


@router.get("/health", tags=["operation"])
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", tags=["operation"], response_model=dict[str, str], responses={503: {"description": "The database cannot be written."}})
async def ready(request: Request) -> Response:
    """The database takes writes, and the aggregator is not shutting down."""
    context = context_of(request)
    if context.stopping:
        return JSONResponse({"detail": "shutting down."}, status_code=503)
    try:
        await asyncio.wait_for(context.store.write(_touch), 5.0)
    except (sa.exc.SQLAlchemyError, TimeoutError) as error:
        return JSONResponse({"detail": f"the database cannot be written: {type(error).__name__}."}, status_code=503)
    return JSONResponse({"status": "ready"})


def _touch(connection: Connection) -> Any:
    return connection.execute(sa.update(runs).where(runs.c.id == "").values(reason=None)).rowcount
