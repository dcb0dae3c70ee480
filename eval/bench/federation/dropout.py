"""Devices that leave in the middle of tasks: how much of what they compute is in vain, and whether the aggregator says so truly.

A fifth of the devices are flaky. Such a device leaves while it works on a task, at a random moment and by a given chance, is away for a few
times a task's length, and then either goes on where it was, so that its result comes late, or has forgotten it. Times are a hundredth of
a phone's; their ratios are what matters.
"""

from __future__ import annotations

import random
import time
from typing import Any

from fwdllama.federation.toy import toy_run

from ..measure import Bar, Bench, Item, Measured
from .aggregator import Aggregator
from .books import leased
from .load import Simulation, orders_for

SEED = 9
DEVICES, FLAKY, SECONDS = 40, 8, 40.0
CHANCES = (0.5, 1.0)  # the first is the figure of the bar; with the second a flaky device leaves every task that it is given
TASK_S, AWAY_S, LEASE_S = 0.3, (0.5, 3.0), 1.2  # a phone: 30 s a task, gone for one to five minutes, leases of two
ROUND = {"probes": 800, "most": 800, "probes_per_task": 20, "lease_s": LEASE_S, "deadline_s": 60.0}
MODES = {"sync": 0, "async": 2}  # rounds by which a result may be late
SETTLE_S = 2.5  # of the aggregator's clock after the last lease


def waste(bench: Bench, mode: str, chance: float, seconds: float, devices: int, flaky: int) -> dict[str, Any]:
    """Figures of one run."""
    folder = bench.fresh(f"federation-dropout-{mode}-{chance:g}")
    name = f"dropout-{mode}"
    spec, initial = toy_run(
        name, rounds=1_000_000, round={**ROUND, "staleness": MODES[mode]}, evaluation={"every": 1_000_000, "devices": 1}
    )
    with Aggregator(folder) as aggregator:
        chosen = sorted(aggregator.enrolled(devices), key=lambda d: d.device)
        aggregator.create(spec, initial)
        random.Random(SEED).shuffle(chosen)
        more: dict[str, Any] = {"think_s": TASK_S, "flaky": flaky, "drops": chance, "away_s": AWAY_S}
        with Simulation(folder / "fleet", orders_for(aggregator, name, chosen, seconds, folder / "accepted.log", **more)) as fleet:
            report = fleet.finished()
        time.sleep(LEASE_S + SETTLE_S)
        progress = aggregator.admin("GET", f"/v1/runs/{name}/progress").json
        given, counted = leased(aggregator.url, name)
    n = int(spec.round.probes_per_task)
    return {
        "wasted": progress["n_wasted"] / (n * given),
        "probes": n * given,
        "unreported": n * (given - counted) - progress["n_wasted"],
        "dropped": report.dropped / given,
        "abandoned": report.abandoned / given,
        "rounds": progress["version"],
        "results_per_s": report.accepted / report.seconds,
    }


def dropout(bench: Bench, *, seconds: float = SECONDS, devices: int = DEVICES, flaky: int = FLAKY, modes: tuple[str, ...] = tuple(MODES)) -> Measured:
    """Every mode with every chance, and without flaky devices for comparison."""
    figures: dict[str, Any] = {}
    for mode in modes:
        for chance in (0.0, *CHANCES):
            found = waste(bench, mode, chance, bench.seconds(seconds), devices, flaky if chance else 0)
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
