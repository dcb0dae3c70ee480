"""Rows of the database as the messages that clients see."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from fwdllama.federation.message import Run, Snapshot, Version
from fwdllama.federation.spec import RunSpec

from .schema import blobs, versions


def run_view(connection: Connection, row: Row[Any], spec: RunSpec) -> Run:
    """A run."""
    snapshot = None
    if row.snapshot_version is not None:
        size = connection.execute(sa.select(blobs.c.size_bytes).where(blobs.c.sha256 == row.snapshot_sha256)).scalar_one()
        snapshot = Snapshot(version=row.snapshot_version, sha256=row.snapshot_sha256, size_bytes=size)
    return Run(
        run=row.id,
        status=row.status,
        reason=row.reason,
        spec=spec,
        genesis=spec.genesis().hex(),
        version=row.version,
        theta_digest=row.theta_digest,
        ledger_bytes=row.ledger_bytes,
        snapshot=snapshot,
    )


def version_views(connection: Connection, run: Row[Any], first: int, stop: int) -> list[Version]:
    """Versions `first` to `stop` - 1, oldest first."""
    found = connection.execute(
        sa.select(versions).where(versions.c.run == run.id, versions.c.version >= first, versions.c.version < stop).order_by(versions.c.version)
    )
    return [
        Version(
            run=run.id,
            version=row.version,
            theta_digest=row.theta_digest,
            parent=row.parent,
            created_at=row.created_at,
            n_probes=row.n_probes,
            n_devices=row.n_devices,
            loss=row.loss,
            held_out_loss=row.held_out_loss,
            n_evaluated=row.n_evaluated,
            tags=_tags(run, row.version),
            adapter_sha256=row.adapter_sha256,
        )
        for row in found
    ]


def _tags(run: Row[Any], version: int) -> Any:
    return tuple(tag for tag, tagged in (("latest", run.version), ("best", run.best_version)) if tagged == version)
