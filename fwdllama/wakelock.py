"""Keeping a phone awake: Android stops the CPU some minutes after the screen went dark, whatever runs.

Termux has one lock for the whole app, not one a process: the first of two runs to end lets it go for both.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOCK, UNLOCK = "termux-wake-lock", "termux-wake-unlock"
ANSWER_S = 10.0


@contextmanager
def awake(tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the wake lock where Termux has one; that it cannot be had is told, and nothing else changes."""
    if shutil.which(LOCK) is None:
        yield
        return
    problem = _run(LOCK)
    if problem:
        tell(f"warning: no wake lock ({problem}), so Android may stop this when the screen is dark; keep it on")
    try:
        yield
    finally:
        if not problem:
            _run(UNLOCK)


def _run(name: str) -> str:
    """What went wrong, empty if nothing did; they say it on stderr, and exit with 0 nevertheless."""
    command = shutil.which(name)
    if command is None:
        return f"{name} is not installed"
    try:
        done = subprocess.run([command], capture_output=True, text=True, errors="replace", timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{name} did not answer within {ANSWER_S:.0f} s"
    except OSError as error:
        return f"{name} cannot be run: {error.strerror}"
    said = " ".join(done.stderr.split())
    return said or (f"{name} failed with {done.returncode}" if done.returncode else "")
