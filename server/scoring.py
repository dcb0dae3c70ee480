"""Held-out losses of versions, as devices report them, and which version is the best."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fwdllama.federation.message import EvaluateResult

from .schema import tasks, versions
from .state import Open, change, say

HEAVIEST = 4.0  # times the median number of examples, the most that one device's score weighs


def score_version(connection: Connection, run: Open, version: int, now: float) -> int:
    """The mean held-out loss of a version over its reports, weighted by examples, and the best version; returns how many reports there are."""
    where = (tasks.c.run == run.id) & (tasks.c.kind == "evaluate") & (tasks.c.counted == version)
    reports = [EvaluateResult.model_validate_json(x.result) for x in connection.execute(sa.select(tasks.c.result).where(where))]
    n_examples = sum(report.n_examples for report in reports)
    if n_examples:
        # How many examples it has is a device's own word: none counts for more than a few typical ones.
        most = HEAVIEST * float(np.median([r.n_examples for r in reports]))
        loss = float(np.average([r.loss for r in reports], weights=[min(r.n_examples, most) for r in reports]))
        at = (versions.c.run == run.id) & (versions.c.version == version)
        connection.execute(versions.update().where(at).values(held_out_loss=loss, n_evaluated=n_examples))
        judge_versions(connection, run.id, int(run.row.version))
        say(connection, run.id, "version-evaluated", now, {"run": run.row.name, "version": version, "held_out_loss": loss, "examples": n_examples})
    return len(reports)


def judge_versions(connection: Connection, run: str, latest: int) -> None:
    """Which version is the best of those that the latest goes back to; what a roll-back took back is out of the race."""
    rows = connection.execute(sa.select(versions.c.version, versions.c.parent, versions.c.held_out_loss).where(versions.c.run == run)).all()
    parents = {row.version: row.parent for row in rows}
    lineage: set[int] = set()
    at: int | None = latest
    while at is not None:
        lineage.add(at)
        at = parents[at]
    scored = [row for row in rows if row.held_out_loss is not None and row.version in lineage]
    if not scored:
        change(connection, run, best_version=None, best_loss=None, since_best=0)
        return
    best = min(scored, key=lambda row: (row.held_out_loss, row.version))
    since = sum(1 for row in scored if row.version > best.version)
    change(connection, run, best_version=best.version, best_loss=best.held_out_loss, since_best=since)
