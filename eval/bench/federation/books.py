"""The books of an aggregator, checked by someone else: straight from its database, with nothing of its code.

A result that was acknowledged must be there and counted; a seed must be in the ledger as often as results with it were counted, which is
once; the ledger must lead from the genesis to the run's theta; and the audit log must follow from its own beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fwdllama.errors import RunError
from fwdllama.federation.message import theta_digest
from fwdllama.federation.spec import RunSpec
from fwdllama.ledger import Entry, read_page, replay
from fwdllama.sampler import seeds_at


def acknowledged(logs: Iterable[Path]) -> Counter[str]:
    """Tasks whose results devices were told to be stored, and how often; a last line that was cut off by a kill does not count."""
    return Counter(line for log in logs if log.exists() for line in log.read_text().split("\n")[:-1])


def checked(url: str, name: str, acknowledgements: Counter[str]) -> dict[str, Any]:
    """What is wrong with the books of a run, in figures that should be zero or true."""
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:

            def rows(query: str, **given: Any) -> list[Any]:
                return list(connection.execute(sa.text(query), given))

            (run,) = rows("SELECT * FROM runs WHERE name = :name", name=name)
            spec = RunSpec.model_validate_json(run.spec)
            tasks = rows("SELECT id, kind, version, slot, counted, result FROM tasks WHERE run = :run AND counted IS NOT NULL", run=run.id)
            frames = rows("SELECT payload, hash FROM entries WHERE run = :run ORDER BY number", run=run.id)
            audit = rows("SELECT seq, at, actor, act, data, hash FROM audit ORDER BY seq")
            (by_device,) = rows("SELECT SUM(n_results) AS n_results, SUM(n_probes) AS n_probes FROM devices")
    finally:
        engine.dispose()
    entries, chain = _ledger(spec, frames, run)
    return {
        "acknowledged": len(acknowledgements),
        "lost": sum(1 for task in acknowledgements if task not in {row.id for row in tasks}),
        "counted_twice": _counted_wrongly(spec, tasks, entries),
        "miscounted": abs(len(tasks) - run.n_results) + abs(len(tasks) - int(by_device.n_results or 0)),
        "chain_valid": chain,
        "audit_valid": _audit_valid(audit),
        "rounds": len(entries),
        "results": len(tasks),
    }


def leased(url: str, name: str) -> tuple[int, int]:
    """How many training tasks of a run were given out, and the results of how many of them count or wait to."""
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            query = "SELECT COUNT(*), COUNT(counted) FROM tasks JOIN runs ON runs.id = tasks.run WHERE runs.name = :name AND kind = 'train'"
            given, counted = connection.execute(sa.text(query), {"name": name}).one()
    finally:
        engine.dispose()
    return int(given), int(counted)


def _ledger(spec: RunSpec, frames: list[Any], run: Any) -> tuple[list[Entry], bool]:
    """The entries, and whether they are the chain that leads to the run's theta."""
    page = b"".join(bytes(row.payload) + bytes(row.hash) for row in frames)
    try:
        entries, last = read_page(page, spec.genesis(), 0, "the database")
    except RunError:
        return [], False
    theta = replay(np.zeros(spec.n_params, np.float32), entries)
    whole = (len(entries), theta_digest(theta), last) == (run.version, run.theta_digest, bytes(run.head))
    return entries, whole and sum(len(entry.seeds) for entry in entries) == run.n_probes


def _counted_wrongly(spec: RunSpec, tasks: list[Any], entries: list[Entry]) -> int:
    """Seeds that the ledger holds more often or less often than results with them were counted, copies of a slot as one; and those in two rounds."""
    n = spec.round.probes_per_task
    expected: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    for row in tasks:
        if row.kind == "train" and row.version >= 0:
            expected[row.counted][(row.version, row.slot)] += 1
    wrong = 0
    everywhere: Counter[int] = Counter()
    for entry in entries:
        slots = (place for place, copies in expected[entry.step].items() if copies >= spec.round.copies)
        counted = Counter(seed for version, slot in slots for seed in seeds_at(spec.train.seed, version, slot * n, n))
        found = Counter(entry.seeds.tolist())
        everywhere += found
        wrong += sum(((counted - found) + (found - counted)).values())
    return wrong + sum(times - 1 for times in everywhere.values() if times > 1)


def _audit_valid(records: list[Any]) -> bool:
    previous = bytes(32)
    for expected, row in enumerate(records):
        text = json.dumps([row.seq, row.at, row.actor, row.act, row.data])
        previous = hashlib.sha256(previous + text.encode()).digest()
        if row.seq != expected or previous != bytes(row.hash):
            return False
    return bool(records)
