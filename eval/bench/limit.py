"""A hard limit of memory for a process, by the strongest means that this machine has; whoever reports a figure says which.

A memory cgroup counts what counts on a phone: all of a process's pages and the cached pages of files that it was the first to read.
RLIMIT_AS, where nothing else can be had, counts addresses instead, used or not: a process that lives under it would live under the others.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from fwdllama.formats import size

from .measure import BenchError

Means = Literal["cgroup v1", "cgroup v2", "systemd-run", "RLIMIT_AS"]

ENTER = 'echo $$ > "$0" && exec "$@"'  # a shell that becomes a member of the group, then the command
SHRINK = 'ulimit -v "$0" && exec "$@"'
LEAVING_S = 5.0  # a group can be removed a moment after its last process has ended

_numbers = count()


@dataclass(frozen=True)
class Limit:
    """A limit in force for every command that begins with `words`; `group` is the cgroup, where there is one of ours."""

    means: Means
    size_bytes: int
    words: tuple[str, ...]
    group: Path | None = None

    def peak_bytes(self) -> int | None:
        """The most that the group held, cached pages of files included (they give way at the limit); None where nobody counts."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.group is not None and (self.group / name).exists():
                return int((self.group / name).read_text())
        return None

    def n_killed(self) -> int:
        """How often the kernel killed a process of the group for its memory."""
        for name in ("memory.oom_control", "memory.events"):
            if self.group is not None and (self.group / name).exists():
                lines = dict(line.split() for line in (self.group / name).read_text().splitlines())
                return int(lines.get("oom_kill", 0))
        return 0

    def __str__(self) -> str:
        return f"{size(self.size_bytes)} by {self.means}"


@contextmanager
def limited(size_bytes: int, *, means: Means | None = None, mounts: Path = Path("/proc/mounts")) -> Iterator[Limit]:
    """A limit by the first means that works here, or by those named; what was made for it is gone afterwards.

    Raises:
        BenchError: it cannot be had.
    """
    makers: Mapping[Means, Callable[[], Limit | None]] = {
        "cgroup v1": lambda: _group(size_bytes, "cgroup v1", mounts),
        "cgroup v2": lambda: _group(size_bytes, "cgroup v2", mounts),
        "systemd-run": lambda: _scope(size_bytes),
        "RLIMIT_AS": lambda: _addresses(size_bytes),
    }
    tried = makers if means is None else (means,)
    found = next((limit for name in tried if (limit := makers[name]()) is not None), None)
    if found is None:
        raise BenchError(f"memory cannot be limited to {size(size_bytes)} here: {', '.join(tried)} cannot be had.")
    try:
        yield found
    finally:
        if found.group is not None:
            _removed(found.group)


def _group(size_bytes: int, means: Means, mounts: Path) -> Limit | None:
    """A cgroup of our own, directly below the mount."""
    root = _mounted(means, mounts)
    if root is None:
        return None
    group = root / f"fwdllama-bench-{os.getpid()}-{next(_numbers)}"
    settings = (
        {"memory.limit_in_bytes": size_bytes, "memory.memsw.limit_in_bytes": size_bytes}
        if means == "cgroup v1"
        else {"memory.max": size_bytes, "memory.swap.max": 0}
    )
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        for name, value in settings.items():
            if (group / name).exists() or not name.startswith(("memory.memsw", "memory.swap")):
                (group / name).write_text(str(value))
    except OSError:  # the memory controller is not there, or not ours to use
        _removed(group)
        return None
    return Limit(means, size_bytes, ("/bin/sh", "-c", ENTER, str(group / "cgroup.procs")), group)


def _mounted(means: Means, mounts: Path) -> Path | None:
    """Where the memory controller is mounted."""
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, place, kind, options, *_ = line.split()
        if (means == "cgroup v1" and kind == "cgroup" and "memory" in options.split(",")) or (means == "cgroup v2" and kind == "cgroup2"):
            return Path(place)
    return None


def _removed(group: Path) -> None:
    until = time.monotonic() + LEAVING_S
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise BenchError(f"the cgroup {group} cannot be removed ({error.strerror}).") from error
            time.sleep(0.05)


def _scope(size_bytes: int) -> Limit | None:
    if shutil.which("systemd-run") is None:
        return None
    whose = () if os.getuid() == 0 else ("--user",)
    words = ("systemd-run", "--scope", "--quiet", *whose, "-p", f"MemoryMax={size_bytes}", "-p", "MemorySwapMax=0", "--")
    return Limit("systemd-run", size_bytes, words) if _works((*words, "true")) else None


def _addresses(size_bytes: int) -> Limit | None:
    words = ("/bin/sh", "-c", SHRINK, str(size_bytes // 1024))
    return Limit("RLIMIT_AS", size_bytes, words) if _works((*words, "true")) else None


def _works(words: tuple[str, ...]) -> bool:
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def uncached(path: Path) -> None:
    """Drop a file from the page cache: a page that another process read first is not counted as the group's."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # only what is on disk can be dropped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
