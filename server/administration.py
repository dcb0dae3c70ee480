"""The routes of administrators: runs, tokens, devices, the audit log."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Body, Depends, Path, Query, Request, Security
from pydantic import Field
from sqlalchemy.engine import Connection
from starlette.responses import Response

from fwdllama.config import Section
from fwdllama.federation import message as m
from fwdllama.federation.spec import RunSpec

from .aggregate import wanted
from .audit import record
from .auth import ADMIN, hashed
from .context import BEARER, Context, as_json, context_of, refusals
from .delivery import finish
from .devices import RunName
from .errors import Refused
from .registry import add_version, checked_origin, store_blob
from .rollback import rolled_back
from .rounds import n_counted, n_leased
from .schema import audit, blobs, devices, entries, runs, tokens
from .state import Open, change, open_round, run_named, say
from .view import run_view


async def administrator(request: Request) -> None:
    """Let only an administrator through."""
    context_of(request).administrator(request)


router = APIRouter(prefix="/v1", tags=["administration"], dependencies=[Security(BEARER), Depends(administrator)])
Limit = Annotated[int, Query(ge=1, le=1000)]
From = Annotated[int, Query(alias="from", ge=0, lt=1 << 31)]
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Rollback(Section):
    """The version to go back to."""

    version: Annotated[int, Field(ge=0, lt=1 << 31)]


class NewToken(Section):
    """An enrolment token to be made. uses: None for any number; expires_s: None for never."""

    name: m.Label = "devices"
    uses: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    expires_s: Annotated[float, Field(gt=0, le=1e9)] | None = None


class Token(Section):
    """An enrolment token; `token` itself is told once, when it is made."""

    id: str
    name: str
    uses_left: int | None
    expires_at: float | None
    created_at: float
    revoked_at: float | None = None
    token: str | None = None


class Device(Section):
    """A device and what it has done."""

    device: str
    name: str
    enrolled_at: float
    last_seen: float
    revoked_at: float | None
    battery: float | None
    charging: bool | None
    memory_bytes: int | None
    n_results: int
    n_probes: int
    n_refused: int
    n_wasted: int


class Progress(Section):
    """Where the open round stands, in probes, and the run's totals."""

    run: str
    status: str
    version: int
    probes: int
    wanted: int
    leased: int
    deadline: float
    n_probes: int
    n_results: int
    n_refused: int
    n_wasted: int
    best_version: int | None
    best_loss: float | None


class Record(Section):
    """A record of the audit log."""

    seq: int
    at: float
    actor: str
    act: str
    data: dict[str, Any]
    hash: str


class Round(Section):
    """A closed round."""

    round: int
    closed_at: float
    duration_s: float | None = None
    n_probes: int
    n_wanted: int | None = None
    n_devices: int
    n_results: int | None = None
    loss: float | None = None
    gradient_rms: float | None = None
    lr: float | None = None
    restored: int | None = None  # the version that a roll-back went to


def as_list(found: Sequence[Section]) -> Response:
    """Messages as an answer."""
    return Response(json.dumps([item.model_dump(mode="json") for item in found]), media_type="application/json")


@router.post("/runs", status_code=201, response_model=m.Run, responses=refusals(401, 409, 413, 422, 429))
async def create_run(request: Request, spec: Annotated[RunSpec, Body()]) -> Response:
    """Start a run; its initial adapter must have been uploaded as a blob."""
    context = context_of(request)
    now = context.now()

    def act(connection: Connection) -> m.Run:
        if connection.execute(sa.select(runs.c.id).where(runs.c.name == spec.name)).first():
            raise Refused(409, f"there is a run {spec.name!r} already.")
        data = connection.execute(sa.select(blobs.c.data).where(blobs.c.sha256 == spec.initial)).scalar_one_or_none()
        if data is None:
            raise Refused(409, f"the initial adapter {spec.initial} is not here; upload it as a blob first.")
        origin = checked_origin(spec, data)
        if spec.public:
            store_blob(connection, data, public=True)
        run, digest = f"r{secrets.token_hex(6)}", m.theta_digest(origin.theta)
        connection.execute(
            runs.insert().values(
                id=run,
                name=spec.name,
                spec=spec.model_dump_json(),
                status="open",
                created_at=now,
                wanted=wanted([], spec),
                opened_at=now,
                deadline=now + spec.round.deadline_s,
                head=spec.genesis(),
                theta_digest=digest,
            )
        )
        add_version(connection, run, 0, parent=None, theta_digest=digest, created_at=now, n_probes=0, n_devices=0)
        record(connection, now, ADMIN, "run-created", {"run": spec.name, "id": run, "genesis": spec.genesis().hex()})
        say(connection, run, "run-created", now, {"run": spec.name})
        return run_view(connection, run_named(connection, context.registry, run).row, spec)

    return as_json(await context.store.write(act), 201)


async def _changed(request: Request, named: str, name: str, act: Callable[[Connection, Context, Open], dict[str, Any]]) -> Response:
    """Do something to a run, record it, and show the run."""
    context = context_of(request)
    now = context.now()

    def write(connection: Connection) -> m.Run:
        run = run_named(connection, context.registry, named)
        if run.row.status == "finished":
            raise Refused(409, f"run {run.row.name} is finished; nothing about it can be changed.")
        facts = act(connection, context, run)
        record(connection, now, ADMIN, name, {"run": run.row.name, **facts})
        return run_view(connection, run_named(connection, context.registry, named).row, run.spec)

    return as_json(await context.store.write(write))


@router.post("/runs/{run}/pause", response_model=m.Run, responses=refusals(401, 404, 409, 422, 429))
async def pause(request: Request, run: RunName) -> Response:
    """Give out no more tasks; results that are under way still count."""

    def act(connection: Connection, context: Context, found: Open) -> dict[str, Any]:
        change(connection, found.id, status="paused", reason="by an administrator")
        say(connection, found.id, "run-paused", context.now(), {"run": found.row.name})
        return {}

    return await _changed(request, run, "run-paused", act)


@router.post("/runs/{run}/resume", response_model=m.Run, responses=refusals(401, 404, 409, 422, 429))
async def resume(request: Request, run: RunName) -> Response:
    """Go on with a paused run; the deadline of its round begins anew."""

    def act(connection: Connection, context: Context, found: Open) -> dict[str, Any]:
        now = context.now()
        change(connection, found.id, status="open", reason=None, extensions=0, deadline=now + found.spec.round.deadline_s)
        say(connection, found.id, "run-resumed", now, {"run": found.row.name})
        return {}

    return await _changed(request, run, "run-resumed", act)


@router.post("/runs/{run}/finish", response_model=m.Run, responses=refusals(401, 404, 409, 422, 429))
async def finish_run(request: Request, run: RunName) -> Response:
    """End a run; its versions stay."""

    def act(connection: Connection, context: Context, found: Open) -> dict[str, Any]:
        finish(connection, found, "by an administrator", context.now())
        return {}

    return await _changed(request, run, "run-finished", act)


@router.post("/runs/{run}/rollback", response_model=m.Run, responses=refusals(401, 404, 409, 413, 422, 429))
async def rollback(request: Request, run: RunName, wanted_: Annotated[Rollback, Body()]) -> Response:
    """Go back to an earlier version. The ledger keeps all entries and says so in a new one; version numbers go on."""

    def act(connection: Connection, context: Context, found: Open) -> dict[str, Any]:
        rolled_back(connection, context.registry, found, wanted_.version, context.now())
        return {"version": wanted_.version}

    return await _changed(request, run, "run-rolled-back", act)


@router.get("/runs/{run}/rounds", response_model=list[Round], responses=refusals(401, 404, 422, 429))
async def list_rounds(request: Request, run: RunName, from_: From = 0, limit: Limit = 200) -> Response:
    """Closed rounds, oldest first."""
    context = context_of(request)

    def act(connection: Connection) -> list[Round]:
        id_ = run_named(connection, context.registry, run).id
        wanted_ = (entries.c.run == id_) & (entries.c.number >= from_)
        texts = connection.execute(sa.select(entries.c.facts, entries.c.closed_at).where(wanted_).order_by(entries.c.number).limit(limit))
        found = []
        for text, closed_at in texts:
            facts = json.loads(text)
            facts = {"restored" if key == "to" else key: value for key, value in facts.items() if key != "run"}
            found.append(Round.model_validate({**facts, "closed_at": closed_at}))
        return found

    return as_list(await context.store.read(act))


@router.get("/runs/{run}/progress", response_model=Progress, responses=refusals(401, 404, 422, 429))
async def progress(request: Request, run: RunName) -> Response:
    """Where the open round stands."""
    context = context_of(request)
    return as_json(await context.store.read(lambda c: progress_view(c, context, run)))


def progress_view(connection: Connection, context: Context, named: str) -> Progress:
    """Where the open round of a run stands."""
    run = run_named(connection, context.registry, named)
    row, current = run.row, open_round(connection, context.registry, run)
    return Progress(
        run=row.name,
        status=row.status,
        version=row.version,
        probes=n_counted(current, run.spec.round),
        wanted=row.wanted,
        leased=n_leased(current, run.spec.round, context.now()),
        deadline=row.deadline,
        n_probes=row.n_probes,
        n_results=row.n_results,
        n_refused=row.n_refused,
        n_wasted=row.n_wasted,
        best_version=row.best_version,
        best_loss=row.best_loss,
    )


@router.post("/tokens", status_code=201, response_model=Token, responses=refusals(401, 413, 422, 429))
async def create_token(request: Request, new: Annotated[NewToken, Body()]) -> Response:
    """Make an enrolment token."""
    context = context_of(request)
    return as_json(await context.store.write(lambda c: new_token(c, new, context.now())), 201)


def new_token(connection: Connection, new: NewToken, now: float) -> Token:
    """Make an enrolment token; only its hash is kept."""
    token, id_ = secrets.token_urlsafe(24), f"k{secrets.token_hex(6)}"
    expires = None if new.expires_s is None else now + new.expires_s
    connection.execute(tokens.insert().values(id=id_, hash=hashed(token), name=new.name, uses_left=new.uses, expires_at=expires, created_at=now))
    record(connection, now, ADMIN, "token-created", {"id": id_, "name": new.name, "uses": new.uses, "expires_at": expires})
    return Token(id=id_, name=new.name, uses_left=new.uses, expires_at=expires, created_at=now, token=token)


@router.get("/tokens", response_model=list[Token], responses=refusals(401, 422, 429))
async def list_tokens(request: Request) -> Response:
    """Enrolment tokens, newest first; the tokens themselves are not kept."""

    def act(connection: Connection) -> list[Token]:
        columns = [c for c in tokens.c if c.name != "hash"]
        return [Token(**row._mapping) for row in connection.execute(sa.select(*columns).order_by(tokens.c.created_at.desc()))]

    return as_list(await context_of(request).store.read(act))


@router.delete("/tokens/{token}", status_code=204, response_class=Response, responses=refusals(401, 404, 422, 429))
async def revoke_token(request: Request, token: Name) -> Response:
    """Let nobody enrol with a token any more."""
    await _revoked(request, tokens, token, "token")
    return Response(status_code=204)


@router.get("/devices", response_model=list[Device], responses=refusals(401, 422, 429))
async def list_devices(
    request: Request,
    after: Annotated[str, Query(pattern=r"^[A-Za-z0-9_-]{0,64}$", description="The last device of the page before.")] = "",
    limit: Limit = 200,
) -> Response:
    """Devices, in the order of their ids."""

    def act(connection: Connection) -> list[Device]:
        hidden = ("token", "last_nonce", "id")
        columns = [devices.c.id.label("device"), *(c for c in devices.c if c.name not in hidden)]
        rows = connection.execute(sa.select(*columns).where(devices.c.id > after).order_by(devices.c.id).limit(limit))
        return [Device.model_validate({**row._mapping, "charging": None if row.charging is None else bool(row.charging)}) for row in rows]

    return as_list(await context_of(request).store.read(act))


@router.delete("/devices/{device}", status_code=204, response_class=Response, responses=refusals(401, 404, 422, 429))
async def revoke_device(request: Request, device: Name) -> Response:
    """Refuse a device from now on."""
    await _revoked(request, devices, device, "device")
    return Response(status_code=204)


async def _revoked(request: Request, table: sa.Table, id_: str, what: str) -> None:
    context = context_of(request)
    now = context.now()

    def act(connection: Connection) -> None:
        row = connection.execute(sa.select(table.c.revoked_at).where(table.c.id == id_)).first()
        if row is None:
            raise Refused(404, f"there is no {what} {id_}.")
        if row.revoked_at is None:
            connection.execute(table.update().where(table.c.id == id_).values(revoked_at=now))
            record(connection, now, ADMIN, f"{what}-revoked", {what: id_})
            say(connection, None, f"{what}-revoked", now, {what: id_})

    await context.store.write(act)


@router.get("/audit", response_model=list[Record], responses=refusals(401, 422, 429))
async def read_audit(request: Request, from_: From = 0, limit: Limit = 200) -> Response:
    """The audit log, oldest first."""

    def act(connection: Connection) -> list[Record]:
        rows = connection.execute(sa.select(audit).where(audit.c.seq >= from_).order_by(audit.c.seq).limit(limit))
        return [
            Record(seq=row.seq, at=row.at, actor=row.actor, act=row.act, data=json.loads(row.data), hash=bytes(row.hash).hex()) for row in rows
        ]

    return as_list(await context_of(request).store.read(act))
