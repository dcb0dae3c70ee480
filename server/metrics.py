"""Figures for Prometheus.

What the database knows is read from it at each scrape, so that every worker gives the same; requests are counted by the worker that served
them, and summed over the files that all workers keep (the client library's multi-process mode, where PROMETHEUS_MULTIPROC_DIR is set).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy.engine import Connection

from .registry import Registry
from .rounds import n_counted, n_leased
from .schema import devices, runs
from .state import open_round, run_named

SHARED = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STATUSES = ("open", "paused", "finished")


class Requests:
    """Requests that this process served."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._count = Counter(
            "fwdllama_http_requests", "Requests served.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "fwdllama_http_request_seconds", "What requests took, to the last byte.", ("route",), buckets=BUCKETS_S, registry=self._registry
        )

    def observe(self, method: str, route: str, status: int, took_s: float) -> None:
        """Count a request."""
        self._count.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(took_s)

    def text(self) -> bytes:
        """Those of this process, or of all workers where they share a folder."""
        if not os.environ.get(SHARED):
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


class _Read(Collector):
    """Families that were read already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def standing(connection: Connection, registry: Registry, now: float, active_s: float) -> bytes:
    """Runs, rounds and devices as the database has them. active_s: how lately an active device was seen."""
    read = CollectorRegistry()
    read.register(_Read([*_runs(connection, registry, now), _devices(connection, now - active_s)]))
    return generate_latest(read)


def _runs(connection: Connection, registry: Registry, now: float) -> list[Metric]:
    by_status = GaugeMetricFamily("fwdllama_runs", "Runs.", labels=["status"])
    rows = connection.execute(sa.select(runs).order_by(runs.c.name)).all()
    for status in STATUSES:
        by_status.add_metric([status], sum(row.status == status for row in rows))
    version = GaugeMetricFamily("fwdllama_run_version", "Newest version of a run's adapter.", labels=["run"])
    ledger = GaugeMetricFamily("fwdllama_run_ledger_bytes", "Size of a run's ledger.", labels=["run"])
    best = GaugeMetricFamily("fwdllama_run_best_held_out_loss", "Lowest held-out loss of a version, nats per token.", labels=["run"])
    wasted = GaugeMetricFamily("fwdllama_run_wasted_probes", "Probes leased or computed in vain.", labels=["run"])
    probes = CounterMetricFamily("fwdllama_run_probes", "Probes in the ledger.", labels=["run"])
    results = CounterMetricFamily("fwdllama_run_results", "Results accepted.", labels=["run"])
    refused = CounterMetricFamily("fwdllama_run_refused_results", "Results refused.", labels=["run"])
    counted = GaugeMetricFamily("fwdllama_round_probes", "Probes of the open round that count so far.", labels=["run"])
    wanted = GaugeMetricFamily("fwdllama_round_wanted_probes", "Probes that the open round waits for.", labels=["run"])
    leased = GaugeMetricFamily("fwdllama_round_leased_probes", "Probes that devices are working on.", labels=["run"])
    for row in rows:
        labels = [row.name]
        version.add_metric(labels, row.version)
        ledger.add_metric(labels, row.ledger_bytes)
        wasted.add_metric(labels, row.n_wasted)
        probes.add_metric(labels, row.n_probes)
        results.add_metric(labels, row.n_results)
        refused.add_metric(labels, row.n_refused)
        if row.best_loss is not None:
            best.add_metric(labels, row.best_loss)
        if row.status == "open":
            run = run_named(connection, registry, row.id)
            current = open_round(connection, registry, run)
            counted.add_metric(labels, n_counted(current, run.spec.round))
            wanted.add_metric(labels, row.wanted)
            leased.add_metric(labels, n_leased(current, run.spec.round, now))
    return [by_status, version, ledger, best, wasted, probes, results, refused, counted, wanted, leased]


def _devices(connection: Connection, seen_after: float) -> Metric:
    family = GaugeMetricFamily("fwdllama_devices", "Devices: enrolled and not revoked, seen lately, revoked.", labels=["state"])
    here = devices.c.revoked_at.is_(None)
    for state, which in (("enrolled", here), ("active", here & (devices.c.last_seen > seen_after)), ("revoked", ~here)):
        family.add_metric([state], connection.execute(sa.select(sa.func.count()).select_from(devices).where(which)).scalar_one())
    return family
