"""How much an aggregator carries: results a second, how long they take, what they weigh, and what its memory does meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import linear_regression, quantiles
from typing import Any

from fwdllama.federation.message import CheckIn, Delivery, EvaluateResult, TrainResult
from fwdllama.federation.toy import BASE, toy_run

from ..measure import Bar, Bench, BenchError, Item, Measured
from .aggregator import HOST, Aggregator
from .fleet import Orders, Report
from .wire import Identity, Wire

SEED = 4
ENROLLED, CONCURRENT, LOAD_S, WARM_S = 10_000, 100, 30.0, 5.0
PROBES_PER_TASK = 20
N_PARAMS = 64
MEMORY_ROUNDS = 1000
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
    with Aggregator(folder) as aggregator:
        figures = loaded(aggregator, folder, enrolled=enrolled, concurrent=concurrent, seconds=bench.seconds(seconds), warm_s=warm_s)
    return Measured(figures, "fwdllama bench federation-load")


def loaded(aggregator: Aggregator, folder: Path, *, enrolled: int, concurrent: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Figures of the load on an aggregator that is up.

    Raises:
        BenchError: it counts other results than it acknowledged.
    """
    spec, initial = toy_run("load", N_PARAMS, rounds=1_000_000, round=ROUND, evaluation={"every": 50, "devices": 4})
    devices = aggregator.enrolled(enrolled)
    aggregator.create(spec, initial)
    chosen = random.Random(SEED).sample(sorted(devices, key=lambda d: d.device), concurrent)
    with Simulation(folder / "warm", orders_for(aggregator, "load", chosen, warm_s, folder / "warm.log")) as fleet:
        warm = fleet.finished()
    before_s = aggregator.cpu_s()
    with Simulation(folder / "fleet", orders_for(aggregator, "load", chosen, seconds, folder / "accepted.log")) as fleet:
        report = fleet.finished()
    server_s = aggregator.cpu_s() - before_s
    run = aggregator.admin("GET", "/v1/runs/load/progress").json
    if run["n_results"] != report.accepted + warm.accepted:
        raise BenchError(f"{report.accepted + warm.accepted} results were acknowledged, but the aggregator counts {run['n_results']}.")
    requests = sum(report.answers.values())
    return {
        "enrolled": len(devices),
        "concurrent": concurrent,
        "results_a_second": report.accepted / report.seconds,
        "p50_ms": percentile(report.latencies_ms, 50),
        "p99_ms": percentile(report.latencies_ms, 99),
        "worst_ms": max(report.latencies_ms),
        "failures": report.failures + report.lost,
        "requests_a_second": requests / report.seconds,
        "answers": report.answers,
        "server_cpu_ms_per_request": 1000 * server_s / requests,
        "rounds": run["version"],
        "rss_bytes": aggregator.rss_bytes(),
    }


def memory(bench: Bench, *, enrolled: int = ENROLLED, rounds: int = MEMORY_ROUNDS) -> Measured:
    """As many rounds as are asked for, every task by another device, and the aggregator's memory meanwhile."""
    folder = bench.fresh("federation-memory")
    with Aggregator(folder) as aggregator:
        figures = remembered(aggregator, folder, enrolled=enrolled, rounds=rounds)
    return Measured(figures, "fwdllama bench federation-memory")


def remembered(aggregator: Aggregator, folder: Path, *, enrolled: int, rounds: int) -> dict[str, Any]:
    """Figures of the memory of an aggregator that is up.

    Raises:
        BenchError: the devices ended before the rounds were done.
    """
    shape = {"probes": 100, "most": 100, "probes_per_task": PROBES_PER_TASK, "lease_s": 30.0}
    spec, initial = toy_run("memory", N_PARAMS, rounds=rounds, round=shape, evaluation={"every": 100, "devices": 4})
    samples: list[tuple[int, int]] = []  # rounds, bytes
    devices = aggregator.enrolled(enrolled)
    aggregator.create(spec, initial)
    orders = orders_for(aggregator, "memory", devices, 3600.0, folder / "accepted.log", connections=8)
    with Simulation(folder / "fleet", orders) as fleet:
        done = 0
        while done < rounds:
            time.sleep(min(0.5, rounds / 1000))
            if fleet.process.poll() is not None:
                raise BenchError(f"the devices went home after {done} of {rounds} rounds.")
            done = int(aggregator.admin("GET", "/v1/runs/memory/progress").json["version"])
            samples.append((done, aggregator.rss_bytes()))
    later = [sample for sample in samples if sample[0] >= rounds / 2]  # caches fill at first
    slope = linear_regression(*zip(*later, strict=True)).slope if len({at for at, _ in later}) > 1 else 0.0
    peak = max(size for _, size in samples)
    return {
        "rss_bytes": peak,
        "growth": slope * rounds / peak,
        "slope_bytes_a_round": slope,
        "rounds": rounds,
        "enrolled": len(devices),
        "rss_at_start_bytes": samples[0][1],
        "rss_at_end_bytes": samples[-1][1],
    }


def upload(bench: Bench) -> Measured:
    """Deliver one result of twenty probes, as a device sends it, and count the bytes of the request."""
    with Aggregator(bench.fresh("federation-upload")) as aggregator:
        return Measured(uploads(aggregator), "fwdllama bench federation-upload")


def uploads(aggregator: Aggregator) -> dict[str, Any]:
    """Figures of results that are sent to an aggregator that is up."""
    rng = random.Random(SEED)
    shape = {"probes": PROBES_PER_TASK, "most": PROBES_PER_TASK, "probes_per_task": PROBES_PER_TASK}
    (identity,) = aggregator.enrolled(1)
    figures: dict[str, Any] = {}
    for sided in ("one", "two"):
        name = f"upload-{sided}"
        train = {"estimator": {"sided": sided}}
        spec, initial = toy_run(name, N_PARAMS, rounds=8, round=shape, train=train, evaluation={"every": 100, "devices": 1})
        aggregator.create(spec, initial)
        payload, sent = asyncio.run(_uploaded(aggregator.port, identity, name, sided, rng))
        figures |= {f"{sided}_sided_payload_per_probe": payload / PROBES_PER_TASK, f"{sided}_sided_request": sent}
    figures["payload_per_probe"] = max(figures[f"{sided}_sided_payload_per_probe"] for sided in ("one", "two"))
    figures["request"] = figures["one_sided_request"]  # the default
    return figures


async def _uploaded(port: int, identity: Identity, run: str, sided: str, rng: random.Random) -> tuple[int, int]:
    """Bytes of a training result, and of the whole request that delivers it and checks in again."""
    wire = Wire(HOST, port)
    checkin = CheckIn(base=BASE, examples=5000, memory_bytes=3 << 30, battery=0.87, charging=True, metered=False)
    while True:
        answer = await wire.signed(identity, "POST", f"/v1/runs/{run}/checkin", checkin.model_dump_json(exclude_none=True).encode())
        task = answer.json["task"]
        if task is None:
            raise BenchError(f"no task: {answer.body.decode()}")

        def losses(n: int) -> tuple[float, ...]:
            return tuple(float(f"{rng.uniform(0.5, 9.5):.7g}") for _ in range(n))  # seven digits, as devices round

        n = PROBES_PER_TASK if sided == "two" else 5
        result: TrainResult | EvaluateResult = TrainResult(
            theta_digest=task["theta_digest"], plus=losses(PROBES_PER_TASK), minus=losses(n), examples=(4,) * 5, loss=3.141593, n_tokens=12345
        )
        if task["kind"] == "evaluate":
            result = EvaluateResult(theta_digest=task["theta_digest"], loss=3.141593, n_examples=32, n_tokens=12345)
        body = Delivery(result=result, checkin=checkin).model_dump_json(exclude_none=True).encode()
        answer = await wire.signed(identity, "PUT", f"/v1/tasks/{task['task']}/result", body)
        if answer.status != 200:
            raise BenchError(f"result: {answer.status} {answer.body.decode(errors='replace')}")
        if task["kind"] == "train":
            await wire.close()
            return len(result.model_dump_json().encode()), answer.sent_bytes


ITEMS = (
    Item(
        "federation-load",
        "10,000 devices enrolled, 100 of them delivering without a pause; SQLite, durable commits; losses follow from seeds, no theta",
        (Bar("enrolled", ">=", ENROLLED), Bar("results_a_second", ">=", 300), Bar("p99_ms", "<=", 250), Bar("failures", "<=", 0)),
        ("results_a_second", "p50_ms", "p99_ms", "failures", "enrolled", "server_cpu_ms_per_request"),
        ("server",),
        1.5,
        load,
        model=False,
    ),
    Item(
        "federation-memory",
        "memory of an aggregator with 10,000 devices over 1,000 rounds of 100 probes; growth: of the later half, a thousand rounds' share",
        (Bar("rss_bytes", "<=", 400e6), Bar("growth", "<=", 0.05), Bar("enrolled", ">=", ENROLLED)),
        ("rss_bytes", "growth", "rounds", "enrolled"),
        ("server",),
        2,
        memory,
        model=False,
    ),
    Item(
        "federation-upload",
        "bytes that a device sends for a task of 20 probes: the result for each probe, and the whole request with headers and check-in",
        (Bar("payload_per_probe", "<=", 32), Bar("request", "<=", 1024)),
        ("payload_per_probe", "request", "one_sided_payload_per_probe", "two_sided_request"),
        ("server",),
        0.2,
        upload,
        model=False,
    ),
)
