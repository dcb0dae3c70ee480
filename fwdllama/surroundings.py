"""What surrounds a run: where it may write, what it runs on, what it used."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fwdllama.errors import ResourceError
from fwdllama.machine import default_threads


def check_output(out: Path) -> None:
    """Find out before training whether the adapter can be written.

    Raises:
        ResourceError: it cannot.
    """
    if out.is_dir():
        raise ResourceError(f"{out} is a folder; give the adapter a file name.")
    check_writable(out.parent)


def check_writable(folder: Path) -> None:
    """Find out before training whether its result can be written.

    Raises:
        ResourceError: the folder or its nearest existing parent is not writable, or its disk is full.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ResourceError(f"{folder} cannot be written: {existing} is not a writable folder.")
    room = os.statvfs(existing)
    if room.f_bavail * room.f_frsize < 32 << 20:
        raise ResourceError(f"{folder} has {room.f_bavail * room.f_frsize >> 20} MB of disk left, but a run needs at least 32 MB.")


def peak_memory_bytes() -> int:
    """The most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """What the run ran on, for reports."""
    return {
        "fwdllama": version("fwdllama"),
        "llama-cpp-python": version("llama-cpp-python"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": default_threads(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
