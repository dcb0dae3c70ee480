"""The routes of devices: enrol, check in, deliver, catch up."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Body, Path, Query, Request
from sqlalchemy.engine import Connection
from starlette.responses import Response

from fwdllama.federation import message as m
from fwdllama.federation.signature import device_key

from .assignment import check_in
from .auth import bearer, spend
from .context import MEMBERS, address, as_json, context_of, refusals
from .delivery import deliver
from .errors import Refused
from .registry import ledger_page
from .schema import devices, runs
from .state import run_named, say
from .view import run_view

router = APIRouter(prefix="/v1", tags=["devices"], dependencies=MEMBERS)
RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="A run's name or id.")]
TaskName = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
OCTETS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.post("/devices", status_code=201, response_model=m.Enrolled, responses=refusals(401, 413, 422, 429))
async def enrol(request: Request, enrolment: Annotated[m.Enrolment, Body()]) -> Response:
    """Become a device, with an enrolment token; the answer's key signs every later request."""
    context, now = context_of(request), context_of(request).now()
    context.newcomers.spend(address(request), now)

    def act(connection: Connection) -> m.Enrolled:
        token = spend(connection, bearer(request), now)
        if connection.execute(sa.select(sa.func.count()).select_from(devices)).scalar_one() >= context.limits.devices:
            raise Refused(429, f"there are {context.limits.devices} devices already, which is the limit.", {"retry-after": "3600"})
        device = f"d{secrets.token_hex(8)}"
        connection.execute(devices.insert().values(id=device, name=enrolment.name, token=token, enrolled_at=now, last_seen=now))
        say(connection, None, "device-enrolled", now, {"device": device, "name": enrolment.name})
        return m.Enrolled(device=device, key=device_key(context.secrets.device, device).hex())

    return as_json(await context.store.write(act), 201)


@router.get("/runs", response_model=list[m.Run], responses=refusals(401, 422, 429))
async def list_runs(request: Request) -> Response:
    """All runs, newest first."""
    context = context_of(request)

    def act(connection: Connection) -> list[m.Run]:
        rows = connection.execute(sa.select(runs).order_by(runs.c.created_at.desc())).all()
        return [run_view(connection, row, context.registry.spec(connection, row.id)) for row in rows]

    found = await context.any_member(request, act)
    return Response(json.dumps([run.model_dump(mode="json") for run in found]), media_type="application/json")


@router.get("/runs/{run}", response_model=m.Run, responses=refusals(401, 404, 422, 429))
async def show_run(request: Request, run: RunName) -> Response:
    """One run, with its specification."""
    context = context_of(request)

    def act(connection: Connection) -> m.Run:
        found = run_named(connection, context.registry, run)
        return run_view(connection, found.row, found.spec)

    return as_json(await context.any_member(request, act))


@router.post("/runs/{run}/checkin", response_model=m.Assignment, responses=refusals(401, 404, 409, 413, 422, 429))
async def check_in_route(request: Request, run: RunName, checkin: Annotated[m.CheckIn, Body()]) -> Response:
    """Say how the device is; the answer is a task, or when to come back."""
    context = context_of(request)

    def act(connection: Connection, device: str) -> m.Assignment:
        found = run_named(connection, context.registry, run)
        return check_in(connection, context.registry, found, device, checkin, context.n_active(connection), context.now())

    return as_json(await context.signed(request, act))


@router.put("/tasks/{task}/result", response_model=m.Receipt, responses=refusals(401, 404, 409, 410, 413, 422, 429))
async def deliver_route(request: Request, task: TaskName, delivery: Annotated[m.Delivery, Body()]) -> Response:
    """Deliver a result, as often as needed: it is stored and counted once. With `checkin` the answer holds the next assignment."""
    context = context_of(request)

    def act(connection: Connection, device: str) -> m.Receipt | Refused:
        receipt, run = deliver(connection, context.registry, task, device, delivery.result, context.now())
        if isinstance(receipt, Refused) or delivery.checkin is None:
            return receipt
        found = run_named(connection, context.registry, run)
        active = context.n_active(connection)
        following = check_in(connection, context.registry, found, device, delivery.checkin, active, context.now())
        return receipt.model_copy(update={"next": following})

    answer = await context.signed(request, act)
    assert isinstance(answer, m.Receipt)  # a refusal was raised
    return as_json(answer)


@router.get("/runs/{run}/ledger", response_class=Response, responses={**OCTETS, **refusals(401, 404, 422, 429)})
async def ledger(request: Request, run: RunName, from_: Annotated[int, Query(alias="from", ge=0, lt=1 << 31)] = 0) -> Response:
    """Ledger frames from an entry on, as many as a page holds; `x-fwdllama-next` numbers the entry after them."""
    context = context_of(request)

    def act(connection: Connection) -> Response:
        found = run_named(connection, context.registry, run)
        latest = int(found.row.version)
        if from_ > latest:
            raise Refused(404, f"run {found.row.name} has entries 0 to {latest - 1}; none from {from_} on.")
        page, following = ledger_page(connection, found.id, from_, latest, context.limits.ledger_page_bytes)
        headers = {"x-fwdllama-next": str(following), "x-fwdllama-version": str(latest)}
        return Response(page, media_type="application/octet-stream", headers=headers)

    return await context.any_member(request, act)
