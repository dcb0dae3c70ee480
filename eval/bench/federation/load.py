"""How much an aggregator carries: results a second, how long they take, what they weigh, and what its memory does meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

from fwdllama.federation.toy import toy_run

from ..measure import Bar, Bench, BenchError, Item, Measured
from .aggregator import HOST, Aggregator
from .fleet import Orders, Report
from .wire import Identity

SEED = 4
ENROLLED, CONCURRENT, LOAD_S, WARM_S = 10_000, 100, 30.0, 5.0
PROBES_PER_TASK = 20
N_PARAMS = 64
ROUND = {"probes": 2000, "most": 2000, "probes_per_task": PROBES_PER_TASK, "staleness": 2, "lease_s": 30.0}
ENTRY = "from fwdllama_eval.bench.federation.fleet import main; main()"


class Simulation:
    """A fleet in a process of its own, which does not outlive the block it is used in."""

    def __init__(self, folder: Path, orders: Orders) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "orders.json"
        path.write_text(json.dumps(asdict(orders)))
        self.process = subprocess.Popen([sys.executable, "-c", ENTRY, str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def finished(self, *, stop: bool = False) -> Report:
        """Wait for its end, or ask for it.

        Raises:
            BenchError: it failed.
        """
        if stop:
            self.process.terminate()
        said, _ = self.process.communicate()
        if self.process.returncode != 0:
            raise BenchError(f"the simulated devices ended with {self.process.returncode}.")
        return Report(**json.loads(said))

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def orders_for(aggregator: Aggregator, run: str, devices: Sequence[Identity], seconds: float, log: Path, **more: Any) -> Orders:
    """What these devices are to do, straight at the aggregator."""
    given = tuple((device.device, device.key.hex()) for device in devices)
    return Orders(**{"host": HOST, "port": aggregator.port, "run": run, "devices": given, "seconds": seconds, "log": str(log), "seed": SEED, **more})


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of all do not exceed.

    >>> percentile(range(101), 99)
    99.0
    """
    return float(quantiles(values, n=100, method="inclusive")[percent - 1])


def load(bench: Bench, *, enrolled: int = ENROLLED, concurrent: int = CONCURRENT, seconds: float = LOAD_S, warm_s: float = WARM_S) -> Measured:
    """Enrol many, then let a hundred of them work without a pause; what comes before the caches are warm is left out."""
    folder = bench.fresh("federation-load")
    spec, initial = toy_run("load", N_PARAMS, rounds=1_000_000, round=ROUND, evaluation={"every": 50, "devices": 4})
    with Aggregator(folder) as aggregator:
        devices = aggregator.enrolled(enrolled)
        aggregator.create(spec, initial)
        chosen = random.Random(SEED).sample(sorted(devices, key=lambda d: d.device), concurrent)
        with Simulation(folder / "warm", orders_for(aggregator, "load", chosen, warm_s, folder / "warm.log")) as fleet:
            warm = fleet.finished()
        before_s = aggregator.cpu_s()
        with Simulation(folder / "fleet", orders_for(aggregator, "load", chosen, bench.seconds(seconds), folder / "accepted.log")) as fleet:
            report = fleet.finished()
        server_s = aggregator.cpu_s() - before_s
        rss = aggregator.rss_bytes()
        run = aggregator.admin("GET", "/v1/runs/load/progress").json
    if run["n_results"] != report.accepted + warm.accepted:
        raise BenchError(f"{report.accepted + warm.accepted} results were acknowledged, but the aggregator counts {run['n_results']}.")
    requests = sum(report.answers.values())
    figures = {
        "enrolled": len(devices),
        "concurrent": concurrent,
        "results_per_s": report.accepted / report.seconds,
        "p50_ms": percentile(report.latencies_ms, 50),
        "p99_ms": percentile(report.latencies_ms, 99),
        "worst_ms": max(report.latencies_ms),
        "failures": report.failures + report.lost,
        "requests_per_s": requests / report.seconds,
        "answers": report.answers,
        "server_cpu_ms_per_request": 1000 * server_s / requests,
        "rounds": run["version"],
        "rss_bytes": rss,
    }
    return Measured(figures, "fwdllama bench federation-load")


ITEMS = (
    Item(
        "federation-load",
        "10,000 devices enrolled, 100 of them delivering without a pause; SQLite, durable commits; losses follow from seeds, no theta",
        (Bar("enrolled", ">=", ENROLLED), Bar("results_per_s", ">=", 300), Bar("p99_ms", "<=", 250), Bar("failures", "<=", 0)),
        ("results_per_s", "p50_ms", "p99_ms", "failures", "enrolled", "server_cpu_ms_per_request"),
        ("server",),
        1.5,
        load,
        model=False,
    ),
)
