"""`fwdllama run create` with a model small enough to calibrate in a second: what it founds is what the aggregator serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gguf_tools.adapter import BASE_KEY, read_adapter
from gguf_tools.model import file_sha256
from gguf_tools.synth import write_tiny_llama

from .commands import Served, invoked, refusal


@pytest.fixture
def aggregator(serving: Served) -> Served:
    return serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0")


@pytest.fixture
def create(aggregator: Served, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The beginning of a command line that founds a run quickly."""
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "public.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a} {b}", "answer": b}) + "\n" for a in "abcdefgh" for b in "ijklm"))
    small = ["--layers", "1-2", "--units", 2, "--per-unit", 1, "--fresh", 1, "--held-out", 2, "--examples-per-probe", 1, "--threads", 1]
    return ["run", "create", "--model", model, "--data", data, *small, *aggregator.connection]


def test_founded_run_is_the_one_that_is_served(create: list[object], aggregator: Served, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    rounds = ["--rounds", 7, "--probes-per-round", 30, "--probes-per-task", 10, "--rule", "mean", "--patience", 3, "--staleness", 2]
    made = json.loads(invoked(*create, "mine", *rounds, "--public", "--json").stdout)
    spec = made["spec"]
    assert (spec["train"]["budget"]["steps"], spec["train"]["budget"]["seconds"]) == (7, None)
    assert (spec["round"]["probes"], spec["round"]["most"], spec["round"]["probes_per_task"], spec["round"]["staleness"]) == (30, 120, 10, 2)
    assert (spec["aggregation"]["rule"], spec["evaluation"]["patience"], spec["public"]) == ("mean", 3, True)
    assert spec["train"]["space"]["layers"] == [1, 2]
    assert spec["train"]["engine"]["n_threads"] is None  # this machine's own
    train = spec["train"]
    assert (train["estimator"]["first_rounds"], train["estimator"]["vocabulary"], train["step"]["warmup"]) == (0, "whole", False)
    assert spec["eps"] > 0
    assert spec["base"]["sha256"] == file_sha256(model)
    out = tmp_path / "adapter.gguf"
    assert invoked("run", "export", "mine", "--version", 0, "--out", out, *aggregator.connection).exit_code == 0
    adapter = read_adapter(out)
    assert adapter.metadata[BASE_KEY] == spec["base"]["sha256"]
    assert sum(b.size for _, b in adapter.tensors.values()) == spec["n_params"]
    assert refusal(*create, "mine") == f"{aggregator.facts['url']}: there is a run 'mine' already."


def test_what_cannot_be_founded_is_refused_before_the_engine_works(create: list[object], tmp_path: Path) -> None:
    assert refusal(*create, "a b") == "name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$' (got 'a b')."
    sentence = "--rule median compares devices that were given the same probes; give --copies of at least 3."
    assert refusal(*create, "mine2", "--rule", "median") == sentence
    sentence = "the run: rule 'trimmed' needs copies of at least 3, not 2."
    assert refusal(*create, "mine2", "--rule", "trimmed", "--copies", 2) == sentence
    assert refusal(*create, "mine2", "--minimum", 2) == "round.minimum: Input should be less than or equal to 1 (got 2.0)."
    assert refusal(*create, "mine2", "--rank", 0).startswith("--rank: Input should be greater than or equal to 1")
    assert not (tmp_path / "cache").exists()
