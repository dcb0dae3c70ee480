"""Theta of the version that a task names: what is held, carried on by ledger entries, or a snapshot, or everything again.

Nothing is believed for having been received: pages are checked against the hash chain, snapshots against their digest, and what comes of it
against the digest that the task names. Whatever does not fit is given up for the next best beginning; the last is the ledger's own.
A device keeps theta and where in the ledger it is, not the entries: those that an entry restores behind it are fetched again.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import FederationError, Refused, RunError, Stopped
from fwdllama.federation.client import Client
from fwdllama.federation.message import Run, theta_digest
from fwdllama.federation.store import Store
from fwdllama.ledger import Entry, digest, effective, read_page, replay

KEEP_EVERY = 8  # versions, between two copies of theta in the store: it only saves time, and a phone's flash wears
_HEAD = struct.Struct("<Q32s")  # version, ledger hash or zeros


@dataclass(frozen=True)
class Position:
    """Theta after `version` entries, and the ledger's hash there; None where that is not known."""

    version: int
    last: bytes | None
    theta: NDArray[np.float32]  # (n_params,)

    def to_bytes(self) -> bytes:
        """What is stored: version, hash, theta, and a SHA-256 of all that."""
        data = _HEAD.pack(self.version, self.last or bytes(32)) + self.theta.astype("<f4", copy=False).tobytes()
        return data + hashlib.sha256(data).digest()

    @classmethod
    def from_bytes(cls, data: bytes, n_params: int) -> Position | None:
        """What was stored; None where it is damaged."""
        if len(data) != _HEAD.size + 4 * n_params + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
            return None
        version, last = _HEAD.unpack_from(data)
        return cls(version, last if any(last) else None, np.frombuffer(data, "<f4", n_params, _HEAD.size).astype(np.float32))


class Follower:
    """Follows one run's ledger. `at` gives theta of a version, and remembers it as where to go on from."""

    def __init__(
        self,
        client: Client,
        store: Store,
        run: Run,
        initial: NDArray[np.float32],  # (n_params,) of version 0
        *,
        stop: Callable[[], bool] = lambda: False,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.client, self.store, self.run, self.initial = client, store, run, initial
        self.stop, self.on_event = stop, on_event
        self._name = f"theta-{run.run}"
        self.held = Position.from_bytes(store.read(self._name) or b"", initial.size)
        self._stored_version = self.held.version if self.held else 0

    def at(self, version: int, wanted: str) -> NDArray[np.float32]:
        """Theta of `version`, whose digest is `wanted`.

        Raises:
            FederationError: not even the whole ledger leads to it.
            Unreachable: the network failed on the way; what is held is as it was.
            Stopped: on request.
        """
        failure: FederationError | RunError | None = None
        for begin in self._beginnings(version):
            try:
                reached = self._advanced(begin(), version)
                found = theta_digest(reached.theta)
                if found == wanted:
                    self._hold(reached)
                    return reached.theta
                raise FederationError(
                    f"run {self.run.spec.name!r}: version {version} has the digest {found[:12]} here, but {wanted[:12]} at {self.client.url}. "
                    "The ledger does not lead to what the task is about, and nothing is computed for it."
                )
            except (Refused, RunError, _Unfit) as error:
                failure = error
            except FederationError as error:
                if type(error) is not FederationError:  # not a judgement about this beginning
                    raise
                failure = error
            self.on_event(f"catching up from another place: {failure}")
        assert failure is not None
        if isinstance(failure, FederationError):
            raise failure
        raise FederationError(f"run {self.run.spec.name!r}: its ledger cannot be followed. {failure}") from failure

    def keep(self) -> None:
        """Store theta now, if it is newer than what is stored: at the end, so that the next start is quick."""
        if self.held is not None and self.held.version != self._stored_version:
            self.store.write(self._name, self.held.to_bytes())
            self._stored_version = self.held.version

    def _hold(self, position: Position) -> None:
        self.held = position
        if not 0 <= position.version - self._stored_version < KEEP_EVERY:
            self.keep()

    def _beginnings(self, version: int) -> list[Callable[[], Position]]:
        """Where to begin, fewest bytes first; the ledger's own beginning is always last but where it is cheapest."""
        run, held = self.run, self.held if self.held and self.held.version <= version else None
        entry_bytes = run.ledger_bytes / run.version if run.version else 12 * run.spec.round.probes + 44
        from_held = (version - held.version) * entry_bytes if held else np.inf
        if min(from_held, version * entry_bytes) > 4 * self.initial.size:  # a snapshot may be worth asking for
            run = self.run = self.client.run(run.run)
            entry_bytes = run.ledger_bytes / max(1, run.version)
        ways: list[tuple[float, Callable[[], Position]]] = []
        if held:
            ways.append((from_held, lambda: held))
        snapshot = run.snapshot
        if snapshot and snapshot.version <= version and snapshot.size_bytes == 4 * self.initial.size:
            cost = snapshot.size_bytes + (version - snapshot.version) * entry_bytes
            if cost < min(from_held, version * entry_bytes):
                ways.append((cost, lambda: self._from_snapshot(snapshot.version, snapshot.sha256)))
        ways.append((version * entry_bytes, lambda: Position(0, bytes.fromhex(run.genesis), self.initial)))
        return [begin for _, begin in sorted(ways, key=lambda way: way[0])]

    def _from_snapshot(self, version: int, sha256: str) -> Position:
        data = self.client.blob(sha256, self.store)
        if len(data) != 4 * self.initial.size:
            raise _Unfit(f"the snapshot of version {version} has {len(data)} bytes, but theta has {4 * self.initial.size}.")
        return Position(version, None, np.frombuffer(data, "<f4").astype(np.float32))

    def _advanced(self, at: Position, version: int) -> Position:
        """`at`, carried on to `version` by the entries between.

        Raises:
            RunError: the pages are damaged or do not continue the chain, or an entry restores what was before `at`.
        """
        entries: list[Entry] = []
        last, source = at.last, f"{self.client.url}, ledger of run {self.run.spec.name!r}"
        while at.version + len(entries) < version:
            first = at.version + len(entries)
            unknown = last is None  # then the entry before is fetched too, for the hash that the chain goes on from
            page = self.client.ledger_page(self.run.run, first - unknown)
            found, end = read_page(page, last, first - unknown, source)
            found = found[unknown:]
            if not found:
                raise RunError(f"{source} ends at version {first}, but the task is about version {version}.")
            spare = first + len(found) - version
            if spare > 0:  # beyond the task's version
                found = found[:-spare]
                last = digest(last, found) if last is not None else None
            else:
                last = end
            entries += found
        theta = at.theta
        for entry in effective(entries):
            if self.stop():
                raise Stopped("Stopped while the ledger was replayed.")
            theta = replay(theta, [entry])
        return Position(version, last, theta)


class _Unfit(FederationError):
    """A beginning that cannot be used."""
