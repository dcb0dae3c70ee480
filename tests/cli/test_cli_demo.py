from __future__ import annotations

from pathlib import Path

import filelock
import pytest

from fwdllama.cli.demo import MARK, bundled, fresh_folder
from fwdllama.errors import RunError
from fwdllama.tasks.load import load_dataset
from gguf_tools.synth import write_tiny_llama

from .conftest import Run


def test_demo_trains_scores_shows_answers_and_reports(run: Run) -> None:
    model = write_tiny_llama(Path("tiny.gguf"), type="Q8_0", n_layers=2, n_embd=32, n_head=2, n_head_kv=1, n_ff=32)  # a step is 320 probes
    small = ("--model", model, "--steps", 1, "--eval-limit", 3, "--threads", 1)
    result = run("demo-local", *small)
    assert result.code == 0, result.err
    for heading in ("question", "base", "tuned", "truth", "before", "after", "3 questions of almanac-dev.json"):
        assert heading in result.out
    assert "report   demo-local-run/report.html" in result.out
    assert "fwdllama resume demo-local-run/run" in result.err
    assert (Path("demo-local-run") / "adapter.gguf").exists()
    assert "almanac-train.json" in Path("demo-local-run/report.html").read_text()
    again = run("demo-local", *small, "--json")
    assert again.json["steps"] == 1, "an earlier demo is replaced"
    assert again.json["scores"]["n_questions"] == 3


def test_demo_without_the_model_says_how_to_get_it_and_leaves_an_earlier_one_alone(run: Run) -> None:
    fresh_folder(Path("demo-local-run"))
    (Path("demo-local-run") / "adapter.gguf").touch()
    result = run("demo-local")
    assert result.code == 1
    assert result.error.endswith("fetch it with: fwdllama model fetch smollm2-135m")
    assert (Path("demo-local-run") / "adapter.gguf").exists()


def test_only_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(RunError, match=r"is not an earlier demo's \(thesis\.txt is in it\); name another --folder"):
        fresh_folder(folder)
    (folder / MARK).touch()
    with pytest.raises(RunError, match=r"thesis\.txt"):
        fresh_folder(folder)
    (folder / "thesis.txt").unlink()
    (folder / "report.html").touch()
    fresh_folder(folder)
    assert [path.name for path in folder.iterdir()] == [MARK]
    (folder / MARK).unlink()
    fresh_folder(folder)
    (folder / MARK).unlink()
    (folder / "adapter.gguf").touch()
    with pytest.raises(RunError, match=r"adapter\.gguf is in it"):
        fresh_folder(folder)
    with pytest.raises(RunError, match="is a file"):
        fresh_folder(folder / "adapter.gguf")


def test_a_demo_that_goes_on_is_not_replaced(tmp_path: Path) -> None:
    fresh_folder(tmp_path / "demo")
    run_path = tmp_path / "demo" / "run"
    run_path.mkdir()
    with (
        filelock.FileLock(run_path / ".lock"),
        pytest.raises(RunError, match="is in use by a demo that is going on; name another --folder"),
    ):
        fresh_folder(tmp_path / "demo")


def test_bundled_questions_are_of_different_paragraphs() -> None:
    texts = [
        {example.fields["context"] for example in load_dataset(bundled(f"almanac-{part}.json")).examples}
        for part in ("train", "dev")
    ]
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]
