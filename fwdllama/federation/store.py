"""What a device keeps between two lives: named values, each replaced in one step that survives a crash.

A folder for real devices, a dictionary for simulated ones, of which a process holds thousands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Protocol

import filelock
import platformdirs

from fwdllama.checkpoint import write_atomically
from fwdllama.errors import ResourceError, RunError


def default_folder(url: str) -> Path:
    """Where a device of the aggregator at `url` keeps itself unless told otherwise: one folder of the user's data for each address."""
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in url.split("://")[-1])[:80]
    return Path(platformdirs.user_data_dir("fwdllama")) / "devices" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


class Store(Protocol):
    """Named values. A name is a plain file name."""

    def read(self, name: str) -> bytes | None:
        """The value, None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Replace the value; on return it survives a crash."""

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of the value; what a crash leaves is a beginning of it."""

    def remove(self, name: str) -> None:
        """Forget the value, if there is one."""


class MemoryStore:
    """A `Store` that lives as long as the process: for simulations."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def read(self, name: str) -> bytes | None:
        """The value, None where there is none."""
        return self.values.get(name)

    def write(self, name: str, data: bytes) -> None:
        """Replace the value."""
        self.values[name] = data

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of the value."""
        self.values[name] = self.values.get(name, b"") + data

    def remove(self, name: str) -> None:
        """Forget the value."""
        self.values.pop(name, None)


class FolderStore:
    """A `Store` of files that only their owner may read, in a folder that one process uses at a time.

    Raises:
        RunError: another process uses the folder.
        ResourceError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = filelock.FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunError(f"{path} is in use by another device; give each device of this machine its own --folder.") from error
        except OSError as error:
            raise ResourceError(f"{path} cannot keep a device: {error.strerror}. Choose another --folder.") from error

    def read(self, name: str) -> bytes | None:
        """The file's bytes, None where there is no file."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResourceError(f"{self.path / name} cannot be read: {error.strerror}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Replace the file atomically; its mode is 0600."""
        write_atomically(self.path / name, data)

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of the file."""
        try:
            with open(self.path / name, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(data)
        except OSError as error:
            raise ResourceError(f"{self.path / name} cannot be written: {error.strerror}.") from error

    def remove(self, name: str) -> None:
        """Remove the file, if there is one."""
        (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes in. Safe to call twice."""
        self._lock.release()

    def __enter__(self) -> FolderStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
