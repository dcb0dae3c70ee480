"""The item of LLaMA-7B's memory, on a small shape: every figure is there, the prompts are as long as they should be, nothing stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fwdllama_eval.bench import large
from fwdllama_eval.bench.measure import Bench, BenchError

MIB = 1 << 20
SHAPE = ("--like", "tiny", "--n-vocab", "2048", "--n-layers", "4")
BOUND = large.Bound("q4_0", 400 * MIB, 300 * MIB, 2000 * MIB, 2000 * MIB)


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(large.NAMES, BOUND, "memory-7b-tiny")
    monkeypatch.setitem(large.NAMES, replace(BOUND, whole_limit=40 * MIB), "memory-7b-too-small")


@pytest.mark.service
def test_a_small_shape_gives_every_figure_and_leaves_nothing_behind(bench: Bench) -> None:
    found = large.large(BOUND, bench, SHAPE).figures
    assert found["completed"]
    assert found["trained_layers"] == "3-3"
    assert found["kv_type"] == "f16"  # the first setting is under the bar
    assert 180 <= found["prompt_tokens"] <= large.PROMPT_TOKENS
    assert 20 * MIB < found["whole_bytes"] < 300 * MIB
    assert found["ratio"] == found["whole_bytes"] / found["eval_bytes"]
    assert found["plan_error"] == pytest.approx(abs(found["whole_planned_bytes"] / found["whole_bytes"] - 1))
    assert found["limited_by"] in ("cgroup v1", "cgroup v2", "systemd-run", "RLIMIT_AS")
    cache = bench.work.parent / "cache"
    assert [path for path in cache.rglob("*.gguf") if path.parent.name != "activations"] == []


@pytest.mark.service
def test_a_run_that_does_not_fit_its_limit_is_no_result_and_leaves_no_model(bench: Bench) -> None:
    with pytest.raises(BenchError, match=r"ended with .* under a hard limit of 40\.0 MiB"):
        large.large(replace(BOUND, whole_limit=40 * MIB), bench, SHAPE)
    assert list((bench.work.parent / "cache").rglob("random-*.gguf")) == []


def test_prompts_are_nearly_as_long_as_they_should_be(tmp_path: Path) -> None:
    path, longest = large.write_prompts(tmp_path / "prompts.jsonl", 2048)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) >= large.N_PROMPTS + 2
    assert large.PROMPT_TOKENS - 10 <= longest <= large.PROMPT_TOKENS
    assert all(row["prompt"].endswith(row["answer"]) for row in rows)
