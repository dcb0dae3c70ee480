"""The audit log: every administrative act and every round, each record hashed together with the one before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fwdllama.errors import RunError
from fwdllama.federation.spec import RunSpec
from fwdllama.ledger import chained

from .schema import audit, entries, runs

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


def followed(records: Iterable[Any]) -> Iterator[bytes]:
    """The hash of each record, found to follow from the one before it.

    records: rows of the table in the order of `seq`, from the first.

    Raises:
        RunError: one does not follow; the sentence says which.
    """
    previous = GENESIS
    for expected, row in enumerate(records):
        if row.seq != expected:
            raise RunError(f"the audit log has no record {expected}: it was removed.")
        hashed = bytes(row.hash)
        if hashed != record_hash(previous, row.seq, row.at, row.actor, row.act, row.data):
            raise RunError(f"record {expected} of the audit log ({row.act}) was changed, or does not follow from the one before it.")
        yield hashed
        previous = hashed


def check_ledgers(connection: Connection) -> int:
    """Follow every run's ledger from its genesis, and compare it with what the audit log says of each round; returns the number of entries.

    Raises:
        RunError: an entry does not follow, is missing, or is not the one that was recorded.
    """
    recorded: dict[tuple[str, int], str] = {}
    for text in connection.execute(sa.select(audit.c.data).where(audit.c.act == "round-closed")).scalars():
        closed = json.loads(text)
        recorded[closed["run"], closed["round"]] = closed["ledger"]
    n = 0
    for run in connection.execute(sa.select(runs.c.id, runs.c.name, runs.c.spec, runs.c.head, runs.c.version)).all():
        last = RunSpec.model_validate_json(run.spec).genesis()
        ordered = sa.select(entries.c.number, entries.c.payload, entries.c.hash).where(entries.c.run == run.id).order_by(entries.c.number)
        count = 0
        for count, row in enumerate(connection.execute(ordered), 1):
            place = f"entry {count - 1} of run {run.name}"
            if row.number != count - 1 or bytes(row.hash) != chained(last, bytes(row.payload)):
                raise RunError(f"{place} was changed, or does not follow from the one before it.")
            last = bytes(row.hash)
            if recorded.get((run.name, row.number), last.hex()) != last.hex():
                raise RunError(f"{place} is not the one that the audit log recorded.")
        if last != bytes(run.head) or count != run.version:
            raise RunError(f"the ledger of run {run.name} has {count} entries and does not end where the run is, at version {run.version}.")
        n += count
    return n
