"""What must never happen: an acknowledged result that is lost, one that counts twice, books that do not add up, a run that stands still."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fwdllama.federation.toy import toy_run

from ..measure import Bar, Bench, BenchError, Item, Measured
from .aggregator import Aggregator
from .books import acknowledged, checked
from .fleet import Report
from .load import Simulation, orders_for
from .postgresql import PostgreSQL
from .proxy import Proxy

SEED = 50
N_KILLS, CUT_S = 50, 60.0
DEVICES, FLEETS = 24, 4
THINK_S = 0.02  # so that a second brings many results and most of the time something is under way
MOST_BETWEEN_S = 0.6  # kills: some hit an aggregator that has just begun, others one in the middle of rounds
ROUND = {"probes": 200, "most": 200, "probes_per_task": 10, "lease_s": 3.0, "deadline_s": 20.0}
GO_ON_ROUNDS, GO_ON_S = 3, 60.0
NAME = "kill"


class Scene:
    """An aggregator at work with several fleets of devices, and the moments at which something befalls them."""

    def __init__(self, folder: Path, stack: ExitStack, *, database: str | None, workers: int, through_proxy: bool, fleets: int) -> None:
        self.folder, self.random, self.n_fleets = folder, random.Random(SEED), fleets
        self.aggregator = stack.enter_context(Aggregator(folder, database=database, workers=workers))
        self.workers = workers
        spec, initial = toy_run(NAME, rounds=1_000_000, round=ROUND, evaluation={"every": 10, "devices": 2})
        devices = self.aggregator.enrolled(DEVICES)
        self.aggregator.create(spec, initial)
        self.proxy = stack.enter_context(Proxy(self.aggregator.port)) if through_proxy else None
        more: dict[str, Any] = {"think_s": THINK_S, **({} if self.proxy is None else {"port": self.proxy.port, "answer_s": 5.0})}
        self._orders = [
            orders_for(self.aggregator, NAME, devices[part :: self.n_fleets], 3600.0, self._log(part), **{**more, "seed": SEED + part})
            for part in range(self.n_fleets)
        ]
        self._stack = stack
        self.fleets = [self._fleet(part) for part in range(self.n_fleets)]

    def _log(self, part: int) -> Path:
        return self.folder / f"accepted-{part}.log"

    def _fleet(self, part: int) -> Simulation:
        return self._stack.enter_context(Simulation(self.folder / f"fleet-{part}", self._orders[part]))

    @property
    def n_rounds(self) -> int:
        """Closed so far."""
        return int(self.aggregator.admin("GET", f"/v1/runs/{NAME}").json["version"])

    def kill_aggregator(self) -> None:
        """One worker after a random time, and every third time all of them."""
        time.sleep(self.random.uniform(0, MOST_BETWEEN_S))
        if self.workers == 1 or self.random.random() < 1 / 3:
            self.aggregator.kill()
        else:
            self.aggregator.kill_worker(self.random.randrange(self.workers))
        self.aggregator.restart()

    def kill_devices(self) -> None:
        """A quarter of them after a random time; they come back as themselves, remembering their keys only."""
        time.sleep(self.random.uniform(0.2, 0.2 + 2 * MOST_BETWEEN_S))
        part = self.random.randrange(self.n_fleets)
        self.fleets[part].process.kill()
        self.fleets[part].process.wait()
        self.fleets[part] = self._fleet(part)

    def end(self) -> list[Report]:
        """See the run go on, finish it, and see the devices told so.

        Raises:
            BenchError: it does not go on.
        """
        before, until = self.n_rounds, time.monotonic() + GO_ON_S
        while self.n_rounds < before + GO_ON_ROUNDS:
            if time.monotonic() > until:
                raise BenchError(f"{GO_ON_S:.0f} s after the last interruption the run stands at {self.n_rounds} rounds, {before} before.")
            time.sleep(0.1)
        self.aggregator.admin("POST", f"/v1/runs/{NAME}/finish")
        return [fleet.finished() for fleet in self.fleets]

    def figures(self, reports: list[Report]) -> dict[str, Any]:
        """The books, and what the devices saw."""
        return {
            **checked(self.aggregator.url, NAME, acknowledged(map(self._log, range(self.n_fleets)))),
            "finished": all(report.finished for report in reports),
            "retries": sum(report.lost for report in reports),
            "duplicates": sum(report.duplicates for report in reports),
            "failures": sum(report.failures for report in reports),
        }


def interrupted(
    bench: Bench,
    name: str,
    act: Callable[[Scene], None],
    n: int,
    *,
    postgresql: bool = False,
    workers: int = 1,
    through_proxy: bool = False,
    fleets: int = FLEETS,
) -> Measured:
    """Let `act` befall an aggregator at work `n` times, and check its books."""
    with ExitStack() as stack:
        database = stack.enter_context(PostgreSQL()).url if postgresql else None
        scene = Scene(bench.fresh(name), stack, database=database, workers=workers, through_proxy=through_proxy, fleets=fleets)
        while scene.n_rounds < 1:
            time.sleep(0.1)
        for _ in range(n):
            act(scene)
        reports = scene.end()
        scene.aggregator.stop()
        figures = scene.figures(reports)
    return Measured({**figures, "interruptions": n}, f"fwdllama bench {name}")


def cut(scene: Scene, seconds: float = CUT_S) -> None:
    """Cut the network for so long."""
    assert scene.proxy is not None
    time.sleep(scene.random.uniform(0, MOST_BETWEEN_S))
    scene.proxy.cut()
    time.sleep(seconds)
    scene.proxy.mend()


def _item(name: str, what: str, minutes: float, act: Callable[[Scene], None], n: int, needs: tuple[Any, ...] = (), **how: Any) -> Item:
    barred = ("lost", "counted_twice", "miscounted", "chain_valid", "audit_valid", "finished")
    shown = ("interruptions", "acknowledged", *barred, "rounds", "retries", "duplicates")
    zero = tuple(Bar(figure, "<=", 0) for figure in barred[:3])
    true = tuple(Bar(figure, "is", True) for figure in barred[3:])
    measure = functools.partial(interrupted, name=name, act=act, n=n, **how)
    return Item(name, what, (*zero, *true, Bar("interruptions", ">=", n)), shown, ("server", *needs), minutes, measure, model=False)


ITEMS = (
    _item(
        "federation-kill",
        "the aggregator killed with -9 at 50 random moments under load and restarted, SQLite",
        3,
        Scene.kill_aggregator,
        N_KILLS,
    ),
    _item(
        "federation-kill-postgresql",
        "the same, two workers on PostgreSQL, one or both killed",
        4,
        Scene.kill_aggregator,
        N_KILLS,
        ("postgresql",),
        postgresql=True,
        workers=2,
    ),
    _item("federation-kill-devices", "a quarter of the devices killed with -9 at 50 random moments", 2, Scene.kill_devices, N_KILLS),
    _item("federation-cut", "the network between devices and aggregator cut for 60 s", 1.5, cut, 1, through_proxy=True),
)
