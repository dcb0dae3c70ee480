"""A result arrives: refused with a sentence, or stored and counted once; and what follows from it, and from time passing."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from fwdllama.federation.message import EvaluateResult, Receipt, TrainResult

from . import aggregate
from .audit import record
from .errors import Refused
from .registry import Registry
from .rounds import Lease, Round, decide, judge, n_counted
from .schema import devices, runs, tasks, versions
from .scoring import score_version
from .state import Open, change, close, contributions, new_mark, open_round, release, run_named, say, waste

log = logging.getLogger("fwdllama.server")

_TASK = sa.select(tasks).where(tasks.c.id == sa.bindparam("task_id"), tasks.c.device == sa.bindparam("device_id"))
_DIGEST = sa.select(versions.c.theta_digest).where(versions.c.run == sa.bindparam("run_id"), versions.c.version == sa.bindparam("of_version"))
_ACCEPTED = (
    tasks.update()
    .where(tasks.c.id == sa.bindparam("task_id"))
    .values(counted=sa.bindparam("in_round"), result=sa.bindparam("text"), wasted=0)
)
_CONTRIBUTED = (
    devices.update()
    .where(devices.c.id == sa.bindparam("device_id"))
    .values(
        n_results=devices.c.n_results + 1,
        n_probes=devices.c.n_probes + sa.bindparam("probes"),
        n_wasted=devices.c.n_wasted - sa.bindparam("regained"),
    )
)
_RECEIVED = (
    runs.update()
    .where(runs.c.id == sa.bindparam("run_id"))
    .values(n_results=runs.c.n_results + 1, n_wasted=runs.c.n_wasted - sa.bindparam("regained"), mark=sa.bindparam("drawn"))
)


def deliver(
    connection: Connection, registry: Registry, task: str, device: str, result: TrainResult | EvaluateResult, now: float
) -> tuple[Receipt | Refused, str]:
    """Take a result; returns the run too. A refusal is returned, not raised: that it happened is written too.

    Raises:
        Refused: 404, there is no such task of this device.
    """
    row = connection.execute(_TASK, {"task_id": task, "device_id": device}).first()
    if row is None:
        raise Refused(404, f"device {device} has no task {task}.")
    run = run_named(connection, registry, row.run)
    text = result.model_dump_json()
    if row.counted is not None:
        same = row.result == text
        return Receipt(duplicate=True) if same else Refused(409, f"another result of task {task} was accepted before."), run.id
    n_seeds = run.spec.round.probes_per_task
    refusal = _refusal(connection, run, row, result, n_seeds)
    if refusal is None and isinstance(result, TrainResult):
        current = open_round(connection, registry, run)
        lease = Lease(row.id, row.version, row.slot, row.device, row.leased_at, row.until)
        verdict = judge(current, run.spec.round, lease) if row.version >= 0 else None
        if row.version < 0:
            refusal = Refused(409, "stale: the run was taken back to an earlier version meanwhile.")
        elif run.last:  # however stale results may be, there is no round left that it could count in
            refusal = Refused(410, f"late: the budget of run {run.row.name} is used up.")
            change(connection, run.id, n_wasted=runs.c.n_wasted + waste(connection, [lease], n_seeds))
        elif verdict is not None:
            refusal = Refused(verdict.status, verdict.sentence)
            change(connection, run.id, n_wasted=runs.c.n_wasted + waste(connection, [lease], n_seeds))
    if refusal is not None:
        if refusal.status == 422:  # its device will not do better: the slot goes to another at once
            current = open_round(connection, registry, run).released([task], now)
            release(connection, registry, run, current, [task], now)
        change(connection, run.id, n_refused=runs.c.n_refused + 1)
        connection.execute(devices.update().where(devices.c.id == device).values(n_refused=devices.c.n_refused + 1))
        say(connection, run.id, "result-refused", now, {"device": device, "task": task, "status": refusal.status, "why": refusal.sentence})
        return refusal, run.id
    n_probes = n_seeds if isinstance(result, TrainResult) else 0
    counted = int(run.row.version) if isinstance(result, TrainResult) else int(row.version)
    # A lease that was counted as lost, and whose result came after all, is not.
    regained = n_probes if row.wasted else 0
    connection.execute(_ACCEPTED, {"task_id": task, "in_round": counted, "text": text})
    connection.execute(_CONTRIBUTED, {"device_id": device, "probes": n_probes, "regained": regained})
    mark = new_mark()
    connection.execute(_RECEIVED, {"run_id": run.id, "regained": regained, "drawn": mark})
    if isinstance(result, TrainResult):
        current = current.with_result(task)
        registry.keep_round(run.id, mark, current)
        advance(connection, registry, run, current, now)
    else:
        n_reports = score_version(connection, run, int(row.version), now)
        if run.last and row.version == run.row.version and n_reports >= run.spec.evaluation.devices:
            finish(connection, registry, run, "the budget is used up", now)
    return Receipt(), run.id


def _digest(connection: Connection, run: Open, version: int) -> str:
    if version == int(run.row.version):
        return str(run.row.theta_digest)
    return str(connection.execute(_DIGEST, {"run_id": run.id, "of_version": version}).scalar_one())


def _refusal(connection: Connection, run: Open, row: Row[Any], result: TrainResult | EvaluateResult, n_seeds: int) -> Refused | None:
    if run.row.status == "finished":
        return Refused(410, f"late: run {run.row.name} is finished.")
    if result.kind != row.kind:
        return Refused(422, f"task {row.id} asks to {row.kind}, but the result is of kind {result.kind!r}.")
    if isinstance(result, TrainResult):
        wrong = aggregate.problem(result, run.spec, n_seeds)
    else:
        most = run.spec.aggregation.max_loss
        wrong = None if 0.0 <= result.loss <= most else f"loss is {result.loss!r}, but must be between 0 and {most:g} nats."
    if wrong is None and row.version >= 0 and result.theta_digest != (digest := _digest(connection, run, row.version)):
        wrong = f"the result was computed at {result.theta_digest[:12]}, but version {row.version} is {digest[:12]}."
    return None if wrong is None else Refused(422, wrong)


def advance(connection: Connection, registry: Registry, run: Open, current: Round, now: float) -> None:
    """Whatever the round's state and the time ask for: close, extend, abandon, or nothing."""
    config = run.spec.round
    if run.spec.train.pacing.kind == "variance" and n_counted(current, config) >= current.wanted:
        needed = aggregate.wanted(contributions(connection, registry, run, current), run.spec)
        if needed > current.wanted:
            change(connection, run.id, wanted=needed)
            return
    decision = decide(current, config, now)
    if decision == "close":
        close(connection, registry, run, current, now)
    elif decision == "extend":
        change(connection, run.id, deadline=now + config.deadline_s, extensions=current.extensions + 1)
        facts = {"run": run.row.name, "round": current.number, "probes": n_counted(current, config), "wanted": current.wanted}
        say(connection, run.id, "round-extended", now, facts)
    elif decision == "abandon":
        reason = f"round {current.number} had {n_counted(current, config)} of {current.wanted} probes after {current.extensions} extensions"
        change(connection, run.id, status="paused", reason=reason, extensions=0)
        record(connection, now, "round", "round-abandoned", {"run": run.row.name, "round": current.number, "reason": reason})
        say(connection, run.id, "round-abandoned", now, {"run": run.row.name, "round": current.number, "reason": reason})


def finish(connection: Connection, registry: Registry, run: Open, reason: str, now: float) -> None:
    """End the run; its versions stay."""
    lost = waste(connection, open_round(connection, registry, run).in_vain, run.spec.round.probes_per_task)
    change(connection, run.id, status="finished", reason=reason, n_wasted=runs.c.n_wasted + lost)
    record(connection, now, "round", "run-finished", {"run": run.row.name, "reason": reason})
    say(connection, run.id, "run-finished", now, {"run": run.row.name, "reason": reason})


def tick(connection: Connection, registry: Registry, now: float) -> None:
    """What time alone brings about, for every open run: deadlines, lost leases, patience, and the end of the last evaluation."""
    for id_ in connection.execute(sa.select(runs.c.id).where(runs.c.status == "open")).scalars().all():
        try:
            with connection.begin_nested():
                _tick(connection, registry, id_, now)
        except sa.exc.OperationalError:
            raise
        except Exception:
            log.exception("what is due of run %s could not be done; other runs go on, and it is tried again", id_)


def _tick(connection: Connection, registry: Registry, id_: str, now: float) -> None:
    run = run_named(connection, registry, id_)
    row, patience = run.row, run.spec.evaluation.patience
    current = open_round(connection, registry, run)
    lost = [x for x in current.leases if not x.done and x.until <= now]
    if n_lost := waste(connection, lost, run.spec.round.probes_per_task):
        change(connection, run.id, n_wasted=runs.c.n_wasted + n_lost)
    if patience is not None and row.since_best >= patience:
        finish(connection, registry, run, f"the held-out loss has not fallen for {patience} scored versions", now)
    elif run.last:
        asked = connection.execute(
            sa.select(tasks.c.until, tasks.c.counted).where(
                tasks.c.run == run.id, tasks.c.kind == "evaluate", tasks.c.version == int(row.version)
            )
        ).all()
        # Nobody is still at it, and whoever could come has had the time of a lease.
        idle = not any(x.counted is None and now < x.until for x in asked)
        if now >= row.deadline or (asked and idle and now >= row.opened_at + min(10.0, run.spec.round.lease_s)):
            finish(connection, registry, run, "the budget is used up", now)
    else:
        advance(connection, registry, run, current, now)
