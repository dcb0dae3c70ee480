"""`python -m tests.portability.digests FILE`: what this machine computes, named, as JSON; given FILE, another machine's, compared with it.

Fails where what must be alike is not; what need not be is told.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.portability.contract import CONTRACT, PRIVATE
from tests.portability.engine import ENGINE, ENGINE_PRIVATE

Digests = Mapping[str, Mapping[str, str]]


def digests() -> Digests:
    """Hex SHA-256 by group and name."""

    def of(group: Mapping[str, Callable[[], bytes]]) -> dict[str, str]:
        return {name: hashlib.sha256(made()).hexdigest() for name, made in group.items()}

    return {"contract": of({**CONTRACT, **ENGINE}), "private": of({**PRIVATE, **ENGINE_PRIVATE})}


def compared(mine: Digests, other: Digests) -> tuple[list[str], bool]:
    """Lines for a person, and whether everything that must be alike is."""
    lines, alike = [], True
    for group in ("contract", "private"):
        if mine[group].keys() != other[group].keys():
            return ["the two machines did not compute the same things: they run different versions of the tests"], False
        for name, digest in mine[group].items():
            same = digest == other[group][name]
            alike = alike and (same or group == "private")
            lines.append(f"{'same     ' if same else 'DIFFERENT' if group == 'contract' else 'differs  '} {digest[:12]} {name}")
    return lines, alike


def main(arguments: list[str]) -> int:
    """0: printed, or alike."""
    mine = digests()
    if not arguments:
        sys.stdout.write(json.dumps(mine, indent=1) + "\n")
        return 0
    lines, alike = compared(mine, json.loads(Path(arguments[0]).read_text()))
    sys.stdout.write(f"{platform.machine()} against {arguments[0]}\n" + "\n".join(lines) + "\n")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
