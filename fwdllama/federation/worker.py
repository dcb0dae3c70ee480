"""What computes a task's result, told only a version's theta: the seam between a device's loop and whatever gives losses.

`OracleWorker` is the one implementation, over any `LossOracle`: a model for real devices, a quadratic for simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fwdllama.batches import RollingBatches, grouped
from fwdllama.errors import EngineError
from fwdllama.estimator import evaluate
from fwdllama.federation.message import EvaluateResult, Task, TrainResult
from fwdllama.federation.spec import RunSpec
from fwdllama.loss import bounded
from fwdllama.oracle import LossOracle, QuadraticOracle
from fwdllama.types import Encoded

DISTANCE = 4.0  # of simulated losses' minimum from the start: a loss of 8 there

Proceed = Callable[[int], bool]  # called between probes with how many are done; False: leave the task


@dataclass(frozen=True)
class Place:
    """Where in its data a device is: the batch, and the first of its groups that is to be used next."""

    batch: int = 0
    group: int = 0


class Worker(Protocol):
    """Answers tasks of one run."""

    place: Place  # settable: a restarted device goes on where it was

    def initial_theta(self) -> NDArray[np.float32]:
        """Theta of version 0, float32 (n_params,)."""

    def work(self, task: Task, theta: NDArray[np.float32], proceed: Proceed) -> TrainResult | EvaluateResult | None:
        """The result of a task at theta; None where `proceed` said to leave it."""


class OracleWorker:
    """A `Worker` over a loss oracle and a device's own examples.

    Batches roll on when all their groups have been used, not with every task: a task of 20 probes uses two groups of ten, and loading the
    prompts of new paragraphs costs more than its probes.
    """

    def __init__(
        self,
        spec: RunSpec,
        oracle: LossOracle,
        batches: RollingBatches,
        held_out: Sequence[Encoded | None],
        initial: NDArray[np.float32],
        n_tokens: Callable[[], int] = lambda: 0,  # decoded so far
    ) -> None:
        self.spec, self.oracle, self.batches, self.held_out = spec, oracle, batches, held_out
        self.initial, self.n_tokens = initial, n_tokens
        self.place = Place()
        self._loaded: tuple[int | None, bool] = (None, False)  # which batch, and whether the held-out examples are in front of it

    def initial_theta(self) -> NDArray[np.float32]:
        """Theta of version 0."""
        return self.initial

    def work(self, task: Task, theta: NDArray[np.float32], proceed: Proceed) -> TrainResult | EvaluateResult | None:
        """The result of a task at theta; None where `proceed` said to leave it, or there is nothing to evaluate on."""
        return self._train(task, theta, proceed) if task.kind == "train" else self._evaluate(task, theta)

    def _train(self, task: Task, theta: NDArray[np.float32], proceed: Proceed) -> TrainResult | None:
        before, estimator = self.n_tokens(), self.spec.train.estimator
        place = self.place
        rows = self._load(place.batch)
        every = grouped([None] * len(self.held_out) + rows, estimator.examples_per_probe, place.batch)
        n_groups = min(len(every), max(1, len(task.seeds) // estimator.rounds))
        order = spread(len(every), n_groups)
        groups = [every[order[(place.group + i) % len(every)]] for i in range(n_groups)]
        members = sorted(row for group in groups for row in group)
        self.oracle.write(theta)
        losses = np.full(len(self.held_out) + len(rows), np.nan)
        losses[members] = self.oracle.losses(members)
        mean = float(losses[members].mean())
        if not np.isfinite(mean):
            raise EngineError(f"task {task.task}: the model's loss at version {task.version} is not a number; check the model and the data.")
        one_sided = estimator.sided == "one"
        limit = estimator.outlier * mean
        plan = [(seed, i % n_groups) for i, seed in enumerate(task.seeds)]
        plus: list[float] = []
        minus: list[float] = []
        for probe in evaluate(self.oracle, theta, plan, groups, losses if one_sided else None, self.spec.eps, limit):
            plus.append(short(probe.loss_plus))
            minus.append(short(probe.loss_minus))
            if not proceed(len(plus)) and len(plus) < len(plan):
                return None
        if one_sided:
            minus = [short(float(bounded(losses[list(group)], limit).mean())) for group in groups]
        self.place = _advanced(place, n_groups, len(every))
        return TrainResult(
            theta_digest=task.theta_digest,
            plus=tuple(plus),
            minus=tuple(minus),
            examples=tuple(len(group) for group in groups),
            loss=short(mean),
            n_tokens=self.n_tokens() - before,
        )

    def _evaluate(self, task: Task, theta: NDArray[np.float32]) -> EvaluateResult | None:
        before = self.n_tokens()
        rows = [i for i, example in enumerate(self.held_out) if example is not None]
        if not rows:  # all were too long
            return None
        self._load(self._loaded[0], watched=True)
        self.oracle.write(theta)
        loss = float(self.oracle.losses(rows).mean())
        return EvaluateResult(theta_digest=task.theta_digest, loss=short(loss), n_examples=len(rows), n_tokens=self.n_tokens() - before)

    def _load(self, batch: int | None, *, watched: bool = False) -> list[Encoded | None]:
        """Have a batch loaded, and with `watched` the held-out examples, which then stay; returns the batch's rows."""
        rows = [] if batch is None else self.batches.batch(batch)[0]
        watched = watched or self._loaded[1]
        if self._loaded != (batch, watched):
            self._loaded = (None, False)  # should loading fail
            self.oracle.load([*(self.held_out if watched else [None] * len(self.held_out)), *rows])
            self._loaded = (batch, watched)
        return rows


def spread(n: int, at_once: int) -> list[int]:
    """Range(n) in an order in which neighbours, `at_once` of them, lie far apart.

    The rows of a batch are sorted by the length of their answers; a round whose tasks all took neighbouring groups would see short answers only,
    the next one long ones, and losses that differ twofold.

    >>> spread(10, 2)
    [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    """
    stride = -(-n // at_once)
    return [i for first in range(stride) for i in range(first, n, stride)]


def _advanced(place: Place, n_used: int, n_groups: int) -> Place:
    """Where the next task goes on.

    >>> _advanced(Place(3, 8), 2, 10)
    Place(batch=4, group=0)
    """
    group = place.group + n_used
    return Place(place.batch + 1, group - n_groups) if group >= n_groups else Place(place.batch, group)


def short(loss: float) -> float:
    """A loss in seven digits, which JSON then writes with as many.

    >>> short(2.3456789012345)
    2.345679
    """
    return float(f"{np.float32(loss):.7g}")


def quadratic_worker(spec: RunSpec, *, seed: int, n_examples: int = 24, spread: float = 0.5) -> OracleWorker:
    """A simulated device: a quadratic loss whose centres are around a place of the device's own, so that devices differ.

    The places of all lie around one that is DISTANCE from where a run starts, `spread` times as far from it as that is from the start.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    unit = DISTANCE / np.sqrt(spec.n_params)
    own = unit * (1.0 + spread * random.standard_normal(spec.n_params))
    centres = own + 0.1 * unit * random.standard_normal((n_examples, spec.n_params))
    examples = [Encoded(str(i), (i,), (0,), (0,), unit=i) for i in range(n_examples)]
    n_held_out = max(1, n_examples // 8)
    units = [(example,) for example in examples[n_held_out:]]
    batch = spec.train.batch
    n_slots = min(len(units), batch.units * batch.per_unit)
    batches = RollingBatches(units, unit_size=1, n_slots=n_slots, fresh=min(n_slots, batch.fresh), seed=seed)
    oracle = QuadraticOracle(centres, np.ones(spec.n_params))
    return OracleWorker(spec, oracle, batches, examples[:n_held_out], np.zeros(spec.n_params, np.float32))
