"""What every route needs: the database, this process's memory of runs, secrets, limits, and who is asking."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel
from sqlalchemy.engine import Connection
from starlette.requests import Request
from starlette.responses import Response

from fwdllama.federation.message import Problem
from fwdllama.federation.signature import SIGNATURE

from .auth import Secrets, Signature, admit, bearer, is_admin, verified
from .errors import Refused
from .limits import Bucket, Limits
from .metrics import Requests
from .registry import Registry
from .schema import devices
from .store import Store

T = TypeVar("T")
ACTIVE_S = 300.0


# For the OpenAPI document only: who is asking is checked by the routes themselves, with a sentence.
BEARER = HTTPBearer(auto_error=False, description="An administrator's key; to enrol, an enrolment token.")
SIGNED = APIKeyHeader(name=SIGNATURE, auto_error=False, description="A device's signature, with three more headers: docs/protocol.md, 2.")
MEMBERS = [Security(BEARER), Security(SIGNED)]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for the OpenAPI document."""
    return {status: {"model": Problem, "description": "Refused, with a sentence."} for status in statuses}


@dataclass
class Context:
    """An aggregator, put together; `now` is replaceable."""

    store: Store
    secrets: Secrets
    limits: Limits = field(default_factory=Limits)
    model_server: str | None = None
    public_metrics: bool = False
    now: Callable[[], float] = time.time
    registry: Registry = field(default_factory=Registry)
    requests: Requests = field(default_factory=Requests)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.rates = Bucket(self.limits.requests_per_s)
        self.newcomers = Bucket(self.limits.newcomers_per_s)
        self._active: tuple[float, int] = (-1e9, 0)

    def n_active(self, connection: Connection) -> int:
        """Devices seen lately, counted every few seconds."""
        now = self.now()
        if now - self._active[0] > 5.0:
            found = connection.execute(sa.select(sa.func.count()).select_from(devices).where(devices.c.last_seen > now - ACTIVE_S))
            self._active = (now, int(found.scalar_one()))
        return self._active[1]

    async def signed(self, request: Request, act: Callable[[Connection, str], T]) -> T:
        """Check a device's signature, then `act` in the transaction that uses its nonce up.

        Raises:
            Refused: 401, or whatever `act` refuses, raised or returned.
        """
        now = self.now()
        try:
            signature: Signature = verified(request, await request.body(), self.secrets, now)
        except Refused:
            self.newcomers.spend(address(request), now)
            raise
        self.rates.spend(signature.device, now)

        def admitted(connection: Connection) -> T:
            admit(connection, signature, now)
            return act(connection, signature.device)

        answer = await self.store.write(admitted)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def administrator(self, request: Request) -> None:
        """Let only an administrator through.

        Raises:
            Refused: 401.
        """
        if not is_admin(request, self.secrets):
            self.newcomers.spend(address(request), self.now())
            raise Refused(401, "this needs the administrator's key: Authorization: Bearer KEY.", {"www-authenticate": "Bearer"})

    async def any_member(self, request: Request, act: Callable[[Connection], T]) -> T:
        """`act`, for an administrator or a device."""
        if bearer(request) is not None:
            self.administrator(request)
            return await self.store.read(act)
        return await self.signed(request, lambda connection, device: act(connection))


def is_local(request: Request) -> bool:
    """Whether a request comes from this machine, and was not passed on by a proxy on it."""
    if {"forwarded", "x-forwarded-for"} & set(request.headers):
        return False
    try:
        return ipaddress.ip_address(address(request)).is_loopback
    except ValueError:
        return False


def address(request: Request) -> str:
    """Where a request comes from, for rates."""
    return request.client.host if request.client else "unknown"


def as_json(model: BaseModel, status: int = 200) -> Response:
    """A message as an answer, without the second validation that the framework would make."""
    return Response(model.model_dump_json(), status_code=status, media_type="application/json")


def context_of(request: Request) -> Context:
    """The aggregator that serves a request."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found
