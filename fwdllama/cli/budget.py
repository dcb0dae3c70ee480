"""Sizes of memory as options say them, and what a memory budget may change. Importing this module imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fwdllama.errors import UsageError

if TYPE_CHECKING:
    from fwdllama.setting import Change

# What `--memory-budget` may change, by the option that keeps it as it is.
CHANGES: Mapping[str, Change] = {
    "mmap": "mmap",
    "repack": "repack",
    "kv_type": "kv_type",
    "units": "batch",
    "held_out": "held_out",
    "layers": "from_layer",
    "from_layer": "from_layer",
    "stage_layers": "stage_layers",
}
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def memory_size(text: str, name: str = "--memory-budget", also: str = "") -> int:
    """Bytes from `8GB`, `6.5G` or `700MiB`, given as the option `name`; units are binary, as memory is sold. `also` says what else it may be.

    >>> memory_size("8GB") == 8 * 2**30
    True

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UsageError(f"{name} is {text!r}, but must be {also}a size such as 8GB or 700MB.")
    return int(float(found[1]) * (1 << _UNITS[found[2].upper()]))


def kept(given: Mapping[str, Any]) -> frozenset[Change]:
    """What the options that were given leave no choice about."""
    return frozenset(change for name, change in CHANGES.items() if given.get(name) is not None)
