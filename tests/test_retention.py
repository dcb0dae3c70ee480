"""A run is the same whatever its pool of prompts holds, and prompts are kept only where their unit returns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fwdllama.batches import RollingBatches
from fwdllama.checkpoint import RunDirectory
from fwdllama.config import StepConfig, TrainConfig, make_config
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.pool import Return
from fwdllama.retention import retained
from fwdllama.session import opened
from fwdllama.training import Hooks, Source, measure_noise, resume, train
from fwdllama.types import Encoded
from gguf_tools.adapter import adapter_bytes
from gguf_tools.synth import write_tiny_llama
from tests.questions import squad


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWDLLAMA_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def nothing_kept(cache: Path) -> None:
    shutil.rmtree(cache / "prompts", ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, and questions about 7 paragraphs."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny_llama(folder / "model.gguf", type="Q8_0")
    (folder / "squad.json").write_text(json.dumps(squad(7, n_words=40, n_questions=2)))
    return folder


LIMIT = 1 << 30


def config(limit: int | None = LIMIT, budget: dict[str, Any] | None = None, **engine: Any) -> TrainConfig:
    return make_config(
        {
            "estimator": {"rounds": 1, "first_rounds": 0, "examples_per_probe": 4},
            "space": {"layers": (1, 2)},
            "batch": {"units": 3, "per_unit": 2, "fresh": 2, "held_out": 2, "evaluate_every": 2},
            "engine": {"n_threads": 1, "keep_prompts_bytes": limit, **engine},
            "budget": budget or {"steps": 5},
        }
    )


def ledger_of(folder: Path, run: Path, settings: TrainConfig, **hooks: Any) -> bytes:
    train(settings, folder / "model.gguf", Source(folder / "squad.json"), run, run.with_suffix(".gguf"), Hooks(**hooks))
    return (run / "ledger.bin").read_bytes()


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "prompts").glob("*/*"))


@pytest.mark.parametrize("trunk", [False, True])
def test_a_run_is_the_same_with_an_empty_pool_a_filled_one_and_none(folder: Path, tmp_path: Path, cache: Path, trunk: bool) -> None:
    plain = ledger_of(folder, tmp_path / "plain", config(None, trunk=trunk))
    assert not kept(cache)
    assert ledger_of(folder, tmp_path / "empty", config(trunk=trunk)) == plain
    files = kept(cache)
    assert len(files) == 7  # six trained on, one held out
    assert ledger_of(folder, tmp_path / "filled", config(trunk=trunk)) == plain
    assert kept(cache) == files


@pytest.fixture(scope="module")
def plain(folder: Path) -> bytes:
    """The ledger of a run without a pool."""
    return ledger_of(folder, folder / "plain", config(None))


@pytest.mark.parametrize("state", ["whole", "gone", "half damaged"])
def test_a_run_that_was_stopped_goes_on_to_the_same_ledger_whatever_became_of_its_pool(
    folder: Path, tmp_path: Path, cache: Path, plain: bytes, state: str
) -> None:
    calls = count()
    stopped = ledger_of(folder, tmp_path / "run", config(), stop=lambda: next(calls) > 12)
    assert len(stopped) < len(plain)
    for i, file in enumerate(kept(cache)):
        if state == "gone" or (state == "half damaged" and i % 3 == 0):
            file.unlink()
        elif state == "half damaged" and i % 3 == 1:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    resume(tmp_path / "run", Hooks())
    assert (tmp_path / "run" / "ledger.bin").read_bytes() == plain


def decoded_by_a_run(folder: Path, settings: TrainConfig) -> int:
    """Tokens to load the batches of seven steps."""
    with opened(settings, folder / "model.gguf", Source(folder / "squad.json"), Hooks()) as session:
        before = session.oracle.n_decoded
        for step in range(7):
            session.oracle.load([*session.held_out, *session.batches.batch(step)[0]])
        return session.oracle.n_decoded - before


def test_each_prompt_is_decoded_once_in_all_passes_of_all_runs(folder: Path) -> None:
    without, first, second = (decoded_by_a_run(folder, config(limit)) for limit in (None, LIMIT, LIMIT))
    n_drawn = 1 + 3 + 6 * 2  # held out, first batch, fresh
    assert first == pytest.approx(without * 7 / n_drawn, rel=0.1)
    assert second == 6  # a token a batch, with which llama.cpp moves the rows that stay


@pytest.mark.parametrize(
    ("settings", "some"),
    [
        (config(budget={"steps": 2}), True),  # 3 + 2 x 2 of 6
        (config(budget={"steps": 1}), False),  # 3 + 2 x 1
        (config(budget={"probes": 2}), True),  # a group a step, where every unit is short
        (config(budget={"probes": 1}), False),
        (config(budget={"seconds": 9.0}), True),  # the pace will tell
        (config(budget={"seconds": 9.0, "steps": 1}), False),
        (config(limit=None), False),
        (config().model_copy(update={"space": config().space.model_copy(update={"scope": "all"})}), False),
    ],
)
def test_prompts_are_kept_where_the_budget_lets_their_unit_return(settings: TrainConfig, some: bool) -> None:
    units = [tuple(Encoded(str(n), (n,), (1,), (2,)) for _ in range(2)) for n in range(6)]
    batches = RollingBatches(units, unit_size=2, n_slots=3, fresh=2, seed=1)
    options = ContextOptions(256, n_seq=8, n_outputs=64)
    pool = retained(settings, batches, options, ModelOptions(), sha256="a", first=1, data_sha256="b")
    assert (pool is not None) == some
    if pool is not None:
        assert pool.returns == Return(6, settings.budget.seconds)
        assert pool.limit_bytes == LIMIT


def test_whatever_a_cells_bits_depend_on_names_another_pool() -> None:
    batches = RollingBatches([(Encoded("0", (1,), (1,), (2,)),)], unit_size=1, n_slots=1, fresh=1, seed=1)
    options, weights, rest = ContextOptions(256, n_seq=8, n_outputs=64), ModelOptions(), {"sha256": "a", "first": 1, "data_sha256": "b"}
    changed: list[tuple[ContextOptions, ModelOptions, dict[str, Any]]] = [
        (options, weights, rest),
        *((replace(options, **change), weights, rest) for change in ({"kv_type": "f32"}, {"flash": False}, {"n_batch": 64}, {"n_seq": 9})),
        *((options, replace(weights, **change), rest) for change in ({"repack": False}, {"n_gpu_layers": 1})),
        *((options, weights, {**rest, **change}) for change in ({"sha256": "c"}, {"first": 2}, {"data_sha256": "c"})),
    ]
    pools = [retained(config(), batches, some_options, some_weights, **some) for some_options, some_weights, some in changed]
    assert len({pool.folder for pool in pools if pool is not None}) == len(changed)


def test_measuring_noise_writes_no_prompts(folder: Path, cache: Path) -> None:
    measure_noise(config(), folder / "model.gguf", Source(folder / "squad.json"), Hooks())
    assert not kept(cache)


def test_what_is_kept_is_for_its_owner_only(folder: Path, cache: Path) -> None:
    decoded_by_a_run(folder, config())
    (own,) = (cache / "prompts").iterdir()
    assert own.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("accept", [False, True])
def test_calibration_steps_and_their_tests_load_each_unit_of_each_batch_once(folder: Path, tmp_path: Path, accept: bool) -> None:
    settings = config().model_copy(update={"step": StepConfig(accept=accept)})
    with opened(settings, folder / "model.gguf", Source(folder / "squad.json"), Hooks()) as session:
        session.load_first_batch()
        theta = session.space.initial_theta()
        calibration = session.calibrated(theta)
        facts, initial = {"identity": session.identity()}, adapter_bytes(session.adapter(theta, {}))
        with RunDirectory.create(tmp_path / "run", settings.model_dump_json(), facts, initial, eps=calibration.eps) as run:
            session.finish(run, theta, tmp_path / "out.gguf", calibration)
        assert session.oracle.pool is not None
        n_held_out, n_slots, n_fresh = 1, 3, 2
        assert session.oracle.pool.n_found + session.oracle.pool.n_kept == n_held_out + n_slots + 5 * n_fresh
