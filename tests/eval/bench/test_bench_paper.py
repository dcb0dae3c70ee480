"""The rows of the paper's table: both ways of back-propagation learn the same questions and leave an adapter, and rows say what was reached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fwdllama_eval.bench import backprop_ggml, backprop_race, directions, paper
from fwdllama_eval.bench.backprop_race import Job
from fwdllama_eval.bench.curve import Point, reached
from fwdllama_eval.bench.measure import Bench

from fwdllama.errors import EngineError
from gguf_tools.adapter import read_adapter

from .conftest import values


@pytest.fixture
def job(bench: Bench) -> Job:
    """A run of one small step in scope `all`, and the questions of its race."""
    folder = bench.fresh("run")
    directions.watched({**values(1), "space": {"scope": "all"}}, bench.model, bench.train_data, folder)
    curve, found, _ = backprop_race.replayed_run(folder / "run", bench.dev_data, 4)
    assert curve[1].loss != curve[0].loss
    assert found.scope == "all"
    return replace(found, pool=found.questions)


def test_llama_cpp_s_optimiser_lowers_the_loss_and_its_adapter_is_what_it_learned(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    curve = paper.ggml_curve(job, 0.3, out)
    assert curve[0].passes == 0
    assert curve[-1].passes > 0
    assert curve[-1].loss < curve[0].loss - 0.01
    initial, learned = read_adapter(job.initial), read_adapter(out)
    for name, (a, b) in learned.tensors.items():
        assert np.array_equal(a, initial.tensors[name][0])
        assert np.abs(b).max() > 0


def test_torch_starts_from_the_same_loss_in_scope_all_and_writes_what_it_learned(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "adapter.gguf"
    curve = backprop_race.adamw(job, "b", 1e-2, 0.3, floor=0.0, n_points=3, out=out)
    assert 2 <= len(curve) <= 4
    assert curve[0].loss == pytest.approx(paper.ggml_curve(job, 0.01, None)[0].loss, abs=2e-3)
    assert curve[-1].loss < curve[0].loss - 0.01
    assert all(np.abs(b).max() > 0 for _, b in read_adapter(out).tensors.values())


def test_first_step_of_adamw_moves_every_number_by_the_rate(job: Job) -> None:
    data = backprop_ggml.windows(job.pool, 256)
    with backprop_ggml.Optimiser(job.model, job.initial, 256, 3e-3, 1) as optimiser:
        optimiser.step(data[0])
        moved = np.concatenate([b.ravel() for b in optimiser.values().values()])
    assert np.median(np.abs(moved)) == pytest.approx(3e-3, rel=0.01)


def test_windows_that_llama_cpp_would_lengthen_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(EngineError, match=r"windows of 64 tokens are not what llama\.cpp makes of them; take a multiple of 256\."):
        backprop_ggml.Optimiser(Path("absent"), Path("absent"), 64, 3e-3, 1)


def test_rows_tell_where_each_loss_was_reached_first() -> None:
    curve = [Point(0.0, 4.0), Point(10.0, 1.5, 100), Point(20.0, 1.7, 200), Point(30.0, 1.05, 300)]
    row = paper.row_of(curve, 5, {"f1": 1.0, "exact_match": 2.0, "loss": 3.0})
    assert row["seconds_to"] == {"1.6": 10.0, "1.32": 30.0, "1.1": 30.0}
    assert row["passes_to"] == {"1.6": 100, "1.32": 300, "1.1": 300}
    assert (row["best_loss"], row["passes"], row["memory_bytes"]) == (1.05, 300, 5)
    assert reached(curve, 1.0) is None
    assert paper.row_of(curve[:3], 5, {"f1": 1.0, "exact_match": 2.0})["seconds_to"] == {"1.6": 10.0, "1.32": None, "1.1": None}
    rows = {"forward-only, answer": row, "torch, answer": {**row, "memory_bytes": 10, "seconds_to": {"1.1": 15.0}}}
    assert paper.headline(rows)["memory_ratio"] == 0.5
    assert paper.headline(rows)["time_ratio"] == 2.0
