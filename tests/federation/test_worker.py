"""A task's result is what the estimator computes from it, uses all of a device's data in turn, and is short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fwdllama.estimator import evaluate
from fwdllama.federation.client import _body
from fwdllama.federation.message import Delivery, EvaluateResult, Task, TrainResult, theta_digest
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.worker import OracleWorker, Place, Worker, quadratic_worker, short
from fwdllama.loss import bounded
from tests.federation.made import spec

SEEDS = tuple(range(1000, 1020))
THETA = np.linspace(-1, 1, 40).astype(np.float32)


def task(kind: Any = "train", seeds: tuple[int, ...] = SEEDS) -> Task:
    return Task(task="t1", run="r1", kind=kind, version=3, theta_digest=theta_digest(THETA), seeds=seeds if kind == "train" else (), lease_s=60)


def made(**estimator: Any) -> tuple[OracleWorker, RunSpec]:
    given = spec(train={"estimator": estimator, "batch": {"units": 4, "per_unit": 3, "fresh": 2}})
    return quadratic_worker(given, seed=5), given


def worked(worker: Worker, given: Task | None = None) -> TrainResult:
    result = worker.work(given or task(), THETA, lambda n_done: True)
    assert isinstance(result, TrainResult)
    return result


@pytest.mark.parametrize("sided", ["one", "two"])
def test_losses_are_those_of_the_estimator_on_the_groups_in_turn(sided: str) -> None:
    worker, given = made(sided=sided, rounds=8, examples_per_probe=4)
    result = worked(worker)
    # Once more, by hand: 12 examples behind 3 held-out ones, which shift the borders to groups of 1, 4, 4 and 3; 20 seeds use two of them.
    rows = worker.batches.batch(0)[0]
    worker.oracle.load(rows)
    worker.oracle.write(THETA)
    losses = worker.oracle.losses(range(len(rows)))
    groups = [(0,), (5, 6, 7, 8)]  # every other one
    limit = given.train.estimator.outlier * losses[[0, 5, 6, 7, 8]].mean()
    plan = [(seed, i % 2) for i, seed in enumerate(SEEDS)]
    probes = list(evaluate(worker.oracle, THETA, plan, groups, losses if sided == "one" else None, given.eps, limit))
    assert result.examples == (1, 4)
    assert result.plus == tuple(short(p.loss_plus) for p in probes)
    if sided == "two":
        assert result.minus == tuple(short(p.loss_minus) for p in probes)
    else:
        assert result.minus == tuple(short(float(bounded(losses[list(group)], limit).mean())) for group in groups)
    assert result.loss == short(float(losses[[0, 5, 6, 7, 8]].mean()))
    assert result.theta_digest == theta_digest(THETA)


def test_every_group_of_a_batch_is_used_before_the_next_and_all_data_in_the_end() -> None:
    worker, _ = made(rounds=8, examples_per_probe=4)
    used: set[int] = set()
    places = []
    original = worker.oracle.losses

    def seen(rows: Any = None, **how: Any) -> Any:
        batch = worker.batches.batch(worker.place.batch)[0]
        for row in rows:
            example = batch[row - len(worker.held_out)]
            assert example is not None
            used.add(example.prompt[0])
        return original(rows, **how)

    worker.oracle.losses = seen  # type: ignore[method-assign]
    for _ in range(12):
        places.append((worker.place.batch, worker.place.group))
        worked(worker)
    assert places[:4] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert used == set(range(3, 24))  # all but the held-out ones


def test_few_seeds_use_one_group_and_many_use_all() -> None:
    worker, _ = made(rounds=8, examples_per_probe=4)
    assert len(worked(worker, task(seeds=(1, 2, 3))).examples) == 1
    worker.place = Place()
    assert len(worked(worker, task(seeds=tuple(range(100)))).examples) == 4


def test_a_task_that_is_left_gives_nothing_and_begins_again_where_it_began() -> None:
    worker, _ = made()
    asked: list[int] = []

    def proceed(n_done: int) -> bool:
        asked.append(n_done)
        return n_done < 3

    assert worker.work(task(), THETA, proceed) is None
    assert asked == [1, 2, 3]
    assert worker.place == Place()
    assert worked(worker).plus == worked(made()[0]).plus


def test_a_task_whose_last_probe_is_done_is_not_left() -> None:
    worker, _ = made()
    assert worker.work(task(), THETA, lambda n_done: n_done < len(SEEDS)) is not None


def test_evaluation_is_the_mean_loss_of_the_held_out_examples_and_does_not_disturb_training() -> None:
    worker, _ = made()
    first = worker.work(task("evaluate"), THETA, lambda n_done: True)
    assert isinstance(first, EvaluateResult)
    assert first.n_examples == 3
    worker.oracle.load(worker.held_out)
    worker.oracle.write(THETA)
    assert first.loss == short(float(worker.oracle.losses(range(3)).mean()))
    fresh, _ = made()
    assert worked(fresh) == worked(made()[0])
    fresh.work(task("evaluate"), THETA, lambda n_done: True)
    other, _ = made()
    worked(other)
    assert worked(fresh) == worked(other)


def test_devices_have_data_of_their_own_and_the_same_seed_gives_the_same_device() -> None:
    results = [worked(quadratic_worker(spec(), seed=seed)) for seed in (1, 1, 2)]
    assert results[0] == results[1]
    assert results[0].plus != results[2].plus


@pytest.mark.parametrize(("sided", "most"), [("one", 32), ("two", 32)])
def test_a_result_costs_at_most_32_bytes_a_probe(sided: str, most: int) -> None:
    worker, _ = made(sided=sided)
    assert len(_body(Delivery(result=worked(worker)))) / len(SEEDS) <= most


@pytest.mark.parametrize("loss", [0.0, 1e-7, 2.3456789, 12.5, 49.999996, float("inf")])
def test_short_losses_keep_seven_digits(loss: float) -> None:
    assert short(loss) == pytest.approx(loss, rel=1e-6)
    assert len(repr(short(loss))) <= 9


def test_device_whose_held_out_examples_are_all_too_long_says_that_it_has_none() -> None:
    worker, _ = made()
    worker.held_out = [None] * len(worker.held_out)
    found = worker.work(task("evaluate"), THETA, lambda n_done: True)
    assert isinstance(found, EvaluateResult)
    assert found.n_examples == 0
