"""That training repeats to the last bit, and that killing it changes nothing.

The ledger is compared, which is the run; and the adapter that is made from it.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .child import Command, read_state, run
from .measure import Bar, Bench, BenchError, Item, Measured
from .runs import train_words

N_KILLS, SEED = 10, 2024
SMALL = ("--no-warmup", "--steps", "6", "--units", "4", "--rounds", "4")  # steps of a few seconds, so that many moments are within one
POLL_S = 0.01


def digests(folder: Path) -> dict[str, str]:
    """What must be equal: SHA-256 of the ledger's file and of the adapter, and the ledger's last hash as the state has it."""
    files = {"ledger": folder / "run" / "ledger.bin", "adapter": folder / "adapter.gguf"}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {**found, "chain": read_state(folder / "run")["ledger"]}


def determinism(bench: Bench) -> Measured:
    """Train twice."""
    folder = bench.fresh("determinism")
    ran = [run(bench, *train_words(bench, folder / name, "--steps", 3)) for name in ("first", "second")]
    first, second = (digests(folder / name) for name in ("first", "second"))
    figures = {
        "identical": first == second,
        "probes": ran[0].json["probes"],
        "ledger_sha256": [first["ledger"], second["ledger"]],
        "adapter_sha256": [first["adapter"], second["adapter"]],
    }
    return Measured(figures, ran[0].command)


def kill_moments(n: int, seed: int, span_s: float) -> list[float]:
    """Moments in random order, one at random in each n-th part of `span_s`, so that every part of it is hit."""
    rng = random.Random(seed)
    moments = [(part + rng.random()) / n * span_s for part in range(n)]
    rng.shuffle(moments)
    return moments


def kill(bench: Bench, n_kills: int = N_KILLS, small: Sequence[str] = SMALL) -> Measured:
    """Kill a run again and again, each process at another moment after its start, and compare what it comes to.

    Moments reach from a process's start to half of the training behind its set-up: some kills come before anything is done, others
    within a step, so that the run gets on meanwhile. One that ends before all kills are done is compared, and another begun.
    """
    folder = bench.fresh("kill")
    unbroken = run(bench, *train_words(bench, folder / "unbroken", *small))
    wanted = digests(folder / "unbroken")
    training_s = read_state(folder / "unbroken" / "run")["elapsed_s"]
    setup_s = max(0.0, unbroken.wall_s - training_s)
    moments = kill_moments(n_kills, SEED, setup_s + training_s / 2)
    kills: list[dict[str, Any]] = []
    ends: list[dict[str, str]] = []
    while moments:
        at = folder / f"killed-{len(ends) + 1}"
        words: tuple[object, ...] = train_words(bench, at, *small)
        n_before = len(kills)
        while _killed(bench, words, at / "run", moments[0] if moments else None):
            kills.append({"run": len(ends) + 1, "after_s": round(moments.pop(0), 3), "steps": read_state(at / "run")["step"]})
            words = ("resume", at / "run", "--json")
        ends.append(digests(at))
        if len(kills) == n_before:
            moments[0] /= 2  # even a whole run was over by then
    figures = {
        "identical": all(end == wanted for end in ends),
        "kills": len(kills),
        "runs": len(ends),
        "setup_s": setup_s,
        "training_s": training_s,
        "chain": wanted["chain"],
        "chains": [end["chain"] for end in ends],
        "moments": kills,
    }
    return Measured(figures, unbroken.command)


def _killed(bench: Bench, words: tuple[object, ...], run_path: Path, moment_s: float | None) -> bool:
    """Run a command and kill it `moment_s` after its start, but not before there is a run to resume; False where it ended."""
    with Command(bench, *words) as command:
        if moment_s is None:
            command.finished()
            return False
        while not (run_path / "run.json").exists() and command.process.poll() is None:
            time.sleep(POLL_S)
        killed = command.killed_after(moment_s)
        if killed and not (run_path / "state.json").exists():
            raise BenchError(f"{run_path} has no state although it was begun.")
        return killed


ITEMS = (
    Item(
        "determinism",
        "two runs of 3 steps, same seed: ledger and adapter",
        (Bar("identical", "is", True),),
        ("identical", "probes"),
        ("data",),
        1,
        determinism,
    ),
    Item(
        "kill",
        "a run killed with -9 at ten random moments and resumed: ledger and adapter as if unbroken",
        (Bar("identical", "is", True), Bar("kills", ">=", N_KILLS)),
        ("identical", "kills", "runs"),
        ("data",),
        4,
        kill,
    ),
)
