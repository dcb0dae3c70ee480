"""The results file, whole at any moment, and the machine that it was made on.

An item that is measured again replaces its earlier result and leaves the others, so that a bench which was killed is continued by
naming the items that are missing. Each result has its own commit, time and load, because those may differ.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fwdllama.checkpoint import write_atomically
from fwdllama.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where there is one
PACKAGES = ("fwdllama", "llama-cpp-python", "numpy", "gguf", "torch")
FORMAT = 1

Result = dict[str, Any]


class Record:
    """The results so far, in the file `path`."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        """Begin a file, or continue one.

        Raises:
            UsageError: the file is something else, or of another machine, whose figures cannot stand beside those of this one.
        """
        self.path, self.machine = path, machine
        self._results: dict[str, Result] = {}
        if path.exists():
            before = read_results(path)
            for key in ("cpu", "cores"):
                if before["machine"].get(key) != machine.get(key):
                    raise UsageError(
                        f"{path} was measured on another machine ({key} {before['machine'].get(key)}, here {machine.get(key)}); "
                        "name another --out."
                    )
            self._results = {result["item"]: result for result in before["results"]}

    @property
    def results(self) -> list[Result]:
        """Everything that is in the file."""
        return list(self._results.values())

    def add(self, result: Result) -> None:
        """Store a result; on return it is on disk. A skipped item leaves what was measured earlier."""
        if result["status"] == "skipped" and self._results.get(result["item"], {}).get("status") == "measured":
            return
        self._results[result["item"]] = result
        data = {"fwdllama_bench": FORMAT, "machine": self.machine, "results": self.results}
        write_atomically(self.path, (json.dumps(data, indent=2) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """A results file: `machine` and `results`.

    Raises:
        UsageError: it is something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("fwdllama_bench") != FORMAT:
        raise UsageError(f"{path} holds no results of this bench; name another file.")
    return data


def this_machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": cpu_name(Path("/proc")),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def cpu_name(proc: Path) -> str:
    """The processor as its maker calls it, as far as the system tells."""
    path = proc / "cpuinfo"
    lines = path.read_text().splitlines() if path.exists() else []
    for wanted in ("model name", "Hardware"):
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == wanted:
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this runs from, with "-dirty" where files differ from it; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
