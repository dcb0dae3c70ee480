"""Who is asking: devices by signature, administrators by key, newcomers by token.

The aggregator's `Secrets` are two files that only their owner can read. A device's key is derived from one of them, so that the database
holds no secret: a copy of it lets nobody in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from starlette.requests import Request

from fwdllama.errors import ResourceError
from fwdllama.federation import signature as signed

from .errors import Refused
from .schema import devices, tokens

ADMIN = "admin"
_SECRET = re.compile("[0-9a-f]{64}")
_ADMITTED = (
    devices.update()
    .where(devices.c.id == sa.bindparam("device_id"), devices.c.revoked_at.is_(None), devices.c.last_nonce < sa.bindparam("nonce"))
    .values(last_nonce=sa.bindparam("nonce"), last_seen=sa.bindparam("now"))
)


@dataclass(frozen=True)
class Secrets:
    """What signs and opens: the secret that device keys derive from, and the administrator's key."""

    device: bytes
    admin: str

    @classmethod
    def at(cls, folder: Path) -> Secrets:
        """Those of a folder, made on first use."""
        return cls(bytes.fromhex(_kept(folder / "device.secret")), _kept(folder / "admin.key"))


def _kept(path: Path) -> str:
    """The content of a file that only its owner may read; 32 random bytes in hex where there is none.

    Raises:
        ResourceError: others may read it, or it is not what was written.
    """
    if not path.exists():
        _make(path)
    if path.stat().st_mode & 0o077:
        raise ResourceError(f"{path} can be read by others; it must have mode 0600: chmod 600 {path}")
    text = path.read_text(errors="replace").strip()
    if _SECRET.fullmatch(text) is None:
        raise ResourceError(f"{path} must hold 64 hex digits; put it back from a backup, or remove it for a new one.")
    return text


def _make(path: Path) -> None:
    """A new secret, whole or not at all, and never in the place of one that another process made meanwhile."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def hashed(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(request: Request) -> str | None:
    """The token in the Authorization header."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None


def is_admin(request: Request, known: Secrets) -> bool:
    """Whether the request carries the administrator's key."""
    token = bearer(request)
    return token is not None and hmac.compare_digest(hashed(token), hashed(known.admin))


@dataclass(frozen=True)
class Signature:
    """A request whose signature was found right; its nonce is still to be checked, in the transaction that the request writes."""

    device: str
    nonce: int


def verified(request: Request, body: bytes, known: Secrets, now: float) -> Signature:
    """Check a signed request against the key that its device must have.

    Raises:
        Refused: 401, not signed, too old or too new, or wrong.
    """
    device = request.headers.get(signed.DEVICE)
    if device is None:
        raise Refused(401, f"this needs a signed request (header {signed.DEVICE} and three others) or an administrator's key.")
    try:
        nonce, time_s = int(request.headers.get(signed.NONCE, "")), float(request.headers.get(signed.TIME, ""))
    except ValueError:
        raise Refused(401, f"{signed.NONCE} must be a whole number and {signed.TIME} seconds since 1970.") from None
    if not 0 < nonce < 1 << 63:
        raise Refused(401, f"{signed.NONCE} is {nonce}, but must be between 1 and 2**63 - 1.")
    if not abs(time_s - now) <= signed.MAX_SKEW_S:
        raise Refused(401, f"the request's time differs by {time_s - now:.0f} s from the aggregator's; at most {signed.MAX_SKEW_S:.0f} are allowed.")
    # Never `request.url`: it is put together from the Host header, which could bring a path of its own.
    target, query = request.scope["raw_path"].decode("latin-1"), request.scope["query_string"].decode("latin-1")
    if query:
        target += f"?{query}"
    expected = signed.signature(signed.device_key(known.device, device), request.method, target, body, nonce, time_s)
    given = request.headers.get(signed.SIGNATURE, "")
    if not hmac.compare_digest(expected.encode(), given.encode()):
        raise Refused(401, "the signature does not match the request and the device's key.")
    return Signature(device, nonce)


def admit(connection: Connection, signature: Signature, now: float) -> None:
    """Count the nonce as used.

    Raises:
        Refused: 401, the device is unknown or revoked, or the nonce was used before.
    """
    fresh = connection.execute(_ADMITTED, {"device_id": signature.device, "nonce": signature.nonce, "now": now})
    if fresh.rowcount == 1:
        return
    row = connection.execute(sa.select(devices.c.revoked_at).where(devices.c.id == signature.device)).first()
    if row is None:
        raise Refused(401, f"device {signature.device} is not enrolled here.")
    if row.revoked_at is not None:
        raise Refused(401, f"device {signature.device} was revoked.")
    raise Refused(401, f"the nonce {signature.nonce} was used before; it must grow with every request.")


def spend(connection: Connection, token: str | None, now: float) -> str:
    """Use an enrolment token once; returns its id.

    Raises:
        Refused: 401, unknown, revoked, expired or used up.
    """
    row = None
    if token is not None:
        row = connection.execute(sa.select(tokens).where(tokens.c.hash == hashed(token))).first()
    if row is None:
        raise Refused(401, "the enrolment token is not known here.")
    if row.revoked_at is not None:
        raise Refused(401, f"the enrolment token {row.name!r} was revoked.")
    if row.expires_at is not None and now >= row.expires_at:
        raise Refused(401, f"the enrolment token {row.name!r} has expired.")
    if row.uses_left is not None:
        if row.uses_left < 1:
            raise Refused(401, f"the enrolment token {row.name!r} is used up.")
        connection.execute(tokens.update().where(tokens.c.id == row.id).values(uses_left=row.uses_left - 1))
    return str(row.id)
