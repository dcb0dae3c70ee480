"""A device with a real model file computes what training computes, from the run's A and its own data, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllama.batches import grouped
from fwdllama.config import BudgetConfig
from fwdllama.errors import AdapterError, DataError, FederationError
from fwdllama.estimator import evaluate
from fwdllama.federation.message import EvaluateResult, Task, TrainResult, theta_digest
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.work import Workplace
from fwdllama.federation.worker import short
from fwdllama.hooks import Hooks
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.material import Source
from fwdllama.session import opened
from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.errors import FileError
from gguf_tools.model import file_sha256
from gguf_tools.synth import write_tiny_llama

ENGINE = {"n_threads": 1}
TRAIN = {
    "batch": {"units": 4, "per_unit": 2, "fresh": 1, "held_out": 2},
    "estimator": {"rounds": 2, "examples_per_probe": 4},
    "space": {"layers": [1, 2]},
    "budget": {"steps": 3},
    "engine": ENGINE,
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0")


def pairs(path: Path, n: int = 24) -> Source:
    trees = ("oak", "ash", "elm", "fir")
    rows = [{"prompt": f"Which tree is number {i}?", "answer": f"The {trees[i % 4]}."} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def started(model: Path, source: Source) -> tuple[RunSpec, Adapter]:
    """A run as an administrator makes it: the A of some data, B zero."""
    values: dict[str, Any] = {"seed": 0, **TRAIN}
    from fwdllama.config import make_config

    config = make_config(values)
    with opened(config, model, source, Hooks()) as session:
        adapter = session.adapter(session.space.initial_theta(), {})
        n_params, sha256 = session.space.n_params, session.sha256
    spec = RunSpec.model_validate(
        {
            "name": "tiny",
            "base": {"sha256": sha256, "name": "tiny", "architecture": "llama"},
            "train": config.model_dump(mode="json"),
            "eps": 0.01,
            "initial": hashlib.sha256(adapter_bytes(adapter)).hexdigest(),
            "n_params": n_params,
        }
    )
    return spec, adapter


def task(theta: Any, kind: Any = "train") -> Task:
    seeds = tuple(range(7, 13)) if kind == "train" else ()
    return Task(task="t1", run="r1", kind=kind, version=0, theta_digest=theta_digest(theta), seeds=seeds, lease_s=60)


def test_a_task_gives_the_losses_that_training_would_have(model: Path, source: Source, started: tuple[RunSpec, Adapter]) -> None:
    spec, adapter = started
    with Workplace(model, source, ENGINE).hired(spec, adapter_bytes(adapter)) as worker:
        theta = worker.initial_theta() + np.float32(0.01)
        result = worker.work(task(theta), theta, lambda n_done: True)
        held_out = worker.work(task(theta, "evaluate"), theta, lambda n_done: True)
    assert isinstance(result, TrainResult)
    assert isinstance(held_out, EvaluateResult)
    a = {name: pair[0] for name, pair in adapter.tensors.items()}
    with opened(spec.train, model, source, Hooks(), a=a) as session:
        rows = [*session.held_out, *session.batches.batch(0)[0]]
        session.losses.load(rows)
        groups = grouped([None] * len(session.held_out) + rows[len(session.held_out) :], 4, 0)[:3]
        session.losses.write(theta)
        losses = np.full(len(rows), np.nan)
        members = sorted(row for group in groups for row in group)
        losses[members] = session.losses.losses(members)
        plan = [(seed, i % len(groups)) for i, seed in enumerate(range(7, 13))]
        limit = spec.train.estimator.outlier * float(losses[members].mean())
        probes = list(evaluate(session.losses, theta, plan, groups, losses, spec.eps, limit))
        session.losses.write(theta)
        watched = session.losses.losses(range(len(session.held_out)))
    assert result.plus == tuple(short(p.loss_plus) for p in probes)
    assert result.loss == short(float(losses[members].mean()))
    assert result.n_tokens > 0
    assert held_out.loss == short(float(watched.mean()))
    assert held_out.n_examples == len(watched)


def test_devices_with_data_of_their_own_start_at_the_same_theta_and_space(
    model: Path, started: tuple[RunSpec, Adapter], tmp_path: Path
) -> None:
    spec, adapter = started
    digests, losses = [], []
    for n in (8, 16):
        with Workplace(model, pairs(tmp_path / "own.jsonl", n), ENGINE).hired(spec, adapter_bytes(adapter)) as worker:
            theta = worker.initial_theta()
            digests.append(theta_digest(theta))
            result = worker.work(task(theta), theta, lambda n_done: True)
            assert isinstance(result, TrainResult)
            losses.append(result.loss)
    assert digests[0] == digests[1]
    assert losses[0] != losses[1]


def test_a_run_for_questions_of_another_form_is_refused(model: Path, source: Source, started: tuple[RunSpec, Adapter]) -> None:
    spec, adapter = started
    other = adapter_bytes(replace(adapter, invocation_tokens=(3, 4)))
    sentence = "run 'tiny' asks its questions in another form: its answers begin behind the tokens 3, 4, those of"
    with pytest.raises(FederationError, match=sentence), Workplace(model, source, ENGINE).hired(spec, other):
        pass


def test_an_adapter_that_does_not_fit_model_or_run_is_refused(model: Path, source: Source, started: tuple[RunSpec, Adapter]) -> None:
    spec, adapter = started
    place = Workplace(model, source, ENGINE)
    fewer = dict(list(adapter.tensors.items())[:-1])
    wide = {name: (np.ones((a.shape[0], a.shape[1] + 32), np.float32), b) for name, (a, b) in adapter.tensors.items()}
    cases: list[tuple[bytes, type[Exception], str]] = [
        (b"GGUF", FileError, "the initial adapter of run 'tiny'"),
        (adapter_bytes(replace(adapter, tensors=wide)), FileError, "the initial adapter of run 'tiny'.*has shape"),
        (adapter_bytes(replace(adapter, tensors=fewer)), Exception, "."),
        (adapter_bytes(replace(adapter, alpha=3.0)), AdapterError, "alpha 3"),
    ]
    for data, kind, sentence in cases:
        with pytest.raises(kind, match=sentence), place.hired(spec, data):
            pass
    other = spec.model_copy(update={"train": spec.train.model_copy(update={"space": spec.train.space.model_copy(update={"layers": (0, 1)})})})
    with pytest.raises(AdapterError, match="adapts other matrices than its configuration trains in"), place.hired(other, adapter_bytes(adapter)):
        pass


def test_one_example_cannot_take_part_because_nothing_can_be_held_out(model: Path, started: tuple[RunSpec, Adapter], tmp_path: Path) -> None:
    spec, adapter = started
    place = Workplace(model, pairs(tmp_path / "one.jsonl", 1), ENGINE)
    sentence = "nothing can be held out of a single example; at least two are needed"
    with pytest.raises(DataError, match=sentence), place.hired(spec, adapter_bytes(adapter)):
        pass


def test_the_engine_is_the_devices_own_choice(model: Path, source: Source, started: tuple[RunSpec, Adapter]) -> None:
    spec, adapter = started
    results = []
    for engine in ({"n_threads": 1}, {"n_threads": 2, "mmap": True, "repack": False, "trunk": False}):
        with Workplace(model, source, engine).hired(spec, adapter_bytes(adapter)) as worker:
            theta = worker.initial_theta()
            result = worker.work(task(theta), theta, lambda n_done: True)
            assert isinstance(result, TrainResult)
            results.append(result)
    assert results[0].examples == results[1].examples
    assert results[0].loss == pytest.approx(results[1].loss, abs=0.01)
    assert file_sha256(model) == spec.base.sha256


def test_how_much_disk_prompts_may_take_is_never_the_runs_choice(model: Path, source: Source, started: tuple[RunSpec, Adapter]) -> None:
    spec, adapter = started
    greedy = spec.train.model_copy(
        update={"engine": spec.train.engine.model_copy(update={"keep_prompts_bytes": 1 << 50}), "budget": BudgetConfig(steps=1000)}
    )
    limits = []
    for engine in ({}, {"keep_prompts_bytes": 1 << 20}, {"keep_prompts_bytes": None}):
        with Workplace(model, source, {"n_threads": 1, **engine}).hired(spec.model_copy(update={"train": greedy}), adapter_bytes(adapter)) as worker:
            assert isinstance(worker.oracle, LlamaOracle)
            limits.append(worker.oracle.pool and worker.oracle.pool.limit_bytes)
    assert limits == [2 << 30, 1 << 20, None]
