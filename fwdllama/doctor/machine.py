"""The machine: cores, memory, storage, clock, models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fwdllama.doctor.check import Check, answered
from fwdllama.federation.signature import MAX_SKEW_S
from fwdllama.machine import SYS, big_cores, cgroup_limit_bytes, memory_bytes, usable_cores
from fwdllama.models import list_models

ENOUGH_BYTES = 1 << 30  # the smallest model of the registry, its KV cache and its adapter, with room to spare
EARLIEST = datetime(2026, 10, 1, tzinfo=UTC)  # when the llama.cpp that this package needs was released
LATEST = datetime(2046, 1, 1, tzinfo=UTC)
SET_IT = "switch on automatic date and time"


def check_cores(sys_root: Path = SYS) -> Check:
    """How many cores may be used, and which of them are the fast ones."""
    usable = usable_cores()
    big = [core for core in big_cores(sys_root) if core in usable]
    value = f"{len(usable)} usable"
    if not big or len(big) == len(usable):
        return Check("cores", True, value)
    advice = f"use --threads {len(big)}: a decode waits for its slowest thread"
    return Check("cores", True, f"{value}, {len(big)} fast ({', '.join(map(str, big))})", advice)


def check_memory(proc: Path) -> Check:
    """Memory that a new program can take without swapping."""
    available_bytes, total_bytes = memory_bytes(proc)
    ok = available_bytes >= ENOUGH_BYTES
    advice = "" if ok else f"close other programs; {_gib(ENOUGH_BYTES)} are needed for the smallest model"
    return Check("memory", ok, f"{_gib(available_bytes)} available of {_gib(total_bytes)}", advice)


def check_memory_limit(proc: Path, sys_root: Path) -> Check:
    """A control group's limit, which ends a process without a word when it is passed."""
    limit = cgroup_limit_bytes(proc, sys_root)
    if limit is None:
        return Check("memory limit", True, "none")
    ok = limit >= ENOUGH_BYTES
    advice = "" if ok else f"raise the limit of the container or service to at least {_gib(ENOUGH_BYTES)}"
    return Check("memory limit", ok, _gib(limit), advice)


def check_disk(cache: Path) -> Check:
    """Space for a model and its requantised copy in the cache."""
    folder = next(each for each in (cache, *cache.absolute().parents) if each.exists())
    free_bytes = shutil.disk_usage(folder).free
    ok = free_bytes >= ENOUGH_BYTES
    advice = "" if ok else "free some, or set FWDLLAMA_CACHE to a folder on a larger disk"
    return Check("disk", ok, f"{_gib(free_bytes)} free for {cache}", advice)


def check_clock(now: datetime, environ: Mapping[str, str]) -> Check:
    """A clock that is far off: signed requests and certificates carry times. Where systemd is asked, whether the network sets it."""
    shown = f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if not EARLIEST <= now <= LATEST:
        return Check("clock", False, shown, f"that cannot be; {SET_IT}: certificates and signed requests would be refused")
    command = shutil.which("timedatectl", path=environ.get("PATH"))
    synchronised = None if command is None else answered([command, "show", "--property=NTPSynchronized", "--value"])
    if synchronised == "yes":
        return Check("clock", True, f"{shown}, set by the network")
    if synchronised == "no":
        return Check("clock", True, f"{shown}, not set by the network", f"{SET_IT} (aggregators allow {MAX_SKEW_S / 60:.0f} minutes of difference)")
    return Check("clock", True, f"{shown}, by whom it is set cannot be told")


def check_models(cache: Path) -> Check:
    """Models in the cache."""
    entries = [entry for entry in list_models(cache_dir=cache) if entry.fetched]
    names = [entry.name + (f" ({'/'.join(entry.fetched)})" if entry.variants else "") for entry in entries]
    advice = "" if names else "fwdllama model fetch smollm2-135m"
    return Check("models", bool(names), ", ".join(names) or "none fetched", advice)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.1f} GiB"
