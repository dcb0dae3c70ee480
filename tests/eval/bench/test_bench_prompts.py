"""Steps with prompts kept and without: the same losses, and times that are attributed to what they were spent on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fwdllama_eval.bench import prompts
from fwdllama_eval.bench.measure import Bench

from fwdllama.tasks.load import load_dataset


def test_questions_are_the_first_of_the_file_with_their_paragraphs_and_answers(bench: Bench, tmp_path: Path) -> None:
    made = load_dataset(prompts.questions(bench.train_data, tmp_path / "made.json", 5, "made")).examples
    assert list(made) == list(load_dataset(bench.train_data).examples[:5])


@pytest.mark.service
def test_each_unit_is_computed_once_and_then_read_and_the_pool_is_removed(bench: Bench) -> None:
    found = prompts.timed_steps(bench.model, bench.train_data, 2)
    assert found["same"] is True
    assert [len(found[key]) for key in ("without_s", "with_s", "probes_s", "n_found", "n_loaded")] == [3] * 5
    assert found["n_loaded"] == [1 + 11, 7, 7]  # held out, and a slot for each of the others; seven are fresh
    assert found["n_found"] == [0, 7, 7]
    assert found["units"] == 12
    assert not os.listdir(Path(os.environ["FWDLLAMA_CACHE"]) / "prompts")


def test_figures_tell_reading_from_computing() -> None:
    times = {"without_s": [9.0, 2.0, 3.0], "with_s": [9.0, 2.1, 0.3], "probes_s": [9.0, 5.0, 5.0], "n_found": [0, 0, 3], "n_loaded": [9, 3, 3]}
    figures = prompts.figures_of({**times, "same": True, "pool_bytes": 1, "units": 6, "n_ctx": 256})
    assert figures["read_ratio"] == pytest.approx(0.1)
    assert figures["written_ratio"] == pytest.approx(1.05)
    assert figures["prompt_share"] == pytest.approx(5 / 15)
    assert figures["without_steps_a_minute"] == pytest.approx(60 * 2 / 15)
    assert figures["with_steps_a_minute"] == pytest.approx(60 * 2 / 12.4)
