"""Within a memory budget the planner changes what it may and says what; the run learns the same, to the bit, staged or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fwdllama.checkpoint import read_facts
from fwdllama.config import TrainConfig, make_config
from fwdllama.errors import ResourceError, Stopped, UsageError
from fwdllama.fitting import SHARED, fitted
from fwdllama.hooks import Hooks
from fwdllama.lower import parts_of
from fwdllama.machine import process_bytes
from fwdllama.material import Source
from fwdllama.memory import Shape
from fwdllama.models import default_cache_dir
from fwdllama.setting import Setting
from fwdllama.training import train
from fwdllama.types import Staged
from gguf_tools.errors import FileError
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.synth import write_tiny_llama

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers are most of it, as they are of a real model."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "m.gguf", type="Q8_0", n_layers=9, n_embd=256, n_head=4, n_head_kv=4, n_ff=1024)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is behind {i}?", "answer": f"It is {i + 1}."}) + "\n" for i in range(30)))
    return Source(path)


def config(**sections: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "space": {"layers": (6, 7)},
        "estimator": {"rounds": 2},
        "batch": {"units": 4, "per_unit": 2, "fresh": 1, "held_out": 2},
        "engine": {"n_threads": 1},
        "budget": {"steps": 3},
    }
    return make_config({**usual, **{key: {**usual.get(key, {}), **value} for key, value in sections.items()}})


def test_what_fits_is_left_alone_and_a_smaller_budget_is_kept_by_changes_that_are_said(model: Path, source: Source) -> None:
    said: list[str] = []
    asked = config()
    info, base = read_model_info(model), process_bytes()
    whole = base + Setting.of(asked, Shape(256, 1, 1)).plan(info, "train").peak.total_bytes
    assert fitted(asked, model, source, whole + (4 << 20), on_event=said.append) == asked
    assert re.fullmatch(r"within .*: nothing needs to be changed; .* at most, while .*", said.pop())
    found = fitted(asked, model, source, whole - (3 << 20), on_event=said.append)
    assert found.engine.stage_layers is not None
    assert re.fullmatch(rf"within .*: --stage-layers {found.engine.stage_layers}; .* at most, while .*", said.pop())
    assert found.model_dump(exclude={"engine"}) == asked.model_dump(exclude={"engine"})
    kept = fitted(asked, model, source, whole - (3 << 20), kept={"stage_layers"})
    assert kept.engine.stage_layers is None
    assert kept != asked
    shared = fitted(asked, model, source, whole - (3 << 20), kept=SHARED)
    assert (shared.batch, shared.space) == (asked.batch, asked.space)


def test_a_budget_below_the_smallest_setting_is_refused_with_that_and_its_size(model: Path, source: Source) -> None:
    sentence = r"m\.gguf cannot be trained within 1\.0 MiB: the smallest setting that may be chosen \(--.*\) needs .*, most of all while .*\. Give"
    with pytest.raises(ResourceError, match=sentence):
        fitted(config(), model, source, 1 << 20)


def test_staged_and_unstaged_runs_have_the_same_ledger_in_the_same_settings(model: Path, source: Source, tmp_path: Path) -> None:
    ledgers = []
    for name, engine in (
        ("whole", {"states": "f16"}),
        ("one slice", {"stage_layers": 6}),
        ("slices", {"stage_layers": 4}),
        ("layers", {"stage_layers": 1}),
        ("exact", {"stage_layers": 4, "states": "f32"}),
    ):
        run = tmp_path / name
        train(config(engine={"n_threads": 1, **engine}), model, source, run, tmp_path / f"{name}.gguf", Hooks())
        ledgers.append((run / "ledger.bin").read_bytes())
        assert not list(default_cache_dir().glob("states/*"))  # what waited on disk is gone with the run
    assert ledgers[0] == ledgers[1] == ledgers[2] == ledgers[3]
    assert ledgers[4] != ledgers[0]  # so that the comparison means something
    train(config(engine={"n_threads": 1}), model, source, tmp_path / "f32", tmp_path / "f32.gguf", Hooks())
    assert (tmp_path / "f32" / "ledger.bin").read_bytes() == ledgers[4]


def test_a_first_pass_that_is_stopped_leaves_no_run_and_goes_on_when_asked_again(model: Path, source: Source, tmp_path: Path) -> None:
    staged = config(engine={"n_threads": 1, "stage_layers": 2})
    seen: list[Staged] = []
    hooks = Hooks(on_staged=seen.append, stop=lambda: len(seen) == 20)
    with pytest.raises(Stopped, match=r"the same command goes on where it was\.$"):
        train(staged, model, source, tmp_path / "run", tmp_path / "a.gguf", hooks)
    assert not (tmp_path / "run").exists()
    n_first = len(seen)
    seen.clear()
    train(staged, model, source, tmp_path / "run", tmp_path / "a.gguf", Hooks(on_staged=seen.append))
    assert seen[0].done > n_first / 29 * 2 / 6  # 29 units, two of six layers: not from the beginning
    assert seen[-1].done == 1.0
    assert read_facts(tmp_path / "run")["n_seq"] == 10


def test_what_cannot_be_staged_is_told_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    staged = config(engine={"stage_layers": 2})
    with pytest.raises(UsageError, match=r"training begins at layer 0, so there is nothing below to compute before it; train higher --layers, or"):
        parts_of(staged, model, file_sha256(model), 0)
    other = write_tiny_llama(tmp_path / "mpt.gguf", architecture="mpt")
    with pytest.raises(FileError, match=r"no part of this mpt model can begin at layer 1, so what is below cannot be staged\."):
        parts_of(staged, other, file_sha256(other), 1)
    for changed in ({"engine": {"stage_layers": 2, "trunk": False}}, {"engine": {"stage_layers": 2}, "estimator": {"objective": "f1"}}):
        with pytest.raises(UsageError, match=r"stage_layers needs the trunk and objective nll: only then are lower layers computed before training"):
            config(**changed)
