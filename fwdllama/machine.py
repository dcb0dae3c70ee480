"""What this machine gives: cores, memory and threads, and whether what is planned will fit.

Facts are read from the files of Linux below folders that are given, so that a phone can be described in a test. Android hides some of these
files from apps; what is hidden counts as what is not there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from fwdllama.errors import ResourceError
from fwdllama.formats import size
from gguf_tools.plan import Item

PROC, SYS = Path("/proc"), Path("/sys")
BIG_CORE_SHARE = 0.8  # of the highest clock: above it, "prime" and "performance" cores; below it, the efficient ones


def told(path: Path) -> str | None:
    """What a file of the system says; None where it is absent, hidden or not text."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def cpu_features(proc: Path = PROC) -> frozenset[str]:
    """Flags that every core has: the cores of a phone differ, and a program may run on any of them."""
    rows = [line.partition(":") for line in (told(proc / "cpuinfo") or "").splitlines()]
    cores = [frozenset(value.split()) for key, _, value in rows if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*cores) if cores else frozenset()


def usable_cores() -> frozenset[int]:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def big_cores(sys_root: Path = SYS) -> list[int]:
    """Cores whose highest clock is near the highest of all; none where the kernel does not tell."""
    clocks_khz = {}
    for path in sys_root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        if (clock := told(path) or "").isdigit():
            clocks_khz[int(path.parent.parent.name.removeprefix("cpu"))] = int(clock)
    return sorted(core for core, clock in clocks_khz.items() if clock >= BIG_CORE_SHARE * max(clocks_khz.values()))


def default_threads(sys_root: Path = SYS) -> int:
    """One thread a physical core that may be used, fast ones only where cores differ: a decode waits for the last."""
    usable = usable_cores()
    fast = [core for core in big_cores(sys_root) if core in usable]
    try:
        physical = psutil.cpu_count(logical=False) or len(usable)
    except OSError:  # the files that it reads may be hidden
        physical = len(usable)
    return max(1, min(len(usable), physical, len(fast) or len(usable)))


def memory_bytes(proc: Path = PROC) -> tuple[int, int]:
    """(available, total), from /proc/meminfo where there is one."""
    rows = (line.split() for line in (told(proc / "meminfo") or "").splitlines())
    fields = {row[0]: int(row[1]) * 1024 for row in rows if len(row) >= 2}
    if not {"MemAvailable:", "MemTotal:"} <= fields.keys():
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    return fields["MemAvailable:"], fields["MemTotal:"]


def cgroup_limit_bytes(proc: Path = PROC, sys_root: Path = SYS) -> int | None:
    """The tightest limit of this process's control group and its parents (v2, or the memory controller of v1)."""
    limits = []
    for line in (told(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = sys_root / "fs" / "cgroup" / controllers
        name = "memory.max" if controllers == "" else "memory.limit_in_bytes"
        folder = top / group.lstrip("/")
        # Inside a container the group's own path may not exist: its files are mounted at the top.
        for each in (folder, *folder.parents):
            if not each.is_relative_to(top):
                break
            if (text := told(each / name)) is not None and text.isdigit():  # or "max"
                limits.append(int(text))
    # v1 writes "no limit" as the largest page-aligned number; no machine has an exbibyte.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def available_bytes(proc: Path = PROC, sys_root: Path = SYS) -> int:
    """Memory that this process can still take: the machine's, or what its control group leaves of a lower limit."""
    available, _ = memory_bytes(proc)
    limit = cgroup_limit_bytes(proc, sys_root)
    if limit is None:
        return available
    held = psutil.Process().memory_info()
    # Pages of mapped files count as held, but the kernel takes them back before it ends anybody: a model that is mapped is nearly all of it.
    return min(available, max(0, limit - (held.rss - getattr(held, "shared", 0))))


def total_bytes() -> int:
    """The machine's memory, or its control group's lower limit."""
    (_, total), limit = memory_bytes(), cgroup_limit_bytes()
    return total if limit is None else min(total, limit)


def process_bytes() -> int:
    """What a process holds that is about to load a model: this one's memory, with everything that a run imports."""
    import fwdllama.training  # noqa: F401 (to be measured)
    from fwdllama.llama.binding import llama

    llama()
    return int(psutil.Process().memory_info().rss)


def check_memory(path: Path, items: Sequence[Item], *, available: int | None = None) -> None:
    """Compare what is still to be allocated for a model with what is available (None: what this machine says).

    Raises:
        ResourceError: it will not fit; the message has both numbers, and the largest items.
    """
    needed = sum(item.size_bytes for item in items)
    has = available_bytes() if available is None else available
    if needed > has:
        largest = sorted(items, key=lambda item: -item.size_bytes)[:3]
        raise ResourceError(
            f"{path} needs about {size(needed)} of memory ({', '.join(f'{item.name} {size(item.size_bytes)}' for item in largest)}), "
            f"but {size(has)} are available. Use a smaller --batch or --ctx, or a smaller model; `fwdllama gguf plan` finds what fits."
        )
