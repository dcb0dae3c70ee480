"""Values between layers on disk: what enters a layer for the tokens of many units, each checked when it is read.

Two kinds of file. `Passage` holds the units of one pass in a fixed order, between two slices; what a killed process wrote of it is used again.
`StateStore` holds what enters the first trained layer, by content, and grows; training reads it in place of computing the layers below.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import filelock
import numpy as np

from fwdllama.errors import EngineError, ResourceError
from fwdllama.llama.context import States, Tokens
from fwdllama.llama.half import halved, restored
from fwdllama.llama.prompts import key_of, plan
from fwdllama.types import Encoded

_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<16sQQI")  # key, offset, bytes, checksum


@dataclass(frozen=True)
class Unit:
    """Sequences that are computed together: prompts, and what follows each. What prompts have in common is stored once."""

    prompts: tuple[tuple[int, ...], ...]
    behind: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, members: Sequence[Encoded]) -> Unit:
        """The sequences that losses of these examples are computed from."""
        return cls(tuple(e.prompt for e in members), tuple(e.invocation + e.target[:-1] for e in members))

    @cached_property
    def key(self) -> bytes:
        """16 bytes that tell it from every other."""
        return key_of((*self.prompts, *self.behind))

    @cached_property
    def arrays(self) -> tuple[list[Tokens], list[Tokens]]:
        """Prompts, and what follows each, as arrays."""
        return [np.array(p, np.int32) for p in self.prompts], [np.array(b, np.int32) for b in self.behind]

    @cached_property
    def _shared(self) -> list[tuple[int, int]]:
        """(leader, tokens in common with it) of every sequence."""
        prompts = self.arrays[0]
        return [(leader, n) for _, leader, n in plan(prompts, range(len(prompts)))]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that are its own."""
        return [len(p) + len(b) - n for p, b, (_, n) in zip(self.prompts, self.behind, self._shared, strict=True)]

    @property
    def n_tokens(self) -> int:
        """Tokens that are stored."""
        return sum(self.lengths)

    def joined(self, states: Sequence[States]) -> States:
        """What is stored of values (n_tokens, n_embd) of every sequence."""
        return np.concatenate([values[n:] for values, (_, n) in zip(states, self._shared, strict=True)])

    def parted(self, stored: States) -> list[States]:
        """The values of every sequence from what is stored."""
        found: list[States] = []
        start = 0
        for length, (leader, n) in zip(self.lengths, self._shared, strict=True):
            own = stored[start : start + length]
            start += length
            found.append(np.concatenate([found[leader][:n], own]) if n else own)
        return found


def stored_bytes(n_tokens: int, n_embd: int, *, half: bool) -> int:
    """Bytes that the values of so many tokens take in a file.

    >>> stored_bytes(2, 64, half=True), stored_bytes(2, 64, half=False)
    (258, 512)
    """
    return n_tokens * (2 * n_embd + 1 if half else 4 * n_embd)


def _packed(states: States, *, half: bool) -> bytes:
    if not half:
        return states.tobytes()
    values, exponents = halved(states)
    return values.tobytes() + exponents.tobytes()


def _unpacked(raw: bytes, n_embd: int, *, half: bool) -> States:
    if not half:
        return np.frombuffer(raw, np.float32).reshape(-1, n_embd)
    n = len(raw) // (2 * n_embd + 1)
    values = np.frombuffer(raw, np.float16, n * n_embd).reshape(n, n_embd)
    return restored(values, np.frombuffer(raw, np.int8, n, 2 * n * n_embd))


class Passage:
    """The values of known units at one layer, float32, written in their order; made to be read once and deleted."""

    def __init__(self, path: Path, units: Sequence[Unit], n_embd: int) -> None:
        self.path, self._units, self._n_embd = path, units, n_embd
        sizes = [stored_bytes(unit.n_tokens, n_embd, half=False) + _CRC.size for unit in units]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64).tolist()
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed in close
        self.n_complete = 0
        while self.n_complete < len(units) and self._raw(self.n_complete) is not None:
            self.n_complete += 1
        self._file.truncate(self._offsets[self.n_complete])

    @property
    def complete(self) -> bool:
        """Whether every unit is there."""
        return self.n_complete == len(self._units)

    def append(self, states: Sequence[States]) -> None:
        """Write the values of the next unit's sequences.

        Raises:
            ResourceError: the disk is full.
        """
        raw = _packed(self._units[self.n_complete].joined(states), half=False)
        try:
            self._file.seek(self._offsets[self.n_complete])
            self._file.write(raw + _CRC.pack(zlib.crc32(raw)))
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.n_complete += 1

    def _raw(self, index: int) -> bytes | None:
        self._file.seek(self._offsets[index])
        record = self._file.read(self._offsets[index + 1] - self._offsets[index])
        raw, check = record[: -_CRC.size], record[-_CRC.size :]
        whole = self._offsets[index] + len(record) == self._offsets[index + 1]
        return raw if whole and check == _CRC.pack(zlib.crc32(raw)) else None

    def read(self, index: int) -> list[States]:
        """The values of every sequence of unit `index`.

        Raises:
            ResourceError: they are damaged.
        """
        raw = self._raw(index)
        if raw is None:
            raise ResourceError(f"{self.path} is damaged at unit {index}; remove it and start again, which makes it anew.")
        return self._units[index].parted(_unpacked(raw, self._n_embd, half=False))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


class StateStore:
    """What enters layer `first`, by unit, in a folder that one process uses at a time; a `Below` that computes nothing."""

    decode_s, n_decoded = 0.0, 0

    def __init__(self, folder: Path, first: int, n_embd: int, *, half: bool) -> None:
        """Open the folder, or make it.

        Raises:
            ResourceError: it cannot be written, or another process uses it.
        """
        self.folder, self.first, self._n_embd, self._half = folder, first, n_embd, half
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ResourceError(f"{folder} is in use by another process, which trains on the same model and data; wait for its end.") from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._values, self._index = folder / f"values.f{16 if half else 32}", folder / "index"
        self._entries: dict[bytes, tuple[int, int, int]] = {}
        self._end = 0
        self._open()

    def _open(self) -> None:
        try:
            self._values.touch()
            self._index.touch()
            raw, size = self._index.read_bytes(), self._values.stat().st_size
            for key, offset, n_bytes, check in _ENTRY.iter_unpack(raw[: len(raw) // _ENTRY.size * _ENTRY.size]):
                if offset != self._end or offset + n_bytes > size:
                    break
                self._entries[key] = (offset, n_bytes, check)
                self._end = offset + n_bytes
            os.truncate(self._index, len(self._entries) * _ENTRY.size)
            os.truncate(self._values, self._end)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those that it does not hold, each once."""
        return list({unit.key: unit for unit in units if unit.key not in self._entries}.values())

    def add(self, unit: Unit, states: Sequence[States]) -> None:
        """Keep the values of a unit's sequences.

        Raises:
            ResourceError: the disk is full.
        """
        raw = _packed(unit.joined(states), half=self._half)
        check = zlib.crc32(raw)
        try:
            with open(self._values, "ab") as values:
                values.write(raw)
            with open(self._index, "ab") as index:  # last: what it names is there
                index.write(_ENTRY.pack(unit.key, self._end, len(raw), check))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._entries[unit.key] = (self._end, len(raw), check)
        self._end += len(raw)

    def states(self, prompts: Sequence[Tokens], behind: Sequence[Tokens]) -> list[States]:
        """Inputs of layer `first` for every token of prompts[i] followed by behind[i], float32 (n_tokens, n_embd).

        Raises:
            EngineError: these sequences were not staged.
            ResourceError: what is kept of them is damaged.
        """
        if not prompts:
            return []
        unit = Unit(tuple(tuple(p.tolist()) for p in prompts), tuple(tuple(b.tolist()) for b in behind))
        if unit.key not in self._entries:
            raise EngineError(f"{self.folder} does not hold these {len(prompts)} sequences; they were not staged before training.")
        offset, n_bytes, check = self._entries[unit.key]
        with open(self._values, "rb") as values:
            values.seek(offset)
            raw = values.read(n_bytes)
        if len(raw) != n_bytes or zlib.crc32(raw) != check:
            raise ResourceError(f"{self._values} is damaged; remove {self.folder} and go on with `fwdllama resume`, which makes it anew.")
        return unit.parted(_unpacked(raw, self._n_embd, half=self._half))

    def remove(self) -> None:
        """Close, and delete everything."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                path.unlink()
        self.close()
        (self.folder / ".lock").unlink(missing_ok=True)
        self.folder.rmdir()

    def close(self) -> None:
        """Let others use the folder. Safe to call twice."""
        self._lock.release()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {error.strerror or error}. Nothing is lost; make room and start again.")
