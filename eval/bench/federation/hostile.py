"""Devices that lie: what each rule of aggregation makes of it, against the same run without them.

Everybody is one process here and works in turn, so that every figure repeats; the aggregator is a real one. Losses are quadratic, with
a centre of each device's own (data that are not alike), and each device's examples lie around it. Liars are a fifth of the devices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import direction
from fwdllama.federation.toy import BASE, toy_run
from fwdllama.ledger import read_page, replay
from fwdllama.oracle import QuadraticOracle
from fwdllama.types import Encoded

from ..measure import Bar, Bench, BenchError, Item, Measured
from .aggregator import HOST, Aggregator
from .wire import Identity, Wire

SEED = 20
DEVICES, SHARE = 20, 0.2
N_PARAMS, ROUNDS, PROBES, PROBES_PER_TASK, EXAMPLES = 64, 40, 160, 20, 4
EPS = 0.01
FLOOR = 1.0  # nats that no theta takes away
STEP = {"lr": 0.3, "final_lr": 0.01, "half_life": 1_000_000}
BETWEEN_DEVICES, WITHIN = 0.15, 0.15  # standard deviations of centres, whose mean is half a unit from where theta begins
WIDE = 1e6  # nats: with it a loss times a thousand is accepted, so that the rule alone must cope

Result = dict[str, Any]
Lie = Callable[[Result, Result | None], Result]  # of an honest result and the device's first one


def _times_1000(honest: Result, first: Result | None) -> Result:
    return {**honest, **{key: [1000 * x for x in honest[key]] for key in ("plus", "minus")}, "loss": 1000 * honest["loss"]}


def _sign_flipped(honest: Result, first: Result | None) -> Result:
    (at,) = honest["minus"]
    return {**honest, "plus": [max(0.0, 2 * at - x) for x in honest["plus"]]}


def _constant(honest: Result, first: Result | None) -> Result:
    return {**honest, "plus": [2.0] * len(honest["plus"]), "minus": [2.0], "loss": 2.0}


def _nan(honest: Result, first: Result | None) -> Result:
    return {**honest, "plus": [float("nan"), *honest["plus"][1:]]}


def _replayed(honest: Result, first: Result | None) -> Result:
    return {**(first or honest), "theta_digest": honest["theta_digest"]}


LIES: dict[str, Lie] = {"times_1000": _times_1000, "sign_flipped": _sign_flipped, "constant": _constant, "nan": _nan, "replayed": _replayed}


@dataclass(frozen=True)
class Rule:
    """A way of aggregation, as a run's specification has it."""

    name: str
    copies: int = 1
    max_loss: float = 50.0

    @property
    def label(self) -> str:
        """For figures."""
        return self.name + ("_wide" if self.max_loss == WIDE else "")

    def spec(self) -> dict[str, Any]:
        """The fields that differ."""
        return {"aggregation": {"rule": self.name, "max_loss": self.max_loss}, "copies": self.copies}


ROBUST = (Rule("clip"), Rule("clip", max_loss=WIDE), Rule("median", 3, WIDE), Rule("trimmed", 3, WIDE))
MEAN = Rule("mean", max_loss=WIDE)


@dataclass(frozen=True)
class Size:
    """How large the runs are."""

    devices: int = DEVICES
    rounds: int = ROUNDS
    probes: int = PROBES


class Data:
    """Examples of every device, and held-out ones of all honest devices alike."""

    def __init__(self, n_devices: int) -> None:
        rng = np.random.default_rng(SEED)
        self.n_hostile = round(SHARE * n_devices)
        own = 0.5 + BETWEEN_DEVICES * rng.standard_normal((n_devices, 1, N_PARAMS))
        curvature = np.exp(rng.uniform(-1, 1, N_PARAMS))
        self.oracles = []
        for centres in own + WITHIN * rng.standard_normal((n_devices, 2 * EXAMPLES, N_PARAMS)):
            self.oracles.append(QuadraticOracle(centres, curvature))

    def losses(self, device: int, theta: NDArray[np.float32], rows: Sequence[int]) -> float:
        """Mean loss of a device's examples: the first half to train on, the others held out."""
        oracle = self.oracles[device]
        oracle.load([Encoded("", (row,), (), ()) for row in rows])
        oracle.write(theta)
        return FLOOR + float(oracle.losses().mean())

    def held_out(self, theta: NDArray[np.float32]) -> float:
        """The mean of the honest devices', who are the last ones."""
        rows = range(EXAMPLES, 2 * EXAMPLES)
        return float(np.mean([self.losses(device, theta, rows) for device in range(self.n_hostile, len(self.oracles))]))


class Play:
    """One run, all devices in turn; the first ones lie."""

    def __init__(self, aggregator: Aggregator, identities: Sequence[Identity], name: str, data: Data, lie: Lie | None) -> None:
        self.name, self.data, self.lie, self.identities = name, data, lie, identities
        self.wire = Wire(HOST, aggregator.port)
        self.theta = np.zeros(N_PARAMS, np.float32)
        self.version = 0
        self.n_refused = 0
        self.first: dict[int, Result] = {}

    async def run(self, genesis: bytes) -> float:
        """The held-out loss in the end.

        Raises:
            BenchError: the run stands still.
        """
        self.last = genesis
        async with self.wire:
            return await self._turns()

    async def _turns(self) -> float:
        idle, rng = 0, np.random.default_rng(SEED)
        while idle < 3 * len(self.identities):
            for device in rng.permutation(len(self.identities)).tolist():  # whoever shares a slot or a round is another each time
                identity = self.identities[device]
                answer = await self.wire.signed(identity, "POST", f"/v1/runs/{self.name}/checkin", json.dumps({"base": BASE}).encode())
                if answer.status != 200:
                    raise BenchError(f"check-in: {answer.status} {answer.body.decode(errors='replace')}")
                task, wait = answer.json["task"], answer.json["wait"]
                if wait is not None and wait["finished"]:
                    await self._catch_up(identity)
                    return self.data.held_out(self.theta)
                idle = idle + 1 if task is None else 0
                if task is not None:
                    await self._work(device, identity, task)
        raise BenchError(f"run {self.name} stands still at version {self.version}.")

    async def _work(self, device: int, identity: Identity, task: dict[str, Any]) -> None:
        if task["version"] != self.version:
            await self._catch_up(identity)
        body = {"result": self._result(device, task)}
        answer = await self.wire.signed(identity, "PUT", f"/v1/tasks/{task['task']}/result", json.dumps(body).encode())
        if answer.status not in (200, 422):
            raise BenchError(f"result: {answer.status} {answer.body.decode(errors='replace')}")
        self.n_refused += answer.status == 422

    def _result(self, device: int, task: dict[str, Any]) -> Result:
        rows = range(EXAMPLES)
        at = self.data.losses(device, self.theta, rows)
        if task["kind"] == "evaluate":
            loss = self.data.losses(device, self.theta, range(EXAMPLES, 2 * EXAMPLES))
            return {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": loss, "n_examples": EXAMPLES, "n_tokens": 40}
        plus = [self.data.losses(device, self.theta + np.float32(EPS) * direction(seed, N_PARAMS), rows) for seed in task["seeds"]]
        honest = {"theta_digest": task["theta_digest"], "plus": plus, "minus": [at], "examples": [EXAMPLES], "loss": at, "n_tokens": 400}
        honest["kind"] = "train"
        first = self.first.setdefault(device, honest)
        return self.lie(honest, first) if self.lie is not None and device < self.data.n_hostile else honest

    async def _catch_up(self, identity: Identity) -> None:
        page = await self.wire.signed(identity, "GET", f"/v1/runs/{self.name}/ledger?from={self.version}")
        entries, self.last = read_page(page.body, self.last, self.version, "the ledger")
        self.theta = replay(self.theta, entries)
        self.version += len(entries)


def played(aggregator: Aggregator, identities: Sequence[Identity], rule: Rule, lie: str | None, size: Size) -> tuple[float, int]:
    """Held-out loss, and how many results were refused, of a run under a rule with one kind of liars or none."""
    given = rule.spec()
    shape = {"probes": size.probes, "most": size.probes, "probes_per_task": PROBES_PER_TASK, "copies": given["copies"], "lease_s": 3600.0}
    spec, initial = toy_run(
        f"{rule.label}-{lie or 'clean'}".replace("_", "-"),
        N_PARAMS,
        rounds=size.rounds,
        eps=EPS,
        train={"step": STEP},
        round={**shape, "deadline_s": 3600.0},
        aggregation=given["aggregation"],
        evaluation={"every": 1_000_000, "devices": 1},
    )
    created = aggregator.create(spec, initial)
    play = Play(aggregator, identities, spec.name, Data(size.devices), None if lie is None else LIES[lie])
    return asyncio.run(play.run(bytes.fromhex(created["genesis"]))), play.n_refused


def hostile(bench: Bench, size: Size = Size(), rules: Sequence[Rule] = ROBUST, lies: Sequence[str] = tuple(LIES)) -> Measured:
    """Every rule with every lie, in ratio to the same rule without liars; and the plain mean."""
    figures: dict[str, Any] = {"start": Data(size.devices).held_out(np.zeros(N_PARAMS, np.float32))}
    worst: dict[str, float] = {}
    with Aggregator(bench.fresh("federation-hostile")) as aggregator:
        identities = sorted(aggregator.enrolled(size.devices), key=lambda identity: identity.device)
        for rule in (*rules, MEAN):
            clean, _ = played(aggregator, identities, rule, None, size)
            figures[f"{rule.label} clean"] = clean
            for lie in lies:
                loss, n_refused = played(aggregator, identities, rule, lie, size)
                figures |= {f"{rule.label} {lie}": loss, f"{rule.label} {lie} ratio": loss / clean, f"{rule.label} {lie} refused": n_refused}
            worst[rule.label] = max(figures[f"{rule.label} {lie} ratio"] for lie in lies)
    mean = worst.pop(MEAN.label)
    best = min(worst, key=lambda label: worst[label])
    figures |= {"worst_ratio": worst[best], "rule": best, "mean_ratio": mean, **{f"{label}_ratio": ratio for label, ratio in worst.items()}}
    return Measured(figures, "fwdllama bench federation-hostile")


ITEMS = (
    Item(
        "federation-hostile",
        "a fifth of the devices lie, each in five ways: held-out loss in ratio to the same run without liars, worst lie, best rule",
        (Bar("worst_ratio", "<=", 1.05),),
        ("worst_ratio", "rule", *(f"{rule.label}_ratio" for rule in ROBUST), "mean_ratio"),
        ("server",),
        3,
        hostile,
        model=False,
    ),
)
