"""Versions of a run's adapter: theta by replay from the nearest snapshot, and the files made of it.

Theta is derived, so every worker keeps the last one it needed in memory and none has to: what is lost is computed again from the ledger.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from fwdllama.errors import FwdllamaError, RunError
from fwdllama.federation.origin import Origin, origin_of
from fwdllama.federation.spec import RunSpec
from fwdllama.ledger import Entry, read_page, replay

from .errors import Refused
from .rounds import Round
from .schema import blobs, entries, runs, versions

SNAPSHOT_EVERY = 16  # versions; replaying as many takes about half a second for SmolLM2
KEPT_RUNS = 16  # whose theta stays in memory


@dataclass(frozen=True)
class Held:
    """Theta of a version, and the change that led to it (None: not known here)."""

    version: int
    digest: str  # of theta
    theta: NDArray[np.float32]
    update: NDArray[np.float32] | None


class Registry:
    """What this process remembers of runs; all of it can be read again."""

    def __init__(self) -> None:
        self._specs: dict[str, RunSpec] = {}
        self._origins: OrderedDict[str, Origin] = OrderedDict()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._rounds: dict[str, tuple[int, Round]] = {}
        self._lock = threading.RLock()

    def spec(self, connection: Connection, run: str) -> RunSpec:
        """The specification of a run, which never changes."""
        if run not in self._specs:
            text = connection.execute(sa.select(runs.c.spec).where(runs.c.id == run)).scalar_one()
            self._specs[run] = RunSpec.model_validate_json(text)
        return self._specs[run]

    def round(self, run: str, version: int, mark: int) -> Round | None:
        """The open round, if what is remembered of it is what has this mark."""
        known = self._rounds.get(run)
        return known[1] if known is not None and known[0] == mark and known[1].number == version else None

    def keep_round(self, run: str, mark: int, current: Round) -> None:
        """Remember the open round by its mark."""
        self._rounds[run] = (mark, current)

    def origin(self, connection: Connection, run: str) -> Origin:
        """What the run starts from."""
        with self._lock:
            if run not in self._origins:
                spec = self.spec(connection, run)
                data = connection.execute(sa.select(blobs.c.data).where(blobs.c.sha256 == spec.initial)).scalar_one()
                self._origins[run] = origin_of(spec, data)
                while len(self._origins) > KEPT_RUNS:
                    self._origins.popitem(last=False)
            return self._origins[run]

    def held(self, connection: Connection, run: str, version: int) -> Held:
        """Theta of the newest version, kept for the next call.

        What is kept may be of a commit that failed, after which another worker closed the round with other results: its digest tells.
        """
        with self._lock:
            held = self._held.get(run)
        at = (versions.c.run == run) & (versions.c.version == version)
        digest = str(connection.execute(sa.select(versions.c.theta_digest).where(at)).scalar_one())
        if held is None or (held.version, held.digest) != (version, digest):
            theta = self.theta(connection, run, version)
            before = self.theta(connection, run, version - 1) if version else None
            held = Held(version, digest, theta, None if before is None else before - theta)
            self.keep(run, held)
        return held

    def keep(self, run: str, held: Held) -> None:
        """Remember it in place of the older one."""
        with self._lock:
            self._held[run] = held
            self._held.move_to_end(run)
            while len(self._held) > KEPT_RUNS:
                self._held.popitem(last=False)

    def forget(self, run: str) -> None:
        """What was kept is no longer the newest."""
        with self._lock:
            self._held.pop(run, None)

    def theta(self, connection: Connection, run: str, version: int) -> NDArray[np.float32]:
        """Theta of any version, float32 (n_params,)."""
        start, theta = self._snapshot(connection, run, version)
        try:
            return replay(theta, ledger_entries(connection, run, start, version))
        except RunError:  # an entry goes back behind the snapshot
            return replay(self.origin(connection, run).theta, ledger_entries(connection, run, 0, version))

    def _snapshot(self, connection: Connection, run: str, version: int) -> tuple[int, NDArray[np.float32]]:
        row = connection.execute(sa.select(runs.c.snapshot_version, runs.c.snapshot_sha256).where(runs.c.id == run)).one()
        if row.snapshot_version is None or row.snapshot_version > version:
            return 0, self.origin(connection, run).theta
        data = connection.execute(sa.select(blobs.c.data).where(blobs.c.sha256 == row.snapshot_sha256)).scalar_one()
        return row.snapshot_version, np.frombuffer(data, "<f4").astype(np.float32)

    def file(self, connection: Connection, run: str, version: int) -> bytes:
        """The adapter of a version as a GGUF; the same bytes every time."""
        origin = self.origin(connection, run)
        head = origin.spec.genesis()
        if version:
            where = (entries.c.run == run) & (entries.c.number == version - 1)
            head = connection.execute(sa.select(entries.c.hash).where(where)).scalar_one()
        return origin.file(self.theta(connection, run, version), version, head)


def store_blob(connection: Connection, data: bytes, *, public: bool) -> str:
    """Keep bytes by their hash; returns it in hex."""
    sha256 = hashlib.sha256(data).hexdigest()
    known = connection.execute(sa.select(blobs.c.public).where(blobs.c.sha256 == sha256)).first()
    if known is None:
        connection.execute(blobs.insert().values(sha256=sha256, data=data, size_bytes=len(data), public=int(public)))
    elif public and not known.public:
        connection.execute(blobs.update().where(blobs.c.sha256 == sha256).values(public=1))
    return sha256


def store_snapshot(connection: Connection, run: str, version: int, theta: NDArray[np.float32], *, public: bool) -> None:
    """Make theta of `version` the snapshot that devices may start from; the one before it is dropped."""
    row = connection.execute(sa.select(runs.c.snapshot_sha256).where(runs.c.id == run)).one()
    sha256 = store_blob(connection, theta.astype("<f4").tobytes(), public=public)
    connection.execute(runs.update().where(runs.c.id == run).values(snapshot_version=version, snapshot_sha256=sha256))
    if row.snapshot_sha256 not in (None, sha256):
        shared = connection.execute(sa.select(sa.func.count()).select_from(runs).where(runs.c.snapshot_sha256 == row.snapshot_sha256))
        if not shared.scalar_one():
            connection.execute(blobs.delete().where(blobs.c.sha256 == row.snapshot_sha256))


def ledger_page(connection: Connection, run: str, first: int, stop: int, most_bytes: int | None = None) -> tuple[bytes, int]:
    """Frames of entries `first` to `stop` - 1, as many as fit `most_bytes` (at least one), and the number after the last."""
    wanted = sa.select(entries.c.payload, entries.c.hash).where(entries.c.run == run, entries.c.number >= first, entries.c.number < stop)
    page, next_ = bytearray(), first
    for row in connection.execute(wanted.order_by(entries.c.number)):
        frame = row.payload + row.hash
        if page and most_bytes is not None and len(page) + len(frame) > most_bytes:
            break
        page += frame
        next_ += 1
    return bytes(page), next_


def ledger_entries(connection: Connection, run: str, first: int, stop: int) -> list[Entry]:
    """The ledger's entries `first` to `stop` - 1, every hash checked."""
    if first == 0:
        previous = RunSpec.model_validate_json(connection.execute(sa.select(runs.c.spec).where(runs.c.id == run)).scalar_one()).genesis()
    else:
        where = (entries.c.run == run) & (entries.c.number == first - 1)
        previous = connection.execute(sa.select(entries.c.hash).where(where)).scalar_one()
    return read_page(ledger_page(connection, run, first, stop)[0], previous, first, f"the ledger of {run}")[0]


def version_number(connection: Connection, run: str, named: str) -> int:
    """The number that `latest`, `best` or a number means.

    Raises:
        Refused: 404, there is no such version; 422, it is none of the three.
    """
    row = connection.execute(sa.select(runs.c.version, runs.c.best_version, runs.c.name).where(runs.c.id == run)).one()
    if named == "latest":
        return int(row.version)
    if named == "best":
        if row.best_version is None:
            raise Refused(404, f"no version of run {row.name} was scored yet, so none is the best.")
        return int(row.best_version)
    if not (named.isascii() and named.isdigit() and len(named) < 10):
        raise Refused(422, f"version {named!r} must be latest, best or a number.")
    if int(named) > row.version:
        raise Refused(404, f"run {row.name} has versions 0 to {row.version}, not {named}.")
    return int(named)


def checked_origin(spec: RunSpec, initial: bytes) -> Origin:
    """`origin_of`, refused as a request is.

    Raises:
        Refused: 409, the initial adapter does not fit the run.
    """
    try:
        return origin_of(spec, initial)
    except FwdllamaError as error:
        raise Refused(409, str(error)) from error


def add_version(connection: Connection, run: str, version: int, **values: object) -> None:
    """Register a version."""
    connection.execute(versions.insert().values(run=run, version=version, **values))
