"""What this machine gives: memory and threads, and whether what is planned will fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from fwdllama.doctor import big_cores, cgroup_limit_bytes, usable_cores
from fwdllama.errors import ResourceError
from fwdllama.formats import size
from gguf_tools.plan import Item


def available_bytes() -> int:
    """Memory that this process can still take: the machine's, or what its control group leaves of a lower limit."""
    available = psutil.virtual_memory().available
    limit = cgroup_limit_bytes(Path("/proc"), Path("/sys"))
    if limit is None:
        return int(available)
    return int(min(available, max(0, limit - psutil.Process().memory_info().rss)))


def total_bytes() -> int:
    """The machine's memory, or its control group's lower limit."""
    total, limit = psutil.virtual_memory().total, cgroup_limit_bytes(Path("/proc"), Path("/sys"))
    return int(total if limit is None else min(total, limit))


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


def default_threads() -> int:
    """One thread a physical core that may be used, fast ones only where cores differ: a decode waits for the last."""
    usable = usable_cores()
    fast = [core for core in big_cores(Path("/sys")) if core in usable]
    physical = psutil.cpu_count(logical=False) or len(usable)
    return max(1, min(len(usable), physical, len(fast) or len(usable)))
