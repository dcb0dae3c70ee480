"""A device's loop: check in, catch up, work, deliver with the next check-in, wait as told, until the run is finished.

`Device.step` does what is due and says how long to wait before the next; `run` steps and waits. Whatever happens between two steps, or kills
the process in one, costs at most the task in progress: a result is on disk before it is sent and until it is answered, and a task that
nobody answers expires at the aggregator.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from fwdllama.errors import FederationError, Refused, Stopped, Unreachable
from fwdllama.federation.catchup import Follower
from fwdllama.federation.client import Client, slept
from fwdllama.federation.message import Assignment, CheckIn, Run, Task, Wait
from fwdllama.federation.run import chosen_run
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.spool import Pending, Spool
from fwdllama.federation.store import Store
from fwdllama.federation.worker import Place, Worker
from fwdllama.guard import Guard

GONE = (404, 409, 410)  # for a result: unknown, stale, late
MOST_REFUSED = 3  # results in a row that the aggregator finds wrong, before the device gives up
REST_S = 60.0  # before a device that must not work looks again
LONGEST_PAUSE_S = 60.0  # between two attempts to reach an aggregator that is away

Hire = Callable[[RunSpec, bytes], AbstractContextManager[Worker]]  # (specification, its initial adapter's file)
Doing = Literal["waiting", "catching up", "loading", "working", "delivering", "over"]


@dataclass(frozen=True)
class Status:
    """What a display may show at any moment."""

    run: str | None = None
    doing: Doing = "waiting"
    reason: str | None = None  # why it waits
    until_s: float | None = None  # when it goes on, seconds since 1970
    version: int | None = None
    n_tasks: int = 0  # delivered and counted, by this process
    n_probes: int = 0
    n_refused: int = 0
    loss: float | None = None  # of the last task, before the version's step
    task_probes: int = 0  # done of `task_wanted` of the task in progress
    task_wanted: int = 0
    contact_s: float | None = None  # when the aggregator last answered


@dataclass
class Listener:
    """What a caller wants to hear, and whether it wants the device to stop."""

    on_event: Callable[[str], None] = lambda text: None
    on_status: Callable[[Status], None] = lambda status: None
    stop: Callable[[], bool] = lambda: False
    sleep: Callable[[float], bool] = slept  # False: cut short, to stop


@dataclass
class Device:
    """One participant. `enrol` first; `close`, or use as a context manager.

    `base` is the SHA-256 of its model file, `examples` how many it has, `hire` loads what computes. With `once` it ends after one task.
    """

    client: Client
    store: Store
    base: str
    examples: int
    hire: Hire
    run_name: str | None = None
    guard: Guard | None = None
    listener: Listener = field(default_factory=Listener)
    once: bool = False
    chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.status = Status()
        self.over: str | None = None  # why, once it is
        self.spool = Spool(self.store)
        self._run: Run | None = None
        self._worker: Worker | None = None
        self._follower: Follower | None = None
        self._resources = ExitStack()
        self._n_failures = self._n_wrong = 0
        self._resting = False

    def enrol(self, name: str, token: str | None) -> None:
        """Become known to the aggregator, unless the device is.

        Raises:
            Refused: the token is not accepted.
            FederationError: there is no token, or no aggregator.
        """
        if self.client.identity is not None:
            return
        if token is None:
            raise FederationError(f"This device is not known to {self.client.url}; give the enrolment token that its operator has, with --token.")
        identity = self.client.enrol(name, token, self.store)
        self._say(f"enrolled at {self.client.url} as {identity.device}")

    def run(self) -> str:
        """Work until the run is finished or `stop` says so; returns why it ended.

        Raises:
            FwdllamaError: it cannot go on; a result that was computed is kept.
        """
        try:
            while self.over is None:
                if self.listener.stop() or not self.listener.sleep(self.step()):
                    self.over = "stopped"
        except Stopped:
            self.over = "stopped"
        self._show(doing="over", reason=self.over, until_s=None)
        return self.over

    def step(self) -> float:
        """Do what is due; returns the seconds to wait before the next step. `over` tells when there is none.

        Raises:
            FwdllamaError: the device cannot go on.
            Stopped: on request.
        """
        try:
            delay = self._step()
            if self._n_failures:
                self._say(f"{self.client.url} answers again")
            self._n_failures = 0
        except Unreachable as error:
            self._n_failures += 1
            most = min(LONGEST_PAUSE_S, 2.0**self._n_failures)
            delay = error.retry_after_s if error.retry_after_s is not None else self.chance.uniform(most / 2, most)
            if self._n_failures == 1:
                self._say(f"{error} Trying again until it answers.")
            self._show(doing="waiting", reason=str(error), until_s=time.time() + delay)
        except Refused as error:
            raise self._named(error) from error
        return delay

    def _step(self) -> float:
        if self._run is None:
            self._run = chosen_run(self.client.runs(), self.run_name, self.base, self.client.url)
            self._show(run=self._run.spec.name)
        refusal, checkin = self._check_in()
        pending = self.spool.pending()
        if pending is None:
            assignment = self.client.check_in(self._run.run, checkin)
        else:
            # What comes with the receipt is of the result's run, which need not be the one that the device is for now.
            alone = refusal is not None or self.once or pending.run != self._run.run
            delivered = self._deliver(pending, None if alone else checkin)
            if self.over is not None or delivered is None:
                return 0.0
            assignment = delivered
        if assignment.task is None or refusal is not None:
            return self._wait(assignment.wait, refusal)
        self._work(assignment.task)
        return 0.0

    def _check_in(self) -> tuple[str | None, CheckIn]:
        """Why the device must not work, if so, and how it is."""
        if self.guard is None:
            return None, CheckIn(base=self.base, examples=self.examples)
        reading = self.guard.reading()
        refusal = self.guard.refusal(reading, resting=self._resting)
        self._resting = refusal is not None
        checkin = CheckIn(
            base=self.base,
            examples=self.examples,
            memory_bytes=reading.memory_bytes,
            battery=None if reading.battery is None else round(reading.battery, 3),
            charging=reading.charging,
            resting=True if refusal else None,
        )
        return refusal, checkin

    def _wait(self, wait: Wait | None, refusal: str | None) -> float:
        if wait is not None and wait.finished:
            self.over = f"the run is finished: {wait.reason}"
            return 0.0
        reason = refusal or (wait.reason if wait else "the aggregator gave neither a task nor a time")
        delay = REST_S if wait is None else self.chance.uniform(max(0.0, wait.least_s), max(0.0, wait.least_s, wait.most_s))
        if refusal is not None:
            delay = max(delay, REST_S)
        if self.status.reason != reason:
            self._say(f"waiting: {reason}")
        self._show(doing="waiting", reason=reason, until_s=time.time() + delay)
        return delay

    def _deliver(self, pending: Pending, checkin: CheckIn | None) -> Assignment | None:
        """Bring a result; None where it was not taken, or nothing came back with the receipt."""
        self._show(doing="delivering", reason=None, until_s=None)
        try:
            receipt = self.client.deliver(pending, checkin)
        except Refused as error:
            if error.status in (401, 403):
                raise
            self.spool.clear()
            self._show(n_refused=self.status.n_refused + 1)
            if error.status in GONE:
                self._say(f"a result came too late and does not count: {error}")
                return None
            self._n_wrong += 1
            if self._n_wrong >= MOST_REFUSED:
                raise FederationError(f"{self.client.url} refused {self._n_wrong} results in a row; the last because: {error}") from error
            self._say(f"a result was refused: {error}")
            return None
        self.spool.clear()
        self._n_wrong = 0
        result = pending.result
        n_probes = len(result.plus) if result.kind == "train" else 0
        self._show(n_tasks=self.status.n_tasks + 1, n_probes=self.status.n_probes + n_probes, loss=result.loss, task_probes=0, task_wanted=0)
        if self.once:
            self.over = "one task was done"
        return receipt.next

    def _work(self, task: Task) -> None:
        worker, follower = self._hired()
        self._show(doing="catching up", reason=None, until_s=None, task_probes=0, task_wanted=len(task.seeds))
        theta = follower.at(task.version, task.theta_digest)
        self._show(doing="working", version=task.version)
        watch = self.guard.watch() if self.guard else lambda: None

        def proceed(n_done: int) -> bool:
            self._show(task_probes=n_done)
            return not self.listener.stop() and watch() is None

        result = worker.work(task, theta, proceed)
        if result is None:
            why = "stopping" if self.listener.stop() else watch() or "it must not work just now"
            self._say(f"left task {task.task} to others: {why}")
            return
        self.spool.put(Pending(task.run, task.task, result))
        self.store.write(self._place_name, json.dumps([worker.place.batch, worker.place.group]).encode())

    def _hired(self) -> tuple[Worker, Follower]:
        """What computes, loaded with the first task, so that a device that only waits holds no model."""
        assert self._run is not None
        if self._worker is None or self._follower is None:
            self._show(doing="loading", reason=None, until_s=None)
            spec = self._run.spec
            worker = self._resources.enter_context(self.hire(spec, self._initial(spec.initial)))
            try:
                worker.place = Place(*(int(n) for n in json.loads(self.store.read(self._place_name) or b"[0, 0]")))
            except (ValueError, TypeError):  # damaged: it only says which examples come next
                worker.place = Place()
            initial_theta = worker.initial_theta()
            self._follower = Follower(self.client, self.store, self._run, initial_theta, stop=self.listener.stop, on_event=self._say)
            self._worker = worker
        return self._worker, self._follower

    def _initial(self, sha256: str) -> bytes:
        """The initial adapter's file, kept once it was fetched."""
        name = f"initial-{sha256}.gguf"
        data = self.store.read(name)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            data = self.client.blob(sha256, self.store)
            self.store.write(name, data)
        return data

    @property
    def _place_name(self) -> str:
        assert self._run is not None
        return f"place-{self._run.run}.json"

    def _named(self, error: Refused) -> FederationError:
        if error.status == 401:
            return FederationError(f"{self.client.url} does not accept this device any more: {error}")
        return FederationError(f"{self.client.url} refused: {error}")

    def _say(self, text: str) -> None:
        self.listener.on_event(text)

    def _show(self, **changed: object) -> None:
        self.status = replace(self.status, contact_s=self.client.contact_s, **changed)  # type: ignore[arg-type]
        self.listener.on_status(self.status)

    def close(self) -> None:
        """Unload the model, and keep theta for the next start. Safe to call twice."""
        if self._follower is not None:
            self._follower.keep()
        self._resources.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
