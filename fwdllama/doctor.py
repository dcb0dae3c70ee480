"""What this machine has of the things that training needs, and what to do about those it lacks.

Everything is read from files and an environment given as arguments, so that a phone can be described in a test. The
one thing that is run is a child process which imports llama.cpp: a build made for another CPU dies there with SIGILL,
and the doctor must survive to say so.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fwdllama.models import default_cache_dir, list_models

NEEDED_LLAMA_VERSION = "0.3.36"
ENOUGH_BYTES = 1 << 30  # the smallest model of the registry, its KV cache and its adapter, with room to spare
BIG_CORE_SHARE = 0.8  # of the highest clock: above it, "prime" and "performance" cores; below it, the efficient ones
REBUILD = "make setup (or: pip install --force-reinstall --no-cache-dir llama-cpp-python==" + NEEDED_LLAMA_VERSION + ")"

# What ggml's quantised kernels are compiled for, as /proc/cpuinfo spells it.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}
NEEDED_FEATURES = ("avx2", "asimddp")

_PROBE = """
import json
from fwdllama.llama.binding import missing_symbols
print(json.dumps(missing_symbols()))
"""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis; `advice` is empty where there is nothing to do."""

    name: str
    ok: bool
    value: str
    advice: str = ""


def diagnose(
    *,
    proc: Path = Path("/proc"),
    sys_root: Path = Path("/sys"),
    cache_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[Check]:
    """Every check, in the order in which a person would fix them."""
    cache = cache_dir or default_cache_dir()
    return [
        check_python(sys.version_info[:3]),
        check_llama_version(),
        check_llama_symbols(),
        check_cpu_features(proc),
        check_cores(sys_root),
        check_memory(proc),
        check_memory_limit(proc, sys_root),
        check_disk(cache),
        check_termux(environ),
        check_models(cache),
    ]


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or later."""
    text = ".".join(map(str, version))
    return Check("python", version >= (3, 11), text, "" if version >= (3, 11) else "install Python 3.11 or later")


def check_llama_version() -> Check:
    """llama-cpp-python is installed, and is the one release whose structures this package mirrors."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Check("llama-cpp-python", False, "not installed", REBUILD)
    ok = version == NEEDED_LLAMA_VERSION
    return Check("llama-cpp-python", ok, version, "" if ok else f"{NEEDED_LLAMA_VERSION} is needed: {REBUILD}")


def check_llama_symbols(probe: str = _PROBE) -> Check:
    """The build loads on this CPU and exports every function that the engine calls."""
    command = [sys.executable, "-c", probe]
    name = "llama.cpp functions"
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return Check(name, False, "did not load within 60 s", REBUILD)
    if child.returncode == -signal.SIGILL:
        return Check(name, False, "compiled for another CPU (illegal instruction)", REBUILD)
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return Check(name, False, lines[-1], REBUILD)
    missing = json.loads(child.stdout)
    if missing:
        return Check(name, False, f"missing: {', '.join(missing)}", REBUILD)
    return Check(name, True, "all there")


def check_cpu_features(proc: Path) -> Check:
    """The instruction sets that make quantised arithmetic fast: AVX2 and its successors, or ARM's dotprod and i8mm."""
    found = cpu_features(proc)
    value = ", ".join(CPU_FEATURES[each] for each in CPU_FEATURES if each in found) or "none that help"
    if not (proc / "cpuinfo").exists():  # macOS: every Apple CPU has dotprod
        return Check("cpu features", True, f"unknown on {platform.system()}")
    ok = any(each in found for each in NEEDED_FEATURES)
    advice = "" if ok else "training works, but several times slower; a CPU with AVX2 or ARM dotprod is better"
    return Check("cpu features", ok, value, advice)


def cpu_features(proc: Path) -> frozenset[str]:
    """Flags that every core has: the cores of a phone differ, and a program may run on any of them."""
    path = proc / "cpuinfo"
    if not path.exists():
        return frozenset()
    rows = [line.partition(":") for line in path.read_text().splitlines()]
    cores = [frozenset(value.split()) for key, _, value in rows if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*cores) if cores else frozenset()


def check_cores(sys_root: Path) -> Check:
    """How many cores may be used, and which of them are the fast ones."""
    usable = usable_cores()
    big = [core for core in big_cores(sys_root) if core in usable]
    value = f"{len(usable)} usable"
    if not big or len(big) == len(usable):
        return Check("cores", True, value)
    advice = f"use --threads {len(big)}: a decode waits for its slowest thread"
    return Check("cores", True, f"{value}, {len(big)} fast ({', '.join(map(str, big))})", advice)


def usable_cores() -> frozenset[int]:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def big_cores(sys_root: Path) -> list[int]:
    """Cores whose highest clock is near the highest of all; none where the kernel does not tell."""
    clocks_khz = {}
    for path in sys_root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        clocks_khz[int(path.parent.parent.name.removeprefix("cpu"))] = int(path.read_text())
    return sorted(core for core, clock in clocks_khz.items() if clock >= BIG_CORE_SHARE * max(clocks_khz.values()))


def check_memory(proc: Path) -> Check:
    """Memory that a new program can take without swapping."""
    available_bytes, total_bytes = memory_bytes(proc)
    ok = available_bytes >= ENOUGH_BYTES
    advice = "" if ok else f"close other programs; {_gib(ENOUGH_BYTES)} are needed for the smallest model"
    return Check("memory", ok, f"{_gib(available_bytes)} available of {_gib(total_bytes)}", advice)


def memory_bytes(proc: Path) -> tuple[int, int]:
    """(available, total), from /proc/meminfo where there is one."""
    path = proc / "meminfo"
    if not path.exists():
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    rows = (line.split() for line in path.read_text().splitlines())
    fields = {row[0]: int(row[1]) * 1024 for row in rows if len(row) >= 2}
    return fields["MemAvailable:"], fields["MemTotal:"]


def check_memory_limit(proc: Path, sys_root: Path) -> Check:
    """A control group's limit, which ends a process without a word when it is passed."""
    limit = cgroup_limit_bytes(proc, sys_root)
    if limit is None:
        return Check("memory limit", True, "none")
    ok = limit >= ENOUGH_BYTES
    advice = "" if ok else f"raise the limit of the container or service to at least {_gib(ENOUGH_BYTES)}"
    return Check("memory limit", ok, _gib(limit), advice)


def cgroup_limit_bytes(proc: Path, sys_root: Path) -> int | None:
    """The tightest limit of this process's control group and its parents (v2, or the memory controller of v1)."""
    path = proc / "self" / "cgroup"
    if not path.exists():
        return None
    limits = []
    for line in path.read_text().splitlines():
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
            if (each / name).exists() and (text := (each / name).read_text().strip()) != "max":
                limits.append(int(text))
    # v1 writes "no limit" as the largest page-aligned number; no machine has an exbibyte.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def check_disk(cache: Path) -> Check:
    """Space for a model and its requantised copy in the cache."""
    folder = next(each for each in (cache, *cache.absolute().parents) if each.exists())
    free_bytes = shutil.disk_usage(folder).free
    ok = free_bytes >= ENOUGH_BYTES
    advice = "" if ok else "free some, or set FWDLLAMA_CACHE to a folder on a larger disk"
    return Check("disk", ok, f"{_gib(free_bytes)} free for {cache}", advice)


def check_termux(environ: Mapping[str, str]) -> Check:
    """Whether this is Termux, whose builds and background rules are its own."""
    if "TERMUX_VERSION" not in environ and "com.termux" not in environ.get("PREFIX", ""):
        return Check("termux", True, "no")
    advice = "run termux-wake-lock before training, or Android stops it when the screen goes dark"
    return Check("termux", True, environ.get("TERMUX_VERSION", "yes"), advice)


def check_models(cache: Path) -> Check:
    """Models in the cache."""
    entries = [entry for entry in list_models(cache_dir=cache) if entry.fetched]
    names = [entry.name + (f" ({'/'.join(entry.fetched)})" if entry.variants else "") for entry in entries]
    advice = "" if names else "fwdllama model fetch smollm2-135m"
    return Check("models", bool(names), ", ".join(names) or "none fetched", advice)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.1f} GiB"
