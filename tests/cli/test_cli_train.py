from __future__ import annotations

import json
from pathlib import Path

from gguf_tools.adapter import read_adapter

from .conftest import Run


def test_train_writes_an_adapter_a_run_and_says_what_next(train: Run, model: Path, tmp_path: Path) -> None:
    result = train()
    assert result.code == 0
    assert read_adapter(tmp_path / "adapter.gguf").scope == "answer"
    assert (tmp_path / "adapter-run" / "ledger.bin").exists()
    assert "trained  2 steps" in result.out
    assert "adapter  adapter.gguf (" in result.out
    assert "step 1: loss " in result.err
    assert "step 2: loss " in result.err
    assert "note: This adapter must be off while the prompt is read" in result.err
    assert "    fwdllama resume adapter-run --seconds 300\n" in result.err
    assert f"    fwdllama answer --model {model} --adapter adapter.gguf --context TEXT --question TEXT\n" in result.err
    assert "step 1" not in result.out, "progress is not data"


def test_an_adapter_for_any_runtime_has_no_scope_warning(train: Run, tmp_path: Path) -> None:
    result = train("--scope", "all")
    assert result.code == 0
    assert read_adapter(tmp_path / "adapter.gguf").scope == "all"
    assert "must be off while the prompt is read" not in result.err


def test_scores_of_eval_data_are_shown_before_and_after(train: Run, dev: Path) -> None:
    result = train("--eval-data", dev)
    assert result.code == 0
    assert "9 questions of dev.json" in result.out
    for word in ("before", "after", "change", "Exact match (%)", "F1 (%)"):
        assert word in result.out
    assert "asking the base model 9 questions" in result.err


def test_json_is_all_that_stdout_has(train: Run, dev: Path, tmp_path: Path) -> None:
    result = train("--eval-data", dev, "--eval-limit", 4, "--json", "--report", "r/report.html")
    assert result.code == 0
    found = result.json
    assert found["steps"] == 2
    assert found["finished"] == "the budget is used up"
    assert found["scores"]["n_questions"] == 4
    assert found["scores"]["before"].keys() == found["scores"]["after"].keys() == {"exact_match", "f1"}
    assert found["adapter"]["scope"] == "answer"
    assert found["report"] == "r/report.html"
    assert len(found["ledger_sha256"]) == 64
    state = json.loads((tmp_path / "adapter-run" / "state.json").read_text())
    assert found["ledger_sha256"] == state["ledger"]


def test_report_has_scores_answers_and_settings(train: Run, dev: Path, tmp_path: Path) -> None:
    assert train("--eval-data", dev, "--report", "report.html").code == 0
    page = (tmp_path / "report.html").read_text()
    for text in ("tiny trained on train.json", "space.rank", "fwdllama resume adapter-run"):
        assert text in page


def test_the_same_seed_gives_the_same_ledger_and_another_one_another(train: Run) -> None:
    digests = [
        train("--run", name, "--seed", seed, "--json").json["ledger_sha256"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_pairs_and_labels_can_be_trained_on(train: Run, run: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": f"it is {i}"}) + "\n" for i in range(20)))
    result = train("--data", pairs, "--eval-data", pairs, "--eval-limit", 2)
    assert result.code == 0
    assert "--prompt TEXT" in result.err
    rows = tmp_path / "rows.csv"
    rows.write_text("".join(f"{i % 2},text number {i}\n" for i in range(20)))
    arguments = ("--data", rows, "--labels", "0=low,1=high", "--run", "r2", "--eval-data", rows, "--eval-limit", 4)
    result = train(*arguments, "--json")
    assert result.json["scores"]["after"].keys() == {"accuracy"}


def test_examples_that_are_too_long_are_counted_and_said(train: Run, data: Path) -> None:
    squad = json.loads(data.read_text())
    for paragraph in squad["data"][0]["paragraphs"][:6]:
        paragraph["context"] *= 20
    data.write_text(json.dumps(squad))
    result = train("--ctx", 256)
    assert result.code == 0
    assert " examples were left out: prompt longer than the context of 256 tokens." in result.err
