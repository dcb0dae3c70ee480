"""The routes of the adapter registry: versions, their files, and blobs."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request
from sqlalchemy.engine import Connection
from starlette.responses import Response

from fwdllama.federation import message as m

from .context import MEMBERS, Context, context_of, refusals
from .devices import OCTETS, RunName
from .download import download, not_modified
from .errors import Refused
from .registry import store_blob, version_number
from .schema import blobs, versions
from .state import run_named
from .view import version_views

router = APIRouter(prefix="/v1", tags=["adapters"], dependencies=MEMBERS)
VersionName = Annotated[str, Path(pattern=r"^(latest|best|[0-9]{1,9})$", description="latest, best or a number.")]
Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
KEPT_FILES = 8
_files: OrderedDict[str, bytes] = OrderedDict()  # by hash


async def _readable(request: Request, run: str) -> None:
    """Let anybody read a public run, and members the others.

    Raises:
        Refused: 401; 404, there is no such run.
    """
    context = context_of(request)
    if request.headers.get("authorization") is None and "x-fwdllama-device" not in request.headers:
        public = await context.store.read(lambda c: _is_public(c, context, run))
        if public:
            return
    await context.any_member(request, lambda c: run_named(c, context.registry, run).id)


def _is_public(connection: Connection, context: Context, run: str) -> bool:
    try:
        return run_named(connection, context.registry, run).spec.public
    except Refused:
        return False  # whether there is a run is told to members only


@router.get("/runs/{run}/versions", response_model=list[m.Version], responses=refusals(401, 404, 422, 429))
async def list_versions(
    request: Request,
    run: RunName,
    from_: Annotated[int, Query(alias="from", ge=0, lt=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """Versions of a run's adapter, oldest first."""
    context = context_of(request)
    await _readable(request, run)

    def act(connection: Connection) -> list[m.Version]:
        return version_views(connection, run_named(connection, context.registry, run).row, from_, from_ + limit)

    found = await context.store.read(act)
    return Response(json.dumps([version.model_dump(mode="json") for version in found]), media_type="application/json")


@router.get("/runs/{run}/versions/{version}", response_model=m.Version, responses=refusals(401, 404, 422, 429))
async def show_version(request: Request, run: RunName, version: VersionName) -> Response:
    """One version: `latest`, `best` or a number."""
    context = context_of(request)
    await _readable(request, run)

    def act(connection: Connection) -> m.Version:
        found = run_named(connection, context.registry, run)
        number = version_number(connection, found.id, version)
        return version_views(connection, found.row, number, number + 1)[0]

    return Response((await context.store.read(act)).model_dump_json(), media_type="application/json")


@router.get(
    "/runs/{run}/versions/{version}/adapter.gguf",
    response_class=Response,
    responses={**OCTETS, **refusals(401, 404, 416, 422, 429), 206: {"description": "A range."}, 304: {"description": "Not modified."}},
)
async def adapter_file(request: Request, run: RunName, version: VersionName) -> Response:
    """The adapter of a version as a GGUF file. An adapter of scope `answer` is for llama-server and our model server only."""
    context = context_of(request)
    await _readable(request, run)

    def known(connection: Connection) -> tuple[str, str, int, str | None, str]:
        found = run_named(connection, context.registry, run)
        number = version_number(connection, found.id, version)
        row = connection.execute(sa.select(versions.c.adapter_sha256).where(versions.c.run == found.id, versions.c.version == number)).one()
        return found.id, str(found.row.name), number, row.adapter_sha256, found.spec.train.space.scope

    run_id, name, number, sha256, scope = await context.store.read(known)
    if sha256 is not None and (same := not_modified(request, f'"{sha256}"')) is not None:
        return same
    data = _files.get(sha256 or "")
    if data is None:
        data = await context.store.read(lambda c: context.registry.file(c, run_id, number))
        sha256 = hashlib.sha256(data).hexdigest()
        at = (versions.c.run == run_id) & (versions.c.version == number)
        await context.store.write(lambda c: c.execute(versions.update().where(at).values(adapter_sha256=sha256)).rowcount)
        _files[sha256] = data
        while len(_files) > KEPT_FILES:
            _files.popitem(last=False)
    headers = {
        "content-disposition": f'attachment; filename="{name}-v{number}.gguf"',
        "x-fwdllama-version": str(number),
        "x-fwdllama-scope": scope,
    }
    return download(request, data, f'"{sha256}"', "application/octet-stream", headers)


@router.get(
    "/blobs/sha256:{sha256}",
    response_class=Response,
    responses={**OCTETS, **refusals(401, 404, 416, 422, 429), 206: {"description": "A range."}, 304: {"description": "Not modified."}},
)
async def blob(request: Request, sha256: Sha256) -> Response:
    """Bytes by their hash: initial adapters, and theta of snapshots."""
    context = context_of(request)

    def read(connection: Connection) -> tuple[bytes, bool] | None:
        row = connection.execute(sa.select(blobs.c.data, blobs.c.public).where(blobs.c.sha256 == sha256)).first()
        return None if row is None else (row.data, bool(row.public))

    found = await context.store.read(read)
    if found is None or not found[1]:
        await context.any_member(request, lambda c: None)
    if found is None:
        raise Refused(404, f"there is no blob sha256:{sha256}.")
    return download(request, found[0], f'"{sha256}"', "application/octet-stream", {"cache-control": "private, max-age=31536000, immutable"})


@router.put("/blobs/sha256:{sha256}", status_code=201, response_class=Response, responses=refusals(401, 409, 413, 422, 429))
async def upload(request: Request, sha256: Sha256) -> Response:
    """Keep an initial adapter; it is checked when a run is made of it."""
    context = context_of(request)
    context.administrator(request)
    data = await request.body()
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise Refused(409, f"the body's sha256 is {actual}, not {sha256}.")
    await context.store.write(lambda c: store_blob(c, data, public=False))
    return Response(status_code=201)
