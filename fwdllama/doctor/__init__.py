"""What this machine has of the things that training needs, and what to do about those it lacks.

Everything is read from files and an environment given as arguments, so that a phone can be described in a test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fwdllama.doctor import build, machine, phone
from fwdllama.doctor.check import Check
from fwdllama.machine import PROC, SYS
from fwdllama.models import default_cache_dir

__all__ = ["Check", "diagnose"]


def diagnose(
    *,
    proc: Path = PROC,
    sys_root: Path = SYS,
    cache_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[Check]:
    """Every check, in the order in which a person would fix them."""
    cache = cache_dir or default_cache_dir()
    return [
        build.check_python(sys.version_info[:3]),
        *build.check_tools(environ),
        build.check_llama_version(),
        *build.check_llama(proc),
        build.check_cpu_features(proc),
        machine.check_cores(sys_root),
        machine.check_memory(proc),
        machine.check_memory_limit(proc, sys_root),
        machine.check_disk(cache),
        machine.check_clock(datetime.now(UTC), environ),
        *phone.check_phone(environ, sys_root.parent),
        machine.check_models(cache),
    ]
