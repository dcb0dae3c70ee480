"""The audit log: every administrative act and every round, each record hashed together with the one before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .schema import audit

GENESIS = bytes(32)


def record_hash(previous: bytes, seq: int, at: float, actor: str, act: str, data: str) -> bytes:
    """The hash of a record: sha256 over the previous hash and the record as JSON."""
    return hashlib.sha256(previous + json.dumps([seq, at, actor, act, data]).encode()).digest()


def record(connection: Connection, at: float, actor: str, act: str, data: Mapping[str, Any]) -> None:
    """Add a record, in the same transaction as what it records."""
    last = connection.execute(sa.select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).first()
    seq, previous = (last.seq + 1, last.hash) if last else (0, GENESIS)
    text, at = json.dumps(data, sort_keys=True), float(at)  # as the column gives it back
    hashed = record_hash(previous, seq, at, actor, act, text)
    connection.execute(audit.insert().values(seq=seq, at=at, actor=actor, act=act, data=text, hash=hashed))


def first_broken(records: Iterable[Any]) -> int | None:
    """The number of the first record that does not follow from the one before it; None when all do.

    records: rows of the table in the order of `seq`, from the first.
    """
    previous = GENESIS
    for expected, row in enumerate(records):
        if row.seq != expected or row.hash != record_hash(previous, row.seq, row.at, row.actor, row.act, row.data):
            return expected
        previous = row.hash
    return None
