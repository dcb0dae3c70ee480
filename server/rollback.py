"""Going back to an earlier version, forwards: nothing is removed."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from fwdllama.ledger import restoring

from . import aggregate
from .errors import Refused
from .registry import Held, Registry, add_version, store_snapshot
from .schema import runs, tasks
from .scoring import judge_versions
from .state import Open, append, change, open_round, waste


def rolled_back(connection: Connection, registry: Registry, run: Open, version: int, now: float) -> None:
    """Go back to an earlier version: an entry that says so, a new version with the old theta, and a new round.

    Raises:
        Refused: 409, it is not an earlier version.
    """
    row, latest = run.row, int(run.row.version)
    if not 0 <= version < latest:
        earlier = f"give one of 0 to {latest - 1}" if latest else "there is none"
        raise Refused(409, f"version {version} is not earlier than version {latest}, at which run {row.name} is; {earlier}.")
    theta = registry.theta(connection, run.id, version)
    facts = {"run": str(row.name), "round": latest, "to": version, "n_probes": 0, "n_devices": 0}
    digest, _ = append(connection, row, restoring(latest, version), theta, now, facts)
    add_version(connection, run.id, latest + 1, parent=version, theta_digest=digest, created_at=now, n_probes=0, n_devices=0)
    current = open_round(connection, registry, run)
    change(
        connection,
        run.id,
        version=latest + 1,
        wanted=0 if run.spec.train.budget.fraction(latest + 1, int(row.n_probes)) >= 1.0 else aggregate.wanted([], run.spec),
        opened_at=now,
        deadline=now + run.spec.round.deadline_s,
        extensions=0,
        n_wasted=runs.c.n_wasted + waste(connection, current.in_vain, run.spec.round.probes_per_task),
    )
    # Results computed elsewhere than at this theta must not count, however stale results may be.
    connection.execute(tasks.update().where(tasks.c.id.in_([x.task for x in current.in_vain])).values(version=-1))
    store_snapshot(connection, run.id, latest + 1, theta, public=run.spec.public)
    registry.keep(run.id, Held(latest + 1, digest, theta))
    judge_versions(connection, run.id, latest + 1)
