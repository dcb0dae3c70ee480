"""Simulated devices, in a process of their own: they speak the whole protocol and compute nothing.

Their losses follow from the seeds alone, so none needs to know theta: what is measured is the aggregator, and what it accepted can be
computed again afterwards. Every result that was acknowledged is on disk before its device goes on, so that a fleet may be killed too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fwdllama.federation.toy import BASE

from .wire import Answer, Identity, Lost, Wire

EXAMPLES = 4  # of each result's only group
RETRY_S = 0.2  # on average, after an aggregator that did not answer


@dataclass(frozen=True)
class Orders:
    """What a fleet does: devices (name, hex key) work on a run for so long, and think for so long about each task."""

    host: str
    port: int
    run: str
    devices: Sequence[tuple[str, str]]
    seconds: float
    log: str  # acknowledged tasks, a line each
    think_s: float = 0.0
    seed: int = 0
    answer_s: float = 60.0  # within which an answer must come
    connections: int | None = None  # that the devices share, one task each in turn; None: one for each device
    flaky: int = 0  # of the devices, the first ones
    drops: float = 0.0  # the chance that a flaky device leaves in the middle of a task
    away_s: Sequence[float] = (1.0, 6.0)


@dataclass
class Report:
    """What became of it. `answers` counts requests by status, `lost` those without an answer."""

    seconds: float = 0.0
    accepted: int = 0
    duplicates: int = 0
    lost: int = 0
    finished: bool = False
    dropped: int = 0  # tasks that a device left in the middle of
    abandoned: int = 0  # of these, those that it did not take up again when it returned
    answers: dict[str, int] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)  # of results

    @property
    def failures(self) -> int:
        """Answers 5xx."""
        return sum(n for status, n in self.answers.items() if status.startswith("5"))


def toy_losses(seeds: Sequence[int]) -> list[float]:
    """Losses between 1 and 1.1 that follow from seeds, of the digits that a real device sends.

    >>> toy_losses([0, 32768, 65536])
    [1.0, 1.05, 1.0]
    """
    return [round(1.0 + (seed & 0xFFFF) / 655360, 6) for seed in seeds]


def result_of(task: dict[str, Any]) -> dict[str, Any]:
    """The answer to a task."""
    if task["kind"] == "evaluate":
        return {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": 1.0, "n_examples": EXAMPLES, "n_tokens": 40}
    return {
        "kind": "train",
        "theta_digest": task["theta_digest"],
        "plus": toy_losses(task["seeds"]),
        "minus": [1.05],
        "examples": [EXAMPLES],
        "loss": 1.05,
        "n_tokens": 400,
    }


class Fleet:
    """Devices that share an event loop; each has a connection."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.report = orders, Report()
        self.random = random.Random(orders.seed)
        self.answers: Counter[str] = Counter()
        self.ends = time.monotonic() + orders.seconds
        self._log = os.open(orders.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def run(self) -> Report:
        """All devices until the time is over, the run finished, or the process told to stop."""
        begun = time.monotonic()
        identities = [Identity(name, bytes.fromhex(key)) for name, key in self.orders.devices]
        n = self.orders.connections or len(identities)
        flaky = {identity.device for identity in identities[: self.orders.flaky]}
        await asyncio.gather(*(self._connection(identities[i::n], flaky) for i in range(n)))
        self.report.seconds = time.monotonic() - begun
        self.report.answers = dict(self.answers)
        os.close(self._log)
        return self.report

    def stop(self) -> None:
        """Let every device finish what it is at."""
        self.ends = 0.0

    async def _connection(self, identities: list[Identity], flaky: set[str]) -> None:
        """Devices that take turns after each task; one alone checks in with its results."""
        async with Wire(self.orders.host, self.orders.port, answer_s=self.orders.answer_s) as wire:
            await self._turns(wire, identities, flaky)

    async def _turns(self, wire: Wire, identities: list[Identity], flaky: set[str]) -> None:
        checkin = {"base": BASE}
        checking_in = f"/v1/runs/{self.orders.run}/checkin"
        task: dict[str, Any] | None = None
        turns = itertools.cycle(identities)
        identity = next(turns)
        while task is not None or time.monotonic() < self.ends:  # what was begun is finished
            if task is None:
                answer = await self._answered(wire, identity, "POST", checking_in, json.dumps(checkin).encode())
            elif await self._thought(identity.device in flaky):
                goes_on = len(identities) == 1 and time.monotonic() < self.ends
                answer = await self._delivered(wire, identity, task, checkin if goes_on else None)
            else:
                task = None
                continue
            if answer is None:
                break
            following = answer.json if answer.status == 200 else {}
            if task is not None:
                following = following.get("next") or {}
                identity = next(turns)
            elif answer.status != 200:
                await asyncio.sleep(self.random.uniform(0, 0.1))
            task = following.get("task")
            if (wait := following.get("wait")) is not None:
                if wait["finished"]:
                    self.report.finished = True
                    break
                await asyncio.sleep(self.random.uniform(wait["least_s"], wait["most_s"]))

    async def _thought(self, flaky: bool) -> bool:
        """Take the time of a task; False where its device left in the middle and has forgotten it when it returns."""
        thinking = self.orders.think_s * self.random.uniform(0.5, 1.5)
        if not flaky or self.random.random() >= self.orders.drops:
            await asyncio.sleep(thinking)
            return True
        self.report.dropped += 1
        await asyncio.sleep(thinking * self.random.random() + self.random.uniform(self.orders.away_s[0], self.orders.away_s[1]))
        forgotten = self.random.random() < 0.5
        self.report.abandoned += forgotten
        return not forgotten

    async def _delivered(self, wire: Wire, identity: Identity, task: dict[str, Any], checkin: dict[str, Any] | None) -> Answer | None:
        body = json.dumps({"result": result_of(task), "checkin": checkin}, separators=(",", ":"))
        begun = time.monotonic()
        answer = await self._answered(wire, identity, "PUT", f"/v1/tasks/{task['task']}/result", body.encode())
        if answer is not None:
            self.report.latencies_ms.append(1000 * (time.monotonic() - begun))
            if answer.status == 200:
                duplicate = answer.json["duplicate"]
                self.report.accepted += not duplicate
                self.report.duplicates += duplicate
                os.write(self._log, f"{task['task']}\n".encode())
        return answer

    async def _answered(self, wire: Wire, identity: Identity, method: str, target: str, body: bytes) -> Answer | None:
        """The answer, however often it takes; None where the time was over before one came."""
        while True:
            try:
                answer = await wire.signed(identity, method, target, body)
            except Lost:
                self.report.lost += 1
            else:
                self.answers[str(answer.status)] += 1
                if answer.status < 500 and answer.status != 429:
                    return answer
            if time.monotonic() >= self.ends:
                return None
            await asyncio.sleep(self.random.uniform(0, 2 * RETRY_S))


def main() -> None:
    """Follow the orders of a file; the report goes to stdout."""
    given = json.loads(Path(sys.argv[1]).read_text())
    fleet = Fleet(Orders(**given))

    async def run() -> Report:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, fleet.stop)
        return await fleet.run()

    sys.stdout.write(json.dumps(asdict(asyncio.run(run()))))


if __name__ == "__main__":
    main()
