"""The answer to a check-in: an evaluation that is due, else seeds, else when to come back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fwdllama.federation.message import Assignment, CheckIn, Task, Wait

from .errors import Refused
from .registry import Registry
from .rounds import Lease, Round, free_slot, wait_s
from .schema import devices, tasks
from .state import LEASES, Open, marked, open_round, release, slot_seeds

ACTIVE_S = 600.0  # an evaluating device that was not seen for so long may be replaced
CHECK_INS_PER_S = 50  # that waiting devices should cause together
EXCHANGE_S = 0.5
RESTING_S = 60.0  # before a device that must not work is heard of again
_LEASED = tasks.insert()
_EMPTY = tasks.c.result.like('%"n_examples":0,%').label("empty")  # a score of no examples
_ABOUT = (
    devices.update()
    .where(devices.c.id == sa.bindparam("device_id"))
    .values(battery=sa.bindparam("battery"), charging=sa.bindparam("charging"), memory_bytes=sa.bindparam("memory_bytes"))
)


def check_in(connection: Connection, registry: Registry, run: Open, device: str, checkin: CheckIn, n_active: int, now: float) -> Assignment:
    """Lease a task to `device`, or tell it to wait. n_active: how many devices were seen lately.

    Raises:
        Refused: 409, the device has another base model.
    """
    row, spec = run.row, run.spec
    if checkin.base != spec.base.sha256:
        raise Refused(409, f"run {row.name} is for base {spec.base.name} ({spec.base.sha256[:12]}), but the device has {checkin.base[:12]}.")
    about = {"battery": checkin.battery, "charging": checkin.charging, "memory_bytes": checkin.memory_bytes}
    if any(value is not None for value in about.values()):
        connection.execute(_ABOUT, {"device_id": device, **about})
    if row.status == "finished":
        return Assignment(wait=Wait(least_s=0, most_s=0, reason=f"run {row.name} is finished: {row.reason}", finished=True))
    if row.status == "paused":
        return _wait(30.0, n_active, f"run {row.name} is paused" + (f": {row.reason}" if row.reason else ""))
    if checkin.resting:
        current = open_round(connection, registry, run)
        _let_go(connection, registry, run, current, [x for x in current.leases if x.device == device and x.active(now)], now)
        return _wait(RESTING_S, n_active, "the device must not work now")
    if (version := int(row.version)) % spec.evaluation.every == 0 or run.last:
        task = _evaluation(connection, run, device, now)
        if task is not None:
            return Assignment(task=task)
    if run.last:
        return _wait(2.0, n_active, f"run {row.name} is being scored for the last time")
    current = open_round(connection, registry, run)
    held = [lease for lease in current.leases if lease.device == device and lease.active(now)]
    # A device has one task at a time: asking again, after a restart or to keep others from working, brings the same.
    mine = next((lease for lease in held if lease.round == version), None)
    if mine is not None:
        return Assignment(task=_task(run, mine, "train", slot_seeds(registry, connection, run, version, mine.slot), now))
    current = _let_go(connection, registry, run, current, held, now)  # of versions before this one, where results may be late
    slot = free_slot(current, spec.round, device, now)
    if slot is None:
        return _wait(wait_s(current, now), n_active, f"all probes of round {version} are given out")
    seeds = slot_seeds(registry, connection, run, version, slot)
    lease = _leased(connection, run, device, "train", slot, now)
    marked(connection, registry, run, current.with_lease(lease))
    return Assignment(task=_task(run, lease, "train", seeds, now))


def _let_go(connection: Connection, registry: Registry, run: Open, current: Round, held: Sequence[Lease], now: float) -> Round:
    """The round after a device's leases ended: whoever asks for other work, or for none, is not at work."""
    if not held:
        return current
    ended = [lease.task for lease in held]
    current = current.released(ended, now)
    release(connection, registry, run, current, ended, now)
    return current


def _wait(least_s: float, n_active: int, reason: str) -> Assignment:
    """Spread over so long that all devices together do not ask too often."""
    most = max(least_s + EXCHANGE_S, n_active / CHECK_INS_PER_S)
    return Assignment(wait=Wait(least_s=least_s, most_s=most, reason=reason))


def _leased(connection: Connection, run: Open, device: str, kind: str, slot: int, now: float) -> Lease:
    lease = Lease(f"t{secrets.token_hex(8)}", int(run.row.version), slot, device, now, now + run.spec.round.lease_s)
    connection.execute(
        _LEASED,
        {
            "id": lease.task,
            "run": run.id,
            "kind": kind,
            "version": lease.round,
            "slot": slot,
            "device": device,
            "leased_at": now,
            "until": lease.until,
            "wasted": 0,
        },
    )
    return lease


def _task(run: Open, lease: Lease, kind: str, seeds: list[int], now: float) -> Task:
    return Task.model_validate(
        {
            "task": lease.task,
            "run": run.id,
            "kind": kind,
            "version": lease.round,
            "theta_digest": run.row.theta_digest,
            "seeds": seeds,
            "lease_s": lease.until - now,
        }
    )


def _evaluation(connection: Connection, run: Open, device: str, now: float) -> Task | None:
    """The evaluation of the newest version, if this device should do it.

    The same devices are asked every time, as far as they are there: losses on different questions do not compare.
    """
    given = connection.execute(
        LEASES.add_columns(_EMPTY).where(tasks.c.run == run.id, tasks.c.kind == "evaluate", tasks.c.version == int(run.row.version))
    ).all()
    mine = next((lease for lease in (Lease(*x[:-1]) for x in given) if lease.device == device and lease.active(now)), None)
    if mine is not None:
        return _task(run, mine, "evaluate", [], now)
    answered = {x.device for x in given if x.counted is not None}
    taken = {x.device for x in given if not x.empty and (x.counted is not None or now < x.until)}
    if device in answered | taken or len(taken) >= run.spec.evaluation.devices:
        return None
    panel = connection.execute(
        sa.select(tasks.c.device)
        .join(devices, devices.c.id == tasks.c.device)
        .where(
            tasks.c.run == run.id,
            tasks.c.kind == "evaluate",
            tasks.c.counted.is_not(None),
            ~_EMPTY,
            devices.c.last_seen > now - ACTIVE_S,
            devices.c.revoked_at.is_(None),
        )
        .distinct()
    )
    members = {x.device for x in panel}
    if device not in members and len(members | taken) >= run.spec.evaluation.devices:
        return None
    return _task(run, _leased(connection, run, device, "evaluate", 0, now), "evaluate", [], now)
