"""Sets of options for kinds of devices, each under one name. What is given explicitly wins over a preset, option by option.

The values were reasoned, and checked on Linux with the planner and SmolLM2; no phone was at hand (docs/phone.md says what that leaves open).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fwdllama.machine import default_threads

Name = Literal["phone-8gb", "phone-6gb", "laptop"]


@dataclass(frozen=True)
class Preset:
    """Options by the names of their parameters; the threads are counted when it is used. `memory_budget_bytes` None: what is available."""

    mmap: bool
    repack: bool
    kv_type: str
    n_batch: int
    nice: int
    min_battery: float
    max_temperature: float
    memory_budget_bytes: int | None

    def options(self) -> dict[str, Any]:
        """What it sets, by parameter name."""
        values = asdict(self)
        memory = values.pop("memory_budget_bytes")
        return {"threads": default_threads(), **values, **({} if memory is None else {"memory_budget": f"{memory >> 20}MB"})}


# What the phones share:
# - mmap without repacking: Android can take mapped pages back and read them again, where it would end a process that holds as much of its own;
#   repacked weights are a copy that it cannot take back, and together with the mapped file the model is there twice.
# - n_batch 256: compute buffers grow with it (SmolLM2: 11 MiB of 564 less than with 512), and a decode of a probe's few tokens never fills it.
# - nice 10: the half-way house. What is on the screen goes first, and an idle phone gives all its time all the same.
# - 80 degrees for any sensor: processors slow themselves down from 85 to 95 on, and what is slowed down is warm without being fast.
#   The battery has its own limit of 45 degrees, always.
# - the battery's last 30 % are its owner's.
PRESETS: Mapping[Name, Preset] = {
    # Of 8 GB the kernel shows about 7.4 GiB, of which Android and its services hold about half with nothing open. 3 GiB leave half a GiB or more for
    # whatever is opened meanwhile, before the low-memory killer looks for the largest process, which is this one.
    "phone-8gb": Preset(
        mmap=True, repack=False, kv_type="f16", n_batch=256, nice=10, min_battery=0.3, max_temperature=80.0, memory_budget_bytes=3 << 30
    ),
    # Of 6 GB about 5.4 GiB are seen and 2 to 2.5 are left. What a run holds of its own is mostly KV cache (281 of 437 MiB with SmolLM2), which q8_0
    # nearly halves (149); that costs exactness (a quantised V needs flash attention, and losses then depend on what else is decoded), so that only
    # the smaller phone has it.
    "phone-6gb": Preset(
        mmap=True, repack=False, kv_type="q8_0", n_batch=256, nice=10, min_battery=0.3, max_temperature=80.0, memory_budget_bytes=3 << 29
    ),
    # Memory is rarely short: the fastest kernels, read instead of mapped, so that the weights are there once. Laptops run at 85 degrees by design.
    "laptop": Preset(
        mmap=False, repack=True, kv_type="f16", n_batch=512, nice=5, min_battery=0.3, max_temperature=90.0, memory_budget_bytes=None
    ),
}


def described(name: Name, given: Mapping[str, Any]) -> str:
    """One line of what a preset sets, as one could type it, and of what was `given` instead.

    >>> described("laptop", {"threads": 3, "nice": None})
    'preset laptop: --no-mmap --repack --kv-type f16 --n-batch 512 --nice 5 --min-battery 0.3 --max-temperature 90; given: --threads 3'
    """
    options = PRESETS[name].options()
    instead = {key: given[key] for key in options if given.get(key) is not None}
    line = f"preset {name}: {_words({key: value for key, value in options.items() if key not in instead})}"
    return f"{line}; given: {_words(instead)}" if instead else line


def completed(name: Name | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the values of a preset for those of its options that were not given: that are None, or not there at all."""
    options = {} if name is None else PRESETS[name].options()
    return {**given, **{key: value for key, value in options.items() if given.get(key) is None and key in given}}


def _words(options: Mapping[str, Any]) -> str:
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}")
    return " ".join(words)
