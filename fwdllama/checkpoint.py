"""A run directory: everything that a run is, on disk, at any moment it may be killed.

    config.json       the configuration, as given
    run.json          what the run is: digests of base model and data, versions, machine; its hash is the ledger's genesis
    initial.gguf      the adapter training started from (its A matrices, B = 0)
    ledger.bin        every step's seeds and coefficients, hash-chained: the truth
    state.json        where the next step begins, with the ledger hash it belongs to
    metrics.jsonl     one line a step, for people and plots
    snapshot.npz      theta at some step; only saves time, replay gives the same

A step is recorded in this order: ledger (synced), metrics, state (atomic). Killed in between, the ledger is one step ahead of the
state; that step is cut off and done again, with the same result.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import ResourceError, RunError
from fwdllama.ledger import HEADER_BYTES, Entry, Ledger, digest, read_ledger, replay

_BEFORE_RUN_JSON = ("config.json", "initial.gguf", "ledger.bin", "state.json")  # written when a run is created, before run.json


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step that survives a crash: the old content or the new, never a mixture.

    Raises:
        ResourceError: the disk is full or the place not writable.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}. What was there before is unchanged.") from error


@dataclass(frozen=True)
class State:
    """Where the next step begins. Everything in it follows from the configuration and the steps so far, except elapsed time."""

    step: int = 0
    ledger: str = ""  # hex hash of the ledger this state belongs to
    n_probes: int = 0
    elapsed_s: float = 0.0
    decode_s: float = 0.0
    eps: float = 0.0
    mean_square: float | None = None  # running mean of squared slopes
    first_mean_square: float | None = None  # the same, of the slopes of first tokens alone
    lr_scale: float = 1.0  # halved where steps were found too long
    best_step: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    finished: str | None = None  # why, once it is


class RunDirectory:
    """An open, locked run directory. Create with `create`, continue with `open`; close, or use as a context manager."""

    def __init__(self, path: Path, lock: filelock.BaseFileLock, ledger: Ledger, genesis: bytes, state: State) -> None:
        self.path, self._lock, self.ledger, self.genesis, self.state = path, lock, ledger, genesis, state

    @staticmethod
    def _locked(path: Path) -> filelock.BaseFileLock:
        lock = filelock.FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunError(f"{path} is in use by another process; one run takes one process.") from error
        return lock

    @classmethod
    def create(
        cls, path: Path, config_json: str, facts: dict[str, Any], initial_adapter: bytes, *, eps: float = 0.0
    ) -> RunDirectory:
        """Start a run in `path`, which must be new or empty.

        Raises:
            RunError: there is something in it.
            ResourceError: it cannot be written.
        """
        check_unused(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path} cannot be made a run directory: {error.strerror}.") from error
        lock = cls._locked(path)
        try:
            (path / "ledger.bin").unlink(missing_ok=True)  # of a creation that was cut short
            facts = {**facts, "initial_adapter_sha256": hashlib.sha256(initial_adapter).hexdigest()}
            run_json = json.dumps(facts, indent=2, sort_keys=True).encode()
            genesis = genesis_of(facts)
            write_atomically(path / "config.json", config_json.encode())
            write_atomically(path / "initial.gguf", initial_adapter)
            ledger = Ledger.create(path / "ledger.bin", genesis)
            state = State(ledger=genesis.hex(), eps=eps)
            write_atomically(path / "state.json", json.dumps(asdict(state)).encode())
            write_atomically(path / "run.json", run_json)  # last: a directory without it was never started
        except OSError as error:
            lock.release()
            raise ResourceError(f"{path} cannot be written: {error.strerror}. Nothing was started; make room and try again.") from error
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, ledger, genesis, state)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Continue a run; a step that was not recorded to the end is cut off.

        Raises:
            RunError: not a run directory, damaged, or in use.
        """
        facts = read_facts(path)
        lock = cls._locked(path)
        try:
            genesis = genesis_of(facts)
            state = _read_state(path)
            entries = read_ledger(path / "ledger.bin", genesis)
            if len(entries) < state.step or digest(genesis, entries[: state.step]).hex() != state.ledger:
                raise RunError(f"{path}: state.json is at step {state.step}, which ledger.bin does not contain. Restore both from one copy.")
            ledger = Ledger.open(path / "ledger.bin", genesis)
            if len(entries) > state.step:
                ledger.cut(entries[: state.step])
            run = cls(path, lock, ledger, genesis, state)
            run._cut_metrics()
            return run
        except BaseException:
            lock.release()
            raise

    def theta(self, initial: NDArray[np.float32], step: int | None = None) -> NDArray[np.float32]:
        """Theta after `step` steps (default: all), by replay from the nearest snapshot."""
        step = self.state.step if step is None else step
        entries = read_ledger(self.path / "ledger.bin", self.genesis)[:step]
        start, theta = self._snapshot(entries, initial)
        return replay(theta, entries[start:])

    def last_update(self, n_params: int) -> NDArray[np.float32] | None:
        """How far the last step moved theta, (n_params,); None before the first."""
        entries = read_ledger(self.path / "ledger.bin", self.genesis)
        return -replay(np.zeros(n_params, np.float32), entries[-1:]) if entries else None

    def _snapshot(self, entries: list[Entry], initial: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        try:
            with open(self.path / "snapshot.npz", "rb") as file:  # np.load itself would leave a damaged file open
                held = np.load(file)
                step, theta, hashed = int(held["step"]), held["theta"], bytes(held["ledger"]).hex()
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: it only saves time
            return 0, initial
        # A snapshot that does not belong to exactly these entries is ignored, not trusted.
        if step <= len(entries) and theta.shape == initial.shape and digest(self.genesis, entries[:step]).hex() == hashed:
            return step, theta.astype(np.float32)
        return 0, initial

    def record(self, entry: Entry, theta: NDArray[np.float32], state: State, metrics: dict[str, Any], *, snapshot: bool) -> None:
        """Make a step durable."""
        self._guarded(lambda: self.ledger.append(entry))
        line = json.dumps(metrics, allow_nan=False) + "\n"
        self._guarded(lambda: _append(self.path / "metrics.jsonl", line))
        self.save(replace(state, step=entry.step + 1))
        if snapshot:
            self._write_snapshot(theta)

    def save(self, state: State) -> None:
        """Replace the state; its ledger hash is filled in."""
        self.state = replace(state, ledger=self.ledger.last.hex())
        write_atomically(self.path / "state.json", json.dumps(asdict(self.state)).encode())

    def extend(self, config_json: str) -> None:
        """Go on under another budget, which is stored first, so that an interruption does not lose it."""
        write_atomically(self.path / "config.json", config_json.encode())
        self.save(replace(self.state, finished=None))

    def _write_snapshot(self, theta: NDArray[np.float32]) -> None:
        stream = io.BytesIO()
        np.savez(stream, step=self.state.step, theta=theta, ledger=np.frombuffer(self.ledger.last, np.uint8))
        write_atomically(self.path / "snapshot.npz", stream.getvalue())

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise ResourceError(
                f"{self.path} cannot be written: {error.strerror}. Steps up to {self.state.step} are safe; make room and resume."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one a step."""
        return read_metrics(self.path)

    def _cut_metrics(self) -> None:
        rows = [row for row in read_metrics(self.path) if row["step"] < self.state.step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def close(self) -> None:
        """Let other processes in. Safe to call twice."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_unused(path: Path) -> None:
    """Refuse a place that cannot become a run directory.

    Raises:
        RunError: there is something in it, other than what a creation that was cut short leaves.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; a run needs a folder of its own.")
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock") if path.exists() else []
    ledger = path / "ledger.bin"
    if not (ledger.exists() and ledger.stat().st_size > HEADER_BYTES):  # with steps in it, it is somebody's work
        strangers = [name for name in strangers if name not in _BEFORE_RUN_JSON]
    if strangers:
        raise RunError(f"{path} is not empty ({strangers[0]}): continue it with `fwdllama resume {path}`, or choose another.")


def genesis_of(facts: dict[str, Any]) -> bytes:
    """The hash a run's ledger starts from: everything in `facts["identity"]` and the initial adapter."""
    identity = {"identity": facts["identity"], "initial_adapter_sha256": facts["initial_adapter_sha256"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()


def read_facts(path: Path) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = path / "run.json"
    if not file.exists():
        raise RunError(f"{path} is not a run directory: it has no run.json. Start one with `fwdllama train --run {path}`.")
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
        genesis_of(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}). Restore it from a copy.") from error
    return facts


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a run's metrics.jsonl; a torn last line is left out.

    Raises:
        RunError: damaged.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        *lines, _ = file.read_bytes().split(b"\n")
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for number, row in enumerate(rows, start=1):
            if type(row["step"]) is not int:
                raise ValueError(f"line {number} is of step {row['step']!r}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} is damaged ({error}). Restore it from a copy, or remove it: only plots need it.") from error
    return rows


def _read_state(path: Path) -> State:
    try:
        state = State(**json.loads((path / "state.json").read_text()))
        if type(state.step) is not int or state.step < 0:
            raise ValueError(f"its step is {state.step!r}")
        return state
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path / 'state.json'} is damaged ({error}). Restore it from a copy.") from error


def _append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
