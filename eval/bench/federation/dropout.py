"""Devices that leave in the middle of tasks: how much of what they compute is in vain, and whether the aggregator says so truly.

A fifth of the devices are flaky. Such a device leaves while it works on a task, at a random moment and by a given chance, is away for a few
times a task's length, and then either goes on where it was, so that its result comes late, or has forgotten it.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdllama.federation.toy import toy_run

from ..measure import Bar, Bench, Item, Measured
from .aggregator import Aggregator
from .books import leased
from .load import Simulation, orders_for

SEED = 9
DEVICES, FLAKY, SECONDS = 40, 8, 40.0
CHANCES = (0.5, 1.0)  # the first is the figure of the bar; with the second a flaky device leaves every task that it is given
PROBES_PER_TASK = 20
MODES = {"sync": 0, "async": 2}  # rounds by which a result may be late
SETTLE_S = 3.0  # within which the aggregator notices that the last lease has passed


@dataclass(frozen=True)
class Pace:
    """How fast everything is, in seconds, and how many probes a round has."""

    task_s: float = 0.3
    away_s: tuple[float, float] = (0.5, 3.0)
    lease_s: float = 1.2
    probes: int = 800


PHONE = Pace()  # 30 s a task, gone for one to five minutes, leases of two, all a hundred times as fast


def waste(
    aggregator: Aggregator, folder: Path, mode: str, chance: float, seconds: float, devices: int, flaky: int, pace: Pace = PHONE
) -> dict[str, Any]:
    """Figures of one run on an aggregator that is up."""
    name = f"dropout-{mode}-{chance:g}"
    shape = {"probes": pace.probes, "most": pace.probes, "probes_per_task": PROBES_PER_TASK, "lease_s": pace.lease_s, "deadline_s": 60.0}
    spec, initial = toy_run(
        name, rounds=1_000_000, round={**shape, "staleness": MODES[mode]}, evaluation={"every": 1_000_000, "devices": 1}
    )
    chosen = sorted(aggregator.enrolled(devices), key=lambda d: d.device)
    aggregator.create(spec, initial)
    random.Random(SEED).shuffle(chosen)
    more: dict[str, Any] = {"think_s": pace.task_s, "flaky": flaky, "drops": chance, "away_s": pace.away_s}
    with Simulation(folder / name, orders_for(aggregator, name, chosen, seconds, folder / f"{name}.log", **more)) as fleet:
        report = fleet.finished()
    time.sleep(pace.lease_s)
    until = time.monotonic() + SETTLE_S
    while True:
        progress = aggregator.admin("GET", f"/v1/runs/{name}/progress").json
        given, counted = leased(aggregator.url, name)
        if progress["n_wasted"] == PROBES_PER_TASK * (given - counted) or time.monotonic() > until:
            break
        time.sleep(0.1)
    aggregator.admin("POST", f"/v1/runs/{name}/finish")
    return {
        "wasted": progress["n_wasted"] / (PROBES_PER_TASK * given),
        "probes": PROBES_PER_TASK * given,
        "unreported": PROBES_PER_TASK * (given - counted) - progress["n_wasted"],
        "dropped": report.dropped / given,
        "abandoned": report.abandoned / given,
        "rounds": progress["version"],
        "results_a_second": report.accepted / report.seconds,
    }


def dropout(bench: Bench, *, seconds: float = SECONDS, devices: int = DEVICES, flaky: int = FLAKY, modes: tuple[str, ...] = tuple(MODES)) -> Measured:
    """Every mode with every chance, and without flaky devices for comparison."""
    figures: dict[str, Any] = {}
    folder = bench.fresh("federation-dropout")
    with Aggregator(folder) as aggregator:
        for mode in modes:
            for chance in (0.0, *CHANCES):
                found = waste(aggregator, folder, mode, chance, bench.seconds(seconds), devices, flaky if chance else 0)
                figures |= {f"{mode} {chance:g} {key}": value for key, value in found.items()}
    figures["wasted"] = max(figures[f"{mode} {CHANCES[0]:g} wasted"] for mode in modes)
    figures["wasted_always"] = max(figures[f"{mode} {CHANCES[1]:g} wasted"] for mode in modes)
    figures["unreported"] = max(abs(value) for key, value in figures.items() if key.endswith(" unreported"))
    return Measured(figures, "fwdllama bench federation-dropout")


ITEMS = (
    Item(
        "federation-dropout",
        "a fifth of the devices leave in the middle of every second task, half of them for good: probes in vain of all probes",
        (Bar("wasted", "<=", 0.1), Bar("unreported", "<=", 0)),
        ("wasted", "wasted_always", "unreported"),
        ("server",),
        6,
        dropout,
        model=False,
    ),
)
