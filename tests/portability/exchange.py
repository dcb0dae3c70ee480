"""`python -m tests.portability.exchange FOLDER`: what this machine computes, put beside what others left in FOLDER and compared with it.

Each machine leaves digests and a small trained run. What must be alike and is not makes the command fail; what need not be is told. Another
machine's run is resumed here: its adapter must come out of its ledger byte for byte, and training must go on. Run it on one machine, on another,
and on the first again, with the same folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from fwdllama.cli import main as command
from fwdllama.ledger import read_ledger
from gguf_tools.adapter import read_adapter
from gguf_tools.synth import write_tiny_llama
from tests.portability.contract import CONTRACT, PRIVATE
from tests.portability.engine import ENGINE, ENGINE_PRIVATE
from tests.questions import squad

Digests = Mapping[str, Mapping[str, str]]
OPTIONS = [
    "--layers", "1-2", "--units", "2", "--per-unit", "2", "--fresh", "1", "--held-out", "4",
    "--rounds", "8", "--no-warmup", "--threads", "1", "--steps", "4",
]


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


def ran(*arguments: str) -> None:
    """Run a command line without its words, unless it fails.

    Raises:
        SystemExit: it failed.
    """
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = command.run([*arguments])
    if code != 0:
        raise SystemExit(f"fwdllama {' '.join(arguments)} ended with {code}:\n{said.getvalue()}")


def train(folder: Path) -> None:
    """Leave a model, data, and a run of four steps with its adapter in `folder`."""
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(squad(12)))
    write_tiny_llama(folder / "tiny.gguf", type="Q8_0")
    with chdir(folder):
        ran("train", "--model", "tiny.gguf", "--data", "train.json", "--out", "adapter.gguf", "--run", "run", *OPTIONS)


def resumed(folder: Path, place: Path) -> tuple[list[str], bool]:
    """Lines about another machine's run, resumed in a copy at `place`, and whether its adapter is what its ledger says."""
    shutil.copytree(folder, place)
    facts = place / "run" / "run.json"
    facts.write_text(facts.read_text().replace(json.loads((folder / "where.json").read_text()), str(place)))
    with chdir(place):
        ran("resume", "run", "--out", "again.gguf")
        ran("resume", "run", "--out", "more.gguf", "--steps", "1")
        before, again = Path("adapter.gguf").read_bytes(), Path("again.gguf").read_bytes()
        n_steps, n_kept = len(read_ledger(Path("run/ledger.bin"))), len(read_ledger(folder / "run" / "ledger.bin"))
    moved = any(b.any() for _, b in read_adapter(place / "adapter.gguf").tensors.values())
    same = before == again and n_steps == n_kept + 1 and moved
    mark, digest = "same     " if same else "DIFFERENT", hashlib.sha256(again).hexdigest()
    return [f"{mark} {digest[:12]} adapter trained there, replayed here; then a step more"], same


def main(arguments: list[str]) -> int:
    """0: nothing that must be alike differs."""
    if len(arguments) != 1:
        sys.stderr.write(f"error: {len(arguments)} arguments, but one is needed: the folder in which machines leave what they computed.\n")
        return 2
    logging.disable(logging.WARNING)  # llama.cpp's remarks on tiny models
    folder = Path(arguments[0]).resolve()
    me = f"{platform.system()}-{platform.machine()}"
    mine = digests()
    os.environ["FWDLLAMA_CACHE"] = str(folder / me / "cache")
    shutil.rmtree(folder / me, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    train(folder / me)
    (folder / me / "where.json").write_text(json.dumps(str(folder / me)))
    alike = True
    for other in sorted(path.parent for path in folder.glob("*/digests.json")):
        lines, same = compared(mine, json.loads((other / "digests.json").read_text()))
        more, also = resumed(other, folder / me / other.name)
        sys.stdout.write(f"{me} against {other.name}\n" + "\n".join(lines + more) + "\n")
        alike = alike and same and also
    (folder / me / "digests.json").write_text(json.dumps(mine, indent=1) + "\n")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
