"""An open round between the database and the state machine, and the closing of it.

Every function here runs inside one transaction and takes the time as an argument.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection, Row

from fwdllama.federation.message import TrainResult, theta_digest
from fwdllama.federation.spec import RunSpec
from fwdllama.ledger import Entry, chained, replay
from fwdllama.sampler import Sampler

from . import aggregate
from .audit import record
from .errors import Refused
from .registry import SNAPSHOT_EVERY, Held, Registry, add_version, store_snapshot
from .rounds import Lease, Round
from .schema import devices, entries, events, runs, tasks
from .store import later

log = logging.getLogger("fwdllama.server.events")

# Statements of every request are made once: making one costs more than executing it.
LEASES = sa.select(tasks.c.id, tasks.c.version, tasks.c.slot, tasks.c.device, tasks.c.leased_at, tasks.c.until, tasks.c.counted)
_LEASES = (
    LEASES.where(tasks.c.run == sa.bindparam("run_id"), tasks.c.kind == "train", tasks.c.version >= sa.bindparam("oldest"))
    .order_by(tasks.c.version, tasks.c.slot, tasks.c.leased_at)
)
_COLUMNS = [column for column in runs.c if column.name != "spec"]  # which never changes, and is long
_BY_ID = sa.select(*_COLUMNS).where(runs.c.id == sa.bindparam("named"))
_BY_NAME = sa.select(*_COLUMNS).where(runs.c.name == sa.bindparam("named"))
_MARKED = runs.update().where(runs.c.id == sa.bindparam("run_id")).values(mark=sa.bindparam("drawn"))


@dataclass(frozen=True)
class Open:
    """A run's row with its specification."""

    row: Row[Any]
    spec: RunSpec

    @property
    def id(self) -> str:
        """The run's id."""
        return str(self.row.id)

    @property
    def last(self) -> bool:
        """Whether the budget is used up, so that only the last evaluation is missing."""
        return int(self.row.wanted) == 0


def run_named(connection: Connection, registry: Registry, named: str) -> Open:
    """A run by id or name.

    Raises:
        Refused: 404, there is none.
    """
    row = connection.execute(_BY_ID, {"named": named}).first() or connection.execute(_BY_NAME, {"named": named}).first()
    if row is None:
        raise Refused(404, f"there is no run {named!r}.")
    return Open(row, registry.spec(connection, row.id))


def say(connection: Connection, run: str | None, kind: str, at: float, data: Mapping[str, Any]) -> None:
    """Add an event, for whoever watches."""
    connection.execute(events.insert().values(run=run, kind=kind, at=at, data=json.dumps(data)))
    later(connection, lambda: log.info(kind, extra={"facts": dict(data)}))


def change(connection: Connection, run: str, **values: Any) -> None:
    """Set columns of a run."""
    connection.execute(runs.update().where(runs.c.id == run).values(**values))


def open_round(connection: Connection, registry: Registry, run: Open) -> Round:
    """The round as the state machine knows it."""
    row = run.row
    version, terms = int(row.version), (int(row.wanted), float(row.deadline), int(row.extensions))
    known = registry.round(run.id, version, int(row.mark))
    if known is not None:
        return known.under(*terms)
    found = connection.execute(_LEASES, {"run_id": row.id, "oldest": max(0, version - run.spec.round.staleness)})
    current = Round(version, *terms, tuple(Lease(*x) for x in found))
    registry.keep_round(run.id, int(row.mark), current)
    return current


def new_mark() -> int:
    """A mark for a round whose leases change. Drawn, not counted: of a change that was rolled back none may be mistaken for the next."""
    return random.getrandbits(62)


def marked(connection: Connection, registry: Registry, run: Open, current: Round) -> None:
    """Mark the round as changed, and remember what it is now."""
    mark = new_mark()
    connection.execute(_MARKED, {"run_id": run.id, "drawn": mark})
    registry.keep_round(run.id, mark, current)


def release(connection: Connection, registry: Registry, run: Open, current: Round, ended: Sequence[str], now: float) -> None:
    """End leases before their time, so that their slots are handed on at once; `current` is the round without them."""
    connection.execute(tasks.update().where(tasks.c.id.in_(ended)).values(until=now))
    marked(connection, registry, run, current)


def slot_seeds(registry: Registry, connection: Connection, run: Open, version: int, slot: int) -> list[int]:
    """The seeds of a slot: the same whoever asks, since they follow from the run's seed, round and place."""
    config, n = run.spec.train, run.spec.round.probes_per_task
    sampler = Sampler(config.seed, config.step.candidates)
    update = registry.update(connection, run.id, version) if config.step.candidates > 1 else None
    return sampler.seeds(version, slot * n, n, update)


def contributions(connection: Connection, registry: Registry, run: Open, current: Round) -> list[aggregate.Contribution]:
    """The results that count in `current`, in the order of round and slot; of a slot that lacks copies, none."""
    complete: dict[tuple[int, int], list[Lease]] = {}
    for lease in current.leases:
        if lease.counted == current.number:
            complete.setdefault((lease.round, lease.slot), []).append(lease)
    chosen = [lease for key in sorted(complete) for lease in complete[key] if len(complete[key]) >= run.spec.round.copies]
    if not chosen:
        return []
    found = connection.execute(sa.select(tasks.c.id, tasks.c.result).where(tasks.c.run == run.id, tasks.c.counted == current.number))
    texts = {row.id: row.result for row in found}
    return [
        aggregate.Contribution(
            lease.device,
            np.array(slot_seeds(registry, connection, run, lease.round, lease.slot), np.uint64),
            TrainResult.model_validate_json(texts[lease.task] or ""),
            current.number - lease.round,
        )
        for lease in chosen
    ]


def close(connection: Connection, registry: Registry, run: Open, current: Round, now: float) -> None:
    """Step: the entry, the new version and the next round, all in the transaction that also holds the result that closed it."""
    row, spec = run.row, run.spec
    merging = contributions(connection, registry, run, current)
    learner = aggregate.Learner(row.mean_square, int(row.n_probes))
    merged = aggregate.merge(merging, spec, learner, current.number, spec.train.budget.fraction(current.number, learner.n_probes))
    held = registry.held(connection, run.id, current.number)
    theta = replay(held.theta, [merged.entry])
    digest, hashed = append(connection, row, merged.entry, theta, now, _facts(run, current, merging, merged, now))
    n_devices = len({c.device for c in merging})
    add_version(
        connection,
        run.id,
        current.number + 1,
        parent=current.number,
        theta_digest=digest,
        created_at=now,
        n_probes=len(merged.entry.seeds),
        n_devices=n_devices,
        loss=merged.loss,
    )
    version, n_probes = current.number + 1, merged.learner.n_probes
    done = spec.train.budget.fraction(version, n_probes) >= 1.0
    change(
        connection,
        run.id,
        version=version,
        n_probes=n_probes,
        mean_square=merged.learner.mean_square,
        wanted=0 if done else aggregate.wanted([], spec),
        opened_at=now,
        deadline=now + spec.round.deadline_s,
        extensions=0,
        n_wasted=runs.c.n_wasted + _waste(connection, run, current, version),
    )
    if version % SNAPSHOT_EVERY == 0:
        store_snapshot(connection, run.id, version, theta, public=spec.public)
    registry.keep(run.id, Held(version, digest, theta))
    record(connection, now, "round", "round-closed", {"run": row.name, "round": current.number, "ledger": hashed.hex()})


def _facts(run: Open, current: Round, merging: Sequence[aggregate.Contribution], merged: aggregate.Merged, now: float) -> dict[str, Any]:
    return {
        "run": str(run.row.name),
        "round": current.number,
        "closed_at": now,
        "duration_s": round(now - float(run.row.opened_at), 3),
        "n_probes": len(merged.entry.seeds),
        "n_wanted": current.wanted,
        "n_devices": len({c.device for c in merging}),
        "n_results": len(merging),
        "loss": merged.loss,
        "gradient_rms": merged.gradient_rms,
        "lr": merged.lr,
    }


def append(
    connection: Connection, row: Row[Any], entry: Entry, theta: NDArray[np.float32], now: float, facts: dict[str, Any]
) -> tuple[str, bytes]:
    """Add an entry to the ledger, with its event; returns the digest of `theta`, which it leads to, and its own hash."""
    payload = entry.payload()
    digest, hashed = theta_digest(theta), chained(row.head, payload)
    connection.execute(
        entries.insert().values(
            run=row.id, number=entry.step, payload=payload, hash=hashed, theta_digest=digest, closed_at=now, facts=json.dumps(facts)
        )
    )
    change(connection, row.id, head=hashed, theta_digest=digest, ledger_bytes=runs.c.ledger_bytes + len(payload) + len(hashed))
    kind = "round-closed" if entry.restores is None else "run-rolled-back"
    say(connection, row.id, kind, now, facts)
    return digest, hashed


def _waste(connection: Connection, run: Open, current: Round, version: int) -> int:
    """Count leases that can no longer count as lost, once, and results in slots that lack copies; returns their probes."""
    config = run.spec.round
    lost = [x for x in current.leases if not x.done and x.round < version - config.staleness]
    lost += [x for x in current.leases if x.counted == current.number and current.counted[(x.round, x.slot)] < config.copies]
    return waste(connection, lost, config.probes_per_task)


def waste(connection: Connection, lost: Sequence[Lease], n_probes: int) -> int:
    """Mark leases as lost and charge them to their devices; returns the probes that were not counted as lost before."""
    if not lost:
        return 0
    ids = [x.task for x in lost]
    fresh = connection.execute(sa.select(tasks.c.id, tasks.c.device).where(tasks.c.id.in_(ids), tasks.c.wasted == 0)).all()
    connection.execute(tasks.update().where(tasks.c.id.in_(ids)).values(wasted=1))
    for row in fresh:
        connection.execute(devices.update().where(devices.c.id == row.device).values(n_wasted=devices.c.n_wasted + n_probes))
    return n_probes * len(fresh)
