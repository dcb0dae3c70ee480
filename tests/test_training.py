"""A run on a real model file ends with a valid adapter, and a resumed one with the same bytes, or says why not."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllama.checkpoint import RunDirectory, read_facts, read_metrics
from fwdllama.config import TrainConfig, make_config, read_config
from fwdllama.errors import DataError, ResourceError, RunError
from fwdllama.ledger import read_ledger, replay
from fwdllama.progress import Progress
from fwdllama.space import MODULES
from fwdllama.training import Hooks, Outcome, Source, measure_noise, resume, train
from gguf_tools.adapter import read_adapter
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.synth import write_tiny_llama
from gguf_tools.validate import validate_adapter

NAMES = ["ash", "beech", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "yew"]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, and the same questions as pairs and as SQuAD."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny_llama(folder / "model.gguf", type="Q8_0")
    pairs = [{"prompt": f"Which tree is number {i}?", "answer": f"The {NAMES[i % 12]}."} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paragraphs = []
    for n, name in enumerate(NAMES):
        context = f"Tree {n} in the garden is the {name}, planted by hand in the year {1900 + n}, and the {name} grows well."
        asked = {"Which tree is it?": name, "When was it planted?": str(1900 + n), f"How does the {name} grow?": "well"}
        questions = [
            {"id": f"{n}-{i}", "question": q, "answers": [{"text": a, "answer_start": context.index(a)}]} for i, (q, a) in enumerate(asked.items())
        ]
        paragraphs.append({"context": context, "qas": questions})
    (folder / "squad.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return folder


def config(**sections: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "estimator": {"rounds": 2},
        "batch": {"units": 4, "per_unit": 2, "fresh": 1, "held_out": 2, "evaluate_every": 2},
        "engine": {"n_threads": 1},
        "budget": {"steps": 4},
    }
    return make_config({**usual, **{key: {**usual.get(key, {}), **value} for key, value in sections.items()}})


@dataclass
class Files:
    """One run's files; `changed` are the sections of its configuration that are not usual."""

    root: Path
    name: str
    data: str = "squad.json"
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.root / self.name

    @property
    def out(self) -> Path:
        return self.root / f"{self.name}.gguf"

    def train(self, **hooks: Any) -> Outcome:
        source = Source(self.root / self.data)
        return train(config(**self.changed), self.root / "model.gguf", source, self.run, self.out, Hooks(**hooks))

    def left(self) -> tuple[bytes, bytes, list[float | None]]:
        """What must not depend on interruptions: ledger, adapter and losses."""
        losses = [row["held_out_loss"] for row in read_metrics(self.run)]
        return (self.run / "ledger.bin").read_bytes(), self.out.read_bytes(), losses


def stopping_after(n: int) -> dict[str, Any]:
    calls = count()
    return {"stop": lambda: next(calls) >= n}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("pairs.jsonl", {}),
    "squad": ("squad.json", {}),
    "all": ("squad.json", {"space": {"scope": "all"}}),
    "whole model": ("squad.json", {"engine": {"trunk": False}}),
    "staged": ("squad.json", {"space": {"layers": (2, 2)}, "engine": {"stage_layers": 1}}),
    "both halves": ("squad.json", {"space": {"train": "ab", "init": "random", "layers": (0, 2)}}),
    "two-sided": ("pairs.jsonl", {"estimator": {"sided": "two"}, "pacing": {"kind": "variance", "max_rounds": 3}}),
}


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, tuple[Files, Outcome]]:
    files = {method: Files(folder, method, *how) for method, how in METHODS.items()}
    return {method: (run, run.train()) for method, run in files.items()}


@pytest.mark.parametrize("method", METHODS)
def test_training_ends_with_an_adapter_that_is_valid_and_says_what_it_belongs_to(
    folder: Path, unbroken: dict[str, tuple[Files, Outcome]], method: str
) -> None:
    files, outcome = unbroken[method]
    model = folder / "model.gguf"
    assert outcome.adapter == files.out
    assert (outcome.state.step, outcome.state.finished) == (4, "the budget is used up")
    validate_adapter(files.out, read_model_info(model))
    adapter = read_adapter(files.out)
    scope = config(**files.changed).space.scope
    assert (adapter.scope, bool(adapter.invocation_tokens)) == (scope, scope == "answer")
    assert adapter.metadata["fwdllama.base.sha256"] == file_sha256(model)
    assert adapter.metadata["fwdllama.run.step"] == str(outcome.state.best_step)
    assert adapter.metadata["fwdllama.run.ledger"] == outcome.state.ledger
    assert not list(folder.glob(".*"))


def test_the_adapter_is_the_replay_of_the_ledger_to_the_best_step(unbroken: dict[str, tuple[Files, Outcome]]) -> None:
    files, outcome = unbroken["squad"]
    entries = read_ledger(files.run / "ledger.bin")
    adapter, initial = read_adapter(files.out), read_adapter(files.run / "initial.gguf")
    layers = sorted({int(name.split(".")[1]) for name in adapter.tensors})
    space = config(**files.changed).space
    names = [f"blk.{layer}.{MODULES[module]}.weight" for layer in layers for module in space.modules]
    assert set(adapter.tensors) == set(names)
    n_params = sum(b.size for _, b in adapter.tensors.values())
    theta = replay(np.zeros(n_params, np.float32), entries[: outcome.state.best_step])
    assert np.array_equal(np.concatenate([adapter.tensors[name][1].ravel() for name in names]), theta)
    for name, (a, b) in initial.tensors.items():
        assert np.array_equal(adapter.tensors[name][0], a)
        assert not b.any()
        assert np.abs(a @ a.T - np.eye(space.rank)).max() < 1e-5


def test_trunk_and_top_learn_what_the_whole_model_does_to_the_bit(unbroken: dict[str, tuple[Files, Outcome]]) -> None:
    assert unbroken["squad"][0].left() == unbroken["whole model"][0].left()
    assert unbroken["squad"][0].left() != unbroken["all"][0].left()


@pytest.mark.parametrize(
    ("method", "ends"),
    [("squad", [5, 12]), ("pairs", [1, 9]), ("all", [20]), ("both halves", [14]), ("two-sided", [13, 21])],
)
def test_a_run_stopped_and_resumed_leaves_the_bytes_of_the_unbroken_one(
    unbroken: dict[str, tuple[Files, Outcome]], method: str, ends: list[int]
) -> None:
    whole = unbroken[method][0]
    files = Files(whole.root, f"{method}, stopped", whole.data, whole.changed)
    outcome = files.train(**stopping_after(ends[0]))
    assert (outcome.adapter, outcome.state.finished) == (None, None)
    assert not files.out.exists()
    for n in ends[1:]:
        assert resume(files.run, Hooks(**stopping_after(n))).adapter is None
    outcome = resume(files.run, Hooks())
    assert outcome.adapter == files.out
    assert files.left() == whole.left()


def test_a_run_that_was_killed_is_resumed_to_the_bytes_of_the_unbroken_one(
    unbroken: dict[str, tuple[Files, Outcome]],
) -> None:
    files = Files(unbroken["squad"][0].root, "killed")

    def interrupt(progress: Progress) -> None:
        if progress.state.step == 2 and progress.step_probes == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.train(on_progress=interrupt)
    resume(files.run, Hooks())
    assert files.left() == unbroken["squad"][0].left()


def test_a_finished_run_writes_its_adapter_again_and_goes_on_only_with_more_budget(folder: Path, unbroken: dict[str, tuple[Files, Outcome]]) -> None:
    files = Files(folder, "longer")
    shutil.copytree(unbroken["squad"][0].run, files.run)
    before = (files.run / "ledger.bin").read_bytes()
    outcome = resume(files.run, Hooks(), out=files.out)
    assert outcome.state.step == 4
    assert files.left() == unbroken["squad"][0].left()
    outcome = resume(files.run, Hooks(), out=files.out, budget={"steps": 6})
    assert outcome.state.step == 6
    assert (files.run / "ledger.bin").read_bytes().startswith(before)
    assert read_config(files.run / "config.json").budget.steps == 6


def copied(tmp_path: Path, folder: Path) -> Files:
    """A run with files of its own, stopped in its third step."""
    for name in ("model.gguf", "squad.json"):
        shutil.copy(folder / name, tmp_path)
    files = Files(tmp_path, "run")
    files.train(**stopping_after(30))
    return files


def refused(files: Files, sentence: str) -> None:
    before = {path.name: path.read_bytes() for path in files.run.iterdir()}
    with pytest.raises(RunError, match=sentence):
        resume(files.run, Hooks())
    assert {path.name: path.read_bytes() for path in files.run.iterdir()} == before
    assert not files.out.exists()


def test_a_run_of_another_model_data_or_configuration_is_refused(tmp_path: Path, folder: Path) -> None:
    files = copied(tmp_path, folder)
    for changes in ({"seed": 1}, {"n_layers": 6}, {"n_embd": 96, "n_head": 6}):
        write_tiny_llama(tmp_path / "model.gguf", type="Q8_0", **changes)  # type: ignore[arg-type]
        refused(files, r"run belongs to another base model: it was [0-9a-f]{64}, and is [0-9a-f]{64} now\.$")
    shutil.copy(folder / "model.gguf", tmp_path)
    data = (tmp_path / "squad.json").read_text()
    for changed in (data.replace("ash", "elm"), "no data"):
        (tmp_path / "squad.json").write_text(changed)
        refused(files, r"run belongs to another data: it was [0-9a-f]{64}, and is [0-9a-f]{64} now\.$")
    (tmp_path / "squad.json").write_text(data)
    settings = (files.run / "config.json").read_text()
    for changes in ({"seed": 1}, {"space": {"rank": 8}}, {"space": {"layers": (0, 1)}}, {"step": {"final_lr": 1.0}}):
        altered = json.loads(settings)
        altered |= {k: {**altered[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
        (files.run / "config.json").write_text(json.dumps(altered))
        refused(files, r"run belongs to another configuration\b.*\b(0|4|null|None)\b.*, and is .* now\.$")
    (files.run / "config.json").write_text(settings)
    assert resume(files.run, Hooks()).state.step == 4


def test_two_processes_cannot_continue_one_run(tmp_path: Path, folder: Path) -> None:
    files = copied(tmp_path, folder)
    with RunDirectory.open(files.run), pytest.raises(RunError, match="is in use by another process"):
        resume(files.run, Hooks())


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(tmp_path: Path, folder: Path) -> None:
    nothing, source = tmp_path / "no model.gguf", Source(folder / "squad.json")
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    cases: list[tuple[type[Exception], str, Path, Path]] = [
        (RunError, r"mine is not empty \(notes\)", tmp_path / "mine", tmp_path / "a.gguf"),
        (ResourceError, r"file/deep cannot be written", tmp_path / "run", tmp_path / "file" / "deep" / "a.gguf"),
        (ResourceError, r"file/run cannot be written", tmp_path / "file" / "run", tmp_path / "a.gguf"),
        (ResourceError, r"mine is a folder; give the adapter a file name", tmp_path / "run", tmp_path / "mine"),
    ]
    for error, sentence, run, out in cases:  # and not that there is no model
        with pytest.raises(error, match=sentence):
            train(config(), nothing, source, run, out, Hooks())


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path: Path, folder: Path) -> None:
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pairs[3]["prompt"] *= 40
    pairs[7]["answer"] *= 60
    pairs[11]["answer"] = "a long answer of some more words than others have " * 3
    shutil.copy(folder / "model.gguf", tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = Files(tmp_path, "run", "pairs.jsonl", {"batch": {"units": 30, "per_unit": 1, "n_ctx": 256}})
    outcome = files.train()
    assert outcome.state.step == 4
    assert sum(outcome.skipped.values()) == 2  # the 115 tokens of the other long answer are trained on
    assert any("prompt longer than the context of 256 tokens" in reason for reason in outcome.skipped)
    short = Files(tmp_path, "short", "pairs.jsonl", {"batch": {"n_ctx": 8}})
    with pytest.raises(DataError, match=r"pairs\.jsonl: none of its examples fits the context of 8 tokens\."):
        short.train()
    assert not short.run.exists()


def test_a_context_that_only_few_examples_fit_is_enough(tmp_path: Path, folder: Path) -> None:
    """None of those that A is chosen from may be among them."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    many = [{**pair, "prompt": pair["prompt"] * 9} for pair in pairs * 8]
    shutil.copy(folder / "model.gguf", tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*many, *pairs[:3]]))
    outcome = Files(tmp_path, "run", "pairs.jsonl", {"batch": {"n_ctx": 64}, "budget": {"steps": 1}}).train()
    assert outcome.state.step == 1


def test_a_run_directory_tells_what_the_run_is(folder: Path, unbroken: dict[str, tuple[Files, Outcome]]) -> None:
    files, outcome = unbroken["squad"]
    facts = read_facts(files.run)
    assert facts["identity"]["base model"] == file_sha256(folder / "model.gguf")
    assert facts["identity"]["data"] == file_sha256(folder / "squad.json")
    assert outcome.calibration is not None
    assert facts["calibration"]["eps"] == outcome.calibration.eps == outcome.state.eps
    assert read_config(files.run / "config.json") == config()
    found = measure_noise(config(), folder / "model.gguf", Source(folder / "squad.json"), Hooks())
    assert found.eps == outcome.calibration.eps
