"""The ledger: an append-only, hash-chained file of steps, each a list of (seed, coefficient) entries.

A fine-tuned model is a base GGUF, an initial adapter and a ledger; everything else is derived. On disk a ledger is a header followed by
frames, all little-endian:

    header   8 bytes "FWDLEDG1", 32 bytes genesis hash (sha256 of what the run is: base model, space, scope)
    frame    u32 step, u32 n, u32 crc32 of these two, n x (u64 seed), n x (f32 coefficient), 32 bytes hash
    restore  u32 step, u32 0xFFFFFFFF, u32 crc32 of these two, u32 the step whose beginning theta returns to, 32 bytes hash

    hash = sha256(previous hash + the frame's bytes before it)

A frame is written with one write and synced before the step counts, so a crash leaves whole frames and at most one torn tail, which
opening for append cuts off. A frame that is whole but does not match its hash is damage, never a crash, and is refused.
The checksum is there because a damaged n would make any frame look torn, and the steps behind it would be cut off.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import ResourceError, RunError
from fwdllama.step import replayed

MAGIC = b"FWDLEDG1"
HEADER_BYTES = len(MAGIC) + 32
MAX_ENTRIES = 1 << 20  # a step of a million probes is damage, not work
_RESTORE = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One step: theta <- theta - sum_i coefficients[i] * z(seeds[i]); or, with `restores`, theta <- what step `restores` began at."""

    step: int
    seeds: NDArray[np.uint64]  # (n,)
    coefficients: NDArray[np.float32]  # (n,)
    restores: int | None = None

    def payload(self) -> bytes:
        """The bytes that are hashed and stored."""
        head = struct.pack("<II", self.step, len(self.seeds) if self.restores is None else _RESTORE)
        head += struct.pack("<I", zlib.crc32(head))
        if self.restores is not None:
            return head + struct.pack("<I", self.restores)
        return head + self.seeds.astype("<u8").tobytes() + self.coefficients.astype("<f4").tobytes()


def restoring(step: int, restores: int) -> Entry:
    """The entry of a step that returns to where step `restores` began."""
    return Entry(step, np.zeros(0, np.uint64), np.zeros(0, np.float32), restores)


def chained(previous: bytes, payload: bytes) -> bytes:
    """The hash of a frame, given the hash before it."""
    return hashlib.sha256(previous + payload).digest()


def digest(genesis: bytes, entries: Iterable[Entry]) -> bytes:
    """The chain's last hash: two ledgers with the same digest are the same run."""
    last = genesis
    for entry in entries:
        last = chained(last, entry.payload())
    return last


def replay(theta: NDArray[np.float32], entries: Sequence[Entry]) -> NDArray[np.float32]:
    """Theta after `entries`, bit for bit what training had: replaying a and then b is replaying a + b.

    Raises:
        RunError: an entry restores a step before the first of `entries`; replay from the beginning instead.
    """
    for entry in effective(entries):
        theta = replayed(theta, entry.seeds.tolist(), entry.coefficients)
    return theta


def effective(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that still count: those that a later one took back are left out.

    Raises:
        RunError: an entry restores a step before the first, or one that is not past.
    """
    kept: list[Entry] = []
    began: list[int] = []  # how many of `kept` there were when each entry began
    for entry in entries:
        began.append(len(kept))
        if entry.restores is None:
            kept.append(entry)
            continue
        place = entry.restores - entries[0].step
        if not 0 <= place < len(began):
            held = f"steps {entries[0].step} to {entry.step}"
            raise RunError(f"step {entry.step} restores step {entry.restores}, which is not among {held} of the ledger.")
        kept, began = kept[: began[place]], began
    return kept


class Ledger:
    """A ledger file open for appending. Create with `create`, continue with `open`, only read with `read_ledger`."""

    def __init__(self, path: Path, n_steps: int, last: bytes, size_bytes: int) -> None:
        self.path, self.n_steps, self.last, self._size_bytes = path, n_steps, last, size_bytes

    @classmethod
    def create(cls, path: Path, genesis: bytes) -> Ledger:
        """Start an empty ledger.

        Raises:
            RunError: the file exists.
        """
        if path.exists():
            raise RunError(f"{path} exists already: a ledger is only ever appended to.")
        with open(path, "xb") as file:
            file.write(MAGIC + genesis)
            file.flush()
            os.fsync(file.fileno())
        return cls(path, 0, genesis, HEADER_BYTES)

    @classmethod
    def open(cls, path: Path, genesis: bytes) -> Ledger:
        """Continue a ledger, a torn last frame cut off.

        Raises:
            RunError: damaged, or of another run.
        """
        entries, end, last = _scan(path, genesis)
        with open(path, "r+b") as file:
            file.truncate(end)
        return cls(path, len(entries), last, end)

    def cut(self, entries: list[Entry]) -> None:
        """Keep only `entries`, which must be the ledger's own first ones: an unfinished step is done again."""
        size = HEADER_BYTES + sum(len(entry.payload()) + 32 for entry in entries)
        with open(self.path, "r+b") as file:
            genesis = file.read(HEADER_BYTES)[len(MAGIC) :]
            file.truncate(size)
            os.fsync(file.fileno())
        self.n_steps, self.last, self._size_bytes = len(entries), digest(genesis, entries), size

    def append(self, entry: Entry) -> None:
        """Add a step; on return it is on disk.

        Raises:
            RunError: the step is not the next one, or could not be read or replayed.
            ResourceError: it cannot be written; the ledger is as it was, and the append may be tried again.
        """
        if entry.step != self.n_steps:
            raise RunError(f"{self.path}: step {entry.step} cannot follow {self.n_steps} recorded steps.")
        n = len(entry.seeds)
        if n != len(entry.coefficients) or n > MAX_ENTRIES or not np.isfinite(entry.coefficients).all():
            raise RunError(
                f"{self.path}: step {entry.step} has {n} seeds and {len(entry.coefficients)} coefficients; "
                f"there must be as many of each, at most {MAX_ENTRIES}, and every coefficient finite."
            )
        payload = entry.payload()
        hashed = chained(self.last, payload)
        try:
            with open(self.path, "r+b") as file:
                file.truncate(self._size_bytes)  # what an append that failed half way, on a full disk, left behind
                file.seek(self._size_bytes)
                file.write(payload + hashed)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"{self.path}: step {entry.step} cannot be written ({error.strerror}).") from error
        self.n_steps, self.last = self.n_steps + 1, hashed
        self._size_bytes += len(payload) + len(hashed)


def read_ledger(path: Path, genesis: bytes | None = None) -> list[Entry]:
    """All whole steps of a ledger, every hash checked.

    Raises:
        RunError: not a ledger, damaged, or of another run than `genesis`.
    """
    return _scan(path, genesis)[0]


def read_page(data: bytes, previous: bytes | None, first: int, source: str) -> tuple[list[Entry], bytes]:
    """The entries of consecutive frames, as an aggregator sends them, and the hash of the last.

    previous: the hash before them, or None where it is not known: then the first frame's own is believed, and only what follows it is
    checked. first: the number that the first one must have.

    Raises:
        RunError: cut short, damaged, or not the continuation of `previous`.
    """
    skipped: list[Entry] = []
    at = 0
    if previous is None:
        entry, at = next(_frames(source, data, 0), (None, 0))
        if entry is None or entry.step != first:
            raise RunError(f"{source}: the page does not begin with step {first}.")
        skipped, previous = [entry], data[at - 32 : at]
    entries, end, last = _checked(source, data, at, previous, first + len(skipped))
    if end != len(data):
        raise RunError(f"{source}: the page ends within the frame at byte {end}.")
    return skipped + entries, last


def _scan(path: Path, genesis: bytes | None) -> tuple[list[Entry], int, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: the ledger cannot be read ({error.strerror}).") from error
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise RunError(f"{path} is not a ledger: it must begin with {MAGIC.decode()} and a hash.")
    last = data[len(MAGIC) : HEADER_BYTES]
    if genesis is not None and last != genesis:
        raise RunError(f"{path} belongs to another model or configuration: its genesis is {last.hex()[:12]}, not {genesis.hex()[:12]}.")
    return _checked(str(path), data, HEADER_BYTES, last, 0)


def _checked(source: str, data: bytes, at: int, last: bytes, first: int) -> tuple[list[Entry], int, bytes]:
    """Entries from byte `at`, the byte after the last whole one, and its hash."""
    entries: list[Entry] = []
    end = at
    for entry, stop in _frames(source, data, at):
        last = chained(last, entry.payload())
        if last != data[stop - 32 : stop]:
            raise RunError(f"{source}: step {entry.step} at byte {end} does not match its hash. The file is damaged; restore it from a copy.")
        if entry.step != first + len(entries):
            raise RunError(f"{source}: step {entry.step} at byte {end} stands where step {first + len(entries)} belongs.")
        entries.append(entry)
        end = stop
    return entries, end, last


def _frames(source: str, data: bytes, at: int) -> Iterator[tuple[Entry, int]]:
    while at + 12 <= len(data):
        step, n, checksum = struct.unpack_from("<III", data, at)
        restores = n == _RESTORE
        if (n > MAX_ENTRIES and not restores) or checksum != zlib.crc32(data[at : at + 8]):
            raise RunError(f"{source}: the frame at byte {at} claims {n} entries. The file is damaged; restore it from a copy.")
        stop = at + 12 + (4 if restores else 12 * n) + 32
        if stop > len(data):
            return
        if restores:
            yield restoring(step, struct.unpack_from("<I", data, at + 12)[0]), stop
        else:
            seeds = np.frombuffer(data, "<u8", n, at + 12).astype(np.uint64)
            values = np.frombuffer(data, "<f4", n, at + 12 + 8 * n).astype(np.float32)
            yield Entry(step, seeds, values), stop
        at = stop
