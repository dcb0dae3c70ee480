"""The race with back-propagation: who needs how long to a loss, from the same start."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from statistics import fmean

import pytest
from fwdllama_eval.bench import backprop_race, directions
from fwdllama_eval.bench.curve import Curve, Point
from fwdllama_eval.bench.measure import Bar, Bench

from fwdllama.answering import answer_dataset, open_engine
from fwdllama.checkpoint import read_metrics
from fwdllama.tasks.load import load_dataset
from fwdllama.tasks.template import seed_template
from gguf_tools.adapter import read_adapter

from .conftest import values


def curve(*points: tuple[float, float]) -> Curve:
    return [Point(*point) for point in points]


def test_race_compares_with_the_best_rate_at_each_loss() -> None:
    forward = curve((0.0, 4.0), (60.0, 1.5), (90.0, 1.3), (200.0, 1.25))
    slow, fast = curve((0.0, 4.0), (100.0, 1.3)), curve((0.0, 4.0), (20.0, 1.5), (60.0, 1.31))
    wild = curve((0.0, 4.0), (10.0, 1.59), (20.0, 9.0))
    found = backprop_race.figures_of(forward, {1e-3: slow, 3e-3: fast, 1e-2: wild}, {1e-3: slow})
    assert found["ratio"] == pytest.approx(90 / 60)
    assert found["best_rate"] == 3e-3
    assert found["backprop_s"]["1.6"] == 10.0
    assert found["forward_s"]["1.2"] is None
    assert found["ratios"]["1.1"] is None
    assert found["ratio_ab"] == pytest.approx(0.9)
    assert Bar("ratio", "<=", 1.5).met(found)


def test_race_without_a_winner_meets_no_bar() -> None:
    found = backprop_race.figures_of(curve((0.0, 4.0), (9.0, 2.0)), {1e-3: curve((0.0, 4.0), (5.0, 1.0))}, {1e-3: curve((0.0, 4.0))})
    assert found["ratio"] is None
    assert not Bar("ratio", "<=", 1.5).met(found)


@pytest.fixture
def raced(bench: Bench) -> tuple[Curve, backprop_race.Job]:
    folder = bench.fresh("run")
    directions.watched(values(2), bench.model, bench.train_data, folder)
    curve, job, train = backprop_race.replayed_run(folder / "run", bench.dev_data, 6)
    assert train == "b"
    return curve, job


def test_replayed_losses_are_those_that_scoring_the_adapter_finds(
    bench: Bench, raced: tuple[Curve, backprop_race.Job]
) -> None:
    curve, job = raced
    assert [len(curve), len(job.questions), job.n_threads] == [3, 6, 1]
    # Each step is of the warm-up: the batch of 4 x 2 at theta, each of it in a round of probes and five of its first token, and trials that failed.
    factors = [row["step_factor"] for row in read_metrics(bench.work / "run" / "run")]
    assert any(factors)
    assert len({point.loss for point in curve}) == 1 + sum(factor > 0 for factor in factors)
    assert [point.passes for point in curve] == [0, *accumulate(56 + 8 * {1.0: 0, 0.5: 1, 0.25: 2, 0.0: 3}[factor] for factor in factors)]
    adapter = bench.work / "run" / "adapter.gguf"
    best = int(read_adapter(adapter).metadata["fwdllama.run.step"])
    with open_engine(job.model, adapter_path=adapter, n_threads=1) as engine:
        losses = answer_dataset(engine, load_dataset(bench.dev_data), seed_template("squad"), max_new_tokens=1).losses
    assert fmean(losses[question.id] for question in job.questions) == pytest.approx(curve[best][1], abs=1e-4)


def test_both_sides_of_the_race_start_from_the_same_loss_and_backprop_lowers_it(
    raced: tuple[Curve, backprop_race.Job],
) -> None:
    pytest.importorskip("torch")
    curve, job = raced
    learned = backprop_race.adamw(replace(job, pool=job.questions), "b", 1e-2, 0.2)
    assert learned[0][1] == pytest.approx(curve[0][1], abs=1e-3)
    assert learned[-1][1] < learned[0][1] - 0.01
    assert 0.0 < learned[1][0] <= learned[-1][0]
