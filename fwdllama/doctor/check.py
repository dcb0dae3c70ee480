"""One line of a diagnosis."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_S = 5.0


@dataclass(frozen=True)
class Check:
    """What was found; `advice` is empty where there is nothing to do."""

    name: str
    ok: bool
    value: str
    advice: str = ""


def answered(command: Sequence[str], within_s: float = ANSWER_S) -> str | None:
    """What a command prints; None where it fails, or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=within_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
