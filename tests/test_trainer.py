"""Training lowers the loss, tests its steps, keeps the best, and ends when and how it was told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.batches import RollingBatches
from fwdllama.checkpoint import RunDirectory, State, read_metrics
from fwdllama.config import HALF_LIFE, LR, TrainConfig, make_config
from fwdllama.direction import direction
from fwdllama.errors import EngineError
from fwdllama.ledger import read_ledger
from fwdllama.oracle import Losses, QuadraticOracle
from fwdllama.progress import Clock, Progress
from fwdllama.trainer import CLEARLY_WORSE, Trainer
from fwdllama.types import Encoded

N_PARAMS = 24
EPS = 0.05
RNG = np.random.default_rng(1)
CENTRES = 1.0 + 0.3 * RNG.standard_normal((28, N_PARAMS))  # of 24 training examples and 4 that are held out
CURVATURE = RNG.uniform(0.5, 2.0, N_PARAMS)
UNITS = [tuple(Encoded(f"{u}-{i}", (2 * u + i,), (1,), (2,)) for i in range(2)) for u in range(12)]
HELD_OUT: list[Encoded | None] = [Encoded("h", (24 + i,), (1,), (2,)) for i in range(4)]
HELD_OUT.insert(1, None)
N_PROBES = [16, 12, 16, 12]  # of a step: four rounds of six rows in pairs, whose borders move
INITIAL = np.zeros(N_PARAMS, np.float32)


class CrashError(Exception):
    """The process ends here."""


@dataclass
class Oracle(QuadraticOracle):
    """The quadratic one, ending the process at call number `crash_at`, with a say on every loss."""

    crash_at: int | None = None
    judge: Callable[[Losses, NDArray[np.float64]], Losses] = lambda losses, theta: losses
    n_calls: int = 0

    def __post_init__(self) -> None:
        super().__init__(CENTRES, CURVATURE)

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        self.n_calls += 1
        if self.n_calls == self.crash_at:
            raise CrashError
        return self.judge(super().losses(rows, n_targets=n_targets), self.theta)


def config(**sections: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "estimator": {"rounds": 4, "first_rounds": 0, "examples_per_probe": 2, "outlier": 100.0, "example_clip": 100.0},
        "step": {"lr": 1.0, "half_life": 10**9, "accept": True, "warmup": False},
        "pacing": {"tau": 0.8, "max_rounds": 8},
        "batch": {"units": 3, "per_unit": 2, "fresh": 1, "evaluate_every": 2},
        "budget": {"steps": 4},
    }
    return make_config({"seed": 5, **usual, **{key: {**usual[key], **value} for key, value in sections.items()}})


def trainer(path: Path, settings: TrainConfig, oracle: Oracle | None = None, **more: Any) -> Trainer:
    """What a process makes of the run directory `path`, new or not."""
    if path.exists():
        run = RunDirectory.open(path)
    else:
        run = RunDirectory.create(path, settings.model_dump_json(), {"identity": {}}, b"adapter")
        run.save(replace(run.state, eps=EPS))
    batches = RollingBatches(UNITS, unit_size=2, n_slots=3, fresh=1, seed=settings.seed)
    held_out = more.pop("held_out", HELD_OUT)
    return Trainer(settings, oracle or Oracle(), batches, held_out, run, run.theta(INITIAL), **more)


def trained(path: Path, settings: TrainConfig, oracle: Oracle | None = None, **more: Any) -> State:
    """The state after one process, which leaves the directory whether it ends well or not."""
    process = trainer(path, settings, oracle, **more)
    try:
        state = process.run()
        assert np.array_equal(process.theta, process.directory.theta(INITIAL))
        return state
    finally:
        process.directory.close()


def excess(theta: NDArray[np.float32]) -> float:
    """Held-out loss above the least possible, at theta."""
    oracle = Oracle()
    oracle.load(HELD_OUT)
    oracle.write(theta)
    mean = oracle.losses().mean()
    oracle.write(CENTRES[24:].mean(axis=0).astype(np.float32))
    return float(mean - oracle.losses().mean())


METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "two-sided": {"estimator": {"sided": "two"}},
    "variance": {"pacing": {"kind": "variance"}},
    "aligned": {"step": {"candidates": 3}},
    "all three": {"estimator": {"sided": "two"}, "pacing": {"kind": "variance"}, "step": {"candidates": 2}},
    "untested steps": {"step": {"accept": False}},
    "long steps": {"step": {"lr": 6.0}},
    "first tokens": {"estimator": {"first_rounds": 6}},
    "warm-up": {"step": {"warmup": True}},
}


@pytest.mark.parametrize("method", ["default", "two-sided", "variance", "aligned", "warm-up"])
def test_the_held_out_loss_falls(tmp_path: Path, method: str) -> None:
    state = trained(tmp_path / "run", config(**METHODS[method], budget={"steps": 12}))
    with RunDirectory.open(tmp_path / "run") as run:
        assert excess(run.theta(INITIAL, state.best_step)) < 0.2 * excess(INITIAL)
    assert state.best_step > 6


def test_a_warm_up_has_few_probes_a_step_each_longer_and_one_batch(tmp_path: Path) -> None:
    settings = config(
        estimator={"rounds": 3, "first_rounds": 4, "examples_per_probe": 1}, step={"warmup": True, "lr": 0.01, "final_lr": 1.0}, budget={"steps": 6}
    )
    assert settings.warmup == (1, 1, 2, 2)
    seen: list[list[str]] = []

    class Watched(Oracle):
        def load(self, examples: Sequence[Encoded | None]) -> None:
            super().load(examples)
            seen.append([example.id for example in examples if example is not None])

    trained(tmp_path / "run", settings, Watched(), held_out=[])
    rows = read_metrics(tmp_path / "run")
    assert [row["n_probes"] for row in rows] == [6 * (1 + 2), 6 * (1 + 2), 6 * (2 + 3), 6 * (2 + 3), 6 * (3 + 4), 6 * (3 + 4)]
    assert [row["n_probes_first"] for row in rows] == [12, 12, 18, 18, 24, 24]
    scale = 1.0  # by what earlier steps were shortened
    for row, longer in zip(rows, (*[0.7 * 3**0.75] * 2, *[0.7 * 1.5**0.75] * 2, 1, 1), strict=True):
        assert row["lr"] == pytest.approx(0.01 * longer * scale)
        scale = scale * 0.5 if row["step_factor"] < 1 else min(1.0, scale * 1.25)
    assert seen[0] == seen[1] == seen[4] != seen[5]


@pytest.mark.parametrize(("lr", "least"), [(1e3, 0.0), (3.0, 0.25)])
def test_a_warm_up_step_that_raises_the_batchs_losses_is_shortened_or_left_out(tmp_path: Path, lr: float, least: float) -> None:
    settings = config(estimator={"rounds": 8}, step={"warmup": True, "lr": lr, "accept": False}, budget={"steps": 6})
    trained(tmp_path / "run", settings)
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert all(after <= before for before, after in pairwise(losses))
    factors = {row["step_factor"] for row in rows}
    assert factors <= {0.0, 0.25, 0.5, 1.0}
    assert min(factors) == least
    for before, row in pairwise(rows):
        assert (row["loss"] == before["loss"]) == (before["step_factor"] == 0)


def test_there_is_no_warm_up_where_steps_are_short_already_or_wait_for_a_gate() -> None:
    assert config(estimator={"rounds": 1}, step={"warmup": True}).warmup == ()
    assert config(step={"warmup": True}, pacing={"kind": "variance"}).warmup == ()
    assert config(estimator={"rounds": 8}, step={"warmup": True}).warmup == (1, 1, 2, 2, 4, 4)


def test_a_run_ends_when_its_steps_are_done(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", config())
    assert (state.step, state.n_probes, state.finished) == (4, sum(N_PROBES), "the budget is used up")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert trained(tmp_path / "run", config()) == state
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_ends_with_the_step_that_uses_up_its_probes_and_judges_it(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", config(budget={"steps": None, "probes": 30}))
    assert (state.step, state.n_probes, state.finished) == (3, sum(N_PROBES[:3]), "the budget is used up")
    assert [row["held_out_loss"] is None for row in read_metrics(tmp_path / "run")] == [True, False, False]


def test_seconds_are_those_of_all_processes_together(tmp_path: Path) -> None:
    settings = config(budget={"steps": None, "seconds": 10.0})
    for stop_at, steps in ((45, 2), (10**6, 5)):
        oracle, calls = Oracle(), count()
        clock = Clock(now=lambda oracle=oracle: 1000.0 + oracle.n_calls / 8)  # a step of about 15 calls takes 2 seconds
        state = trained(tmp_path / "run", settings, oracle, clock=clock, stop=lambda c=calls, n=stop_at: next(c) > n)
        assert abs(state.step - steps) <= 1
        assert (state.finished is None) == (stop_at < 10**6)
    rows = read_metrics(tmp_path / "run")
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)
    assert elapsed[-2] < 10 <= elapsed[-1] <= state.elapsed_s < 13
    assert rows[-1]["held_out_loss"] is not None


def test_a_run_ends_when_patience_does(tmp_path: Path) -> None:
    """The held-out examples want the opposite of what is trained."""
    bad: list[Encoded | None] = [Encoded("bad", (0,), (1,), (2,))]
    oracle = Oracle()
    oracle.centres = np.vstack([-CENTRES[:1], CENTRES[1:]])
    state = trained(tmp_path / "run", config(budget={"steps": 40, "patience": 2}, step={"accept": False}), oracle, held_out=bad)
    assert state.finished == "the held-out loss has not fallen for 2 evaluations"
    assert (state.step, state.best_step, state.evaluations_since_best) == (4, 0, 2)


def test_the_best_of_all_held_out_losses_is_kept_with_its_step(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", config(budget={"steps": 11}, step={"lr": 9.0, "accept": False}))
    found = {row["step"] + 1: row["held_out_loss"] for row in read_metrics(tmp_path / "run") if row["held_out_loss"]}
    assert list(found) == [2, 4, 6, 8, 10, 11]
    oracle = Oracle()
    oracle.load(HELD_OUT)
    with RunDirectory.open(tmp_path / "run") as run:
        for step, loss in found.items():
            oracle.write(run.theta(INITIAL, step))
            assert float(oracle.losses().mean()) == loss
    oracle.write(INITIAL)
    found[0] = float(oracle.losses().mean())
    assert state.best_loss == min(found.values())
    assert found[state.best_step] == state.best_loss
    assert state.evaluations_since_best == sum(step > state.best_step for step in found)


def test_without_held_out_examples_nothing_is_judged(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", config(), held_out=[])
    assert (state.best_loss, state.best_step, state.evaluations_since_best, state.step) == (None, 0, 0, 4)
    assert {row["held_out_loss"] for row in read_metrics(tmp_path / "run")} == {None}


def test_a_rejected_step_leaves_theta_and_halves_the_rate_of_the_next(tmp_path: Path) -> None:
    settings = config(step={"lr": 3e3, "final_lr": 1.0}, budget={"steps": 6})
    trained(tmp_path / "run", settings)
    rows = read_metrics(tmp_path / "run")
    assert [row["accepted"] for row in rows] == [False] * 6
    assert [rows[1]["lr"], 4 * rows[3]["lr"]] == pytest.approx([2 * rows[2]["lr"]] * 2)
    with RunDirectory.open(tmp_path / "run") as run:
        assert np.array_equal(run.theta(INITIAL), INITIAL)
        assert not np.concatenate([e.coefficients for e in read_ledger(tmp_path / "run" / "ledger.bin")]).any()
        assert run.state.lr_scale == pytest.approx(rows[5]["lr"] / rows[1]["lr"] / 2)


def test_a_step_is_kept_halved_or_rejected_by_the_examples_that_are_new_in_the_next_batch(tmp_path: Path) -> None:
    settings = config(step={"lr": 100.0, "final_lr": 1.0}, budget={"steps": 24})
    trained(tmp_path / "run", settings)
    rows, oracle = read_metrics(tmp_path / "run"), Oracle()
    batches = RollingBatches(UNITS, unit_size=2, n_slots=3, fresh=1, seed=5)
    assert {row["step_factor"] for row in rows[1:]} == {0.0, 0.5, 1.0}
    with RunDirectory.open(tmp_path / "run") as run:
        for row in rows[1:]:
            loaded, new = batches.batch(row["step"] + 1)
            oracle.load(loaded)
            before, after = (run.theta(INITIAL, row["step"] + i).astype(np.float64) for i in (0, 1))
            update = (after - before) / (row["step_factor"] or 1.0)

            def change(factor: float) -> Losses:
                losses = []
                for theta in (before + factor * update, before):  # noqa: B023
                    oracle.write(theta.astype(np.float32))
                    losses.append(oracle.losses(new))  # noqa: B023
                return losses[0] - losses[1]

            too_long = change(1.0).mean() > CLEARLY_WORSE * change(1.0).std() / np.sqrt(len(new))
            assert too_long == (row["step_factor"] == 0.5)
            assert row["step_factor"] != 0.5 or change(0.5).mean() < 0
            assert row["step_factor"] != 0.0 or np.array_equal(before, after)
    scales = [row["lr"] / rows[0]["lr"] for row in rows]
    for row, now, then in zip(rows[1:], scales[1:], scales[2:], strict=False):
        assert then == pytest.approx(now / 2 if row["step_factor"] < 1 else min(1.0, now * 1.25))


def test_the_rate_falls_to_its_last_fraction(tmp_path: Path) -> None:
    settings = config(step={"lr": 0.5, "final_lr": 0.2, "accept": False}, budget={"steps": 5})
    trained(tmp_path / "run", settings)
    assert [row["lr"] for row in read_metrics(tmp_path / "run")] == pytest.approx([0.5, 0.42, 0.34, 0.26, 0.18])


def lost(losses: Losses, theta: NDArray[np.float64]) -> Losses:
    """No loss at about a third of all points that are not in the middle between others."""
    bits = np.frombuffer(theta.astype(np.float32).tobytes(), np.uint32)
    return losses * np.nan if bits.any() and int(bits.sum()) % 3 == 0 else losses


def test_probes_without_a_loss_are_dropped_from_their_step(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", config(budget={"steps": 1}, step={"accept": False}), Oracle(judge=lost), held_out=[])
    entry = read_ledger(tmp_path / "run" / "ledger.bin")[0]
    assert 0 < np.count_nonzero(entry.coefficients == 0) < len(entry.coefficients) == state.n_probes
    assert np.isfinite(entry.coefficients).all()
    with RunDirectory.open(tmp_path / "run") as run:
        assert excess(run.theta(INITIAL)) < excess(INITIAL)


@pytest.mark.parametrize("example_clip", [0.5, 1.0, 1000.0])
def test_an_example_far_off_counts_no_more_than_others(tmp_path: Path, example_clip: float) -> None:
    oracle = Oracle()
    oracle.centres = oracle.centres * np.where(np.arange(28) % 6 == 1, 50.0, 1.0)[:, None]
    settings = config(estimator={"examples_per_probe": 1, "rounds": 8, "example_clip": example_clip}, step={"accept": False}, budget={"steps": 1})
    trained(tmp_path / "run", settings, oracle)
    entry = read_ledger(tmp_path / "run" / "ledger.bin")[0]
    sizes = np.sqrt(np.square(entry.coefficients.reshape(8, 6)).mean(axis=0))  # of each of the batch's six examples
    assert (sizes.max() > 1.05 * np.median(sizes)) == (example_clip > 1.0)


def test_first_tokens_are_divided_by_their_own_curvature_and_follow_whole_answers_in_the_ledger(tmp_path: Path) -> None:
    """That of this oracle is the first parameter's loss, which has a 24th of the slopes and is 0 at about 1."""
    settings = {"step": {"accept": False, "lr": 0.01}, "budget": {"steps": 2}}
    trained(tmp_path / "plain", config(**settings), held_out=[])
    trained(tmp_path / "run", config(**settings, estimator={"first_rounds": 6}), held_out=[])
    entry, whole = (read_ledger(tmp_path / name / "ledger.bin")[0] for name in ("run", "plain"))
    n = len(whole.seeds)
    assert entry.seeds[:n].tolist() == whole.seeds.tolist()
    assert (entry.coefficients[:n] / whole.coefficients).std() < 1e-6  # the same but for the factor of the first step
    assert len(entry.seeds) == n * 10 // 4 == len(set(entry.seeds.tolist()))
    signs = np.array([direction(int(seed), N_PARAMS)[0] for seed in entry.seeds[n:]])
    assert (entry.coefficients[n:] * signs).sum() < 0  # what is subtracted
    row = read_metrics(tmp_path / "run")[0]
    assert (row["n_probes"], row["n_probes_gate"], row["n_probes_first"]) == (len(entry.seeds), n, len(entry.seeds) - n)
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.state.first_mean_square is not None
        assert run.state.first_mean_square < (run.state.mean_square or 0.0)


def test_a_step_of_probes_without_any_loss_leaves_theta(tmp_path: Path) -> None:
    oracle = Oracle(judge=lambda losses, theta: losses * np.nan if theta.any() else losses)
    trained(tmp_path / "run", config(), oracle)
    with RunDirectory.open(tmp_path / "run") as run:
        assert (run.state.step, run.theta(INITIAL).tolist()) == (4, INITIAL.tolist())


def test_the_rate_is_half_after_the_probes_of_its_half_life(tmp_path: Path) -> None:
    trained(tmp_path / "run", config(step={"half_life": N_PROBES[0], "final_lr": 1.0, "accept": False}))
    rows = read_metrics(tmp_path / "run")
    taken = np.cumsum([0, *(row["n_probes"] for row in rows)])[:-1]
    assert [row["lr"] for row in rows] == pytest.approx(1 / (1 + taken / N_PROBES[0]))
    assert rows[1]["lr"] == 0.5


def test_a_rate_that_is_left_open_follows_from_the_probes_taken(tmp_path: Path) -> None:
    trained(tmp_path / "run", config(step={"lr": None, "half_life": None, "accept": False, "final_lr": 1.0}))
    rows = read_metrics(tmp_path / "run")
    assert [row["lr"] for row in rows[:2]] == pytest.approx([LR, LR / (1 + rows[0]["n_probes"] / HALF_LIFE)])


def test_a_model_that_has_lost_its_loss_ends_in_a_sentence_and_what_was_done_is_safe(tmp_path: Path) -> None:
    away = Oracle(judge=lambda losses, theta: losses * np.nan if np.linalg.norm(theta) > 1.5 else losses)
    with pytest.raises(EngineError, match=r"^step \d+: the model's loss is not a number; lower --lr or check the model\.$"):
        trained(tmp_path / "run", config(step={"accept": False}), away, held_out=[])
    with pytest.raises(EngineError, match=r"^step \d+: the held-out loss is not a number; lower --lr or check the model\.$"):
        trained(tmp_path / "watched", config(step={"accept": False}, batch={"evaluate_every": 1}), away)
    for path in (tmp_path / "run", tmp_path / "watched"):
        assert len(read_ledger(path / "ledger.bin")) < 4
        assert trained(path, config(step={"accept": False})).step == 4


def test_progress_is_shown_in_order_and_a_step_only_when_it_is_on_disk(tmp_path: Path) -> None:
    shown: list[Progress] = []

    def show(progress: Progress) -> None:
        shown.append(progress)
        if progress.metrics is not None:
            assert read_metrics(tmp_path / "run")[-1] == progress.metrics

    oracle = Oracle()
    clock = Clock(
        now=lambda: oracle.n_calls / 2,
        decode_s=lambda: oracle.n_calls / 4,
        n_tokens=lambda: 10 * oracle.n_calls,
        peak_memory_bytes=lambda: 77,
    )
    state = trained(tmp_path / "run", config(), oracle, on_progress=show, clock=clock)
    assert [(p.state.step, p.step_probes) for p in shown if p.metrics is None] == [
        (step, probe) for step, n in enumerate(N_PROBES) for probe in range(1, n + 1)
    ]
    assert [p.state.step for p in shown if p.metrics is not None] == [1, 2, 3, 4]
    fractions = [p.fraction for p in shown]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1], [p.step_wanted for p in shown if p.metrics]) == (0.0, 1.0, N_PROBES)
    row = read_metrics(tmp_path / "run")[-1]
    assert (row["tokens_per_s"], row["decode_fraction"], row["peak_memory_bytes"]) == (20.0, 0.5, 77)
    assert state.decode_s == pytest.approx(state.elapsed_s / 2)


def test_rests_are_no_time_of_training_and_change_nothing_that_is_learned(tmp_path: Path) -> None:
    """Every probe is followed by a rest of a minute."""
    left: list[Any] = []
    for name, rest_s in (("busy", 0.0), ("resting", 60.0)):
        oracle, rested = Oracle(), [0.0]

        def rest(rested: list[float] = rested, rest_s: float = rest_s) -> None:
            rested[0] += rest_s

        clock = Clock(now=lambda oracle=oracle, rested=rested: oracle.n_calls / 8 + rested[0], n_tokens=lambda oracle=oracle: oracle.n_calls)
        state = trained(tmp_path / name, config(budget={"steps": None, "seconds": 10.0}), oracle, clock=clock, rest=rest)
        ledger = (tmp_path / name / "ledger.bin").read_bytes()
        left.append((ledger, state.elapsed_s, [row["tokens_per_s"] for row in read_metrics(tmp_path / name)]))
    assert rested[0] > 600
    assert left[0][0] == left[1][0]
    assert left[0][1] == pytest.approx(left[1][1])
    assert left[0][2] == pytest.approx(left[1][2], rel=1e-2)


def test_a_stop_during_a_rest_loses_the_step_in_progress_only(tmp_path: Path) -> None:
    rests = count()
    stopped = [False]

    def rest() -> None:
        stopped[0] = next(rests) == N_PROBES[0] + 5  # in the second step; two steps begin with one too

    unbroken = trained(tmp_path / "unbroken", config())
    state = trained(tmp_path / "run", config(), rest=rest, stop=lambda: stopped[0])
    assert (state.step, state.finished) == (1, None)
    assert trained(tmp_path / "run", config()).ledger == unbroken.ledger
