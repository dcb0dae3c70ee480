"""What is measured of answers, through the answerer that needs no model."""

from __future__ import annotations

import math
import subprocess
import sys

from fwdllama_eval.answer import Measured, RecordedAnswerer, RecordedAnswers, measure, score_dataset

from fwdllama.types import Dataset, Example


def squad(*qas: tuple[str, tuple[str, ...]]) -> Dataset:
    examples = tuple(Example(id_, {"context": "c", "question": f"q {id_}"}, answers) for id_, answers in qas)
    return Dataset("squad", examples, "dev.json")


def test_recorded_answerer_answers_what_is_asked_and_counts_the_rest() -> None:
    calls: list[tuple[int, int]] = []
    answerer = RecordedAnswerer(RecordedAnswers({"a": "x", "other": "y"}, {"a": 1.0, "other": 2.0}))
    answers = answerer.answer(
        squad(("a", ("x",)), ("b", ("z",))), max_new_tokens=8, progress=lambda done, of: calls.append((done, of))
    )
    assert answers.predictions == {"a": "x"}
    assert answers.losses == {"a": 1.0}
    assert answers.skipped == {"without a recorded answer": 1}
    assert calls[-1] == (2, 2)


def test_measure_scores_skipped_questions_zero_by_the_rules_of_v1() -> None:
    answerer = RecordedAnswerer(RecordedAnswers({"a": "x"}))
    measured = measure(answerer, squad(("a", ("x",)), ("b", ("z",))), max_new_tokens=8, progress=lambda done, of: None)
    assert measured.scores == {"exact_match": 50.0, "f1": 50.0}
    assert measured.n_missing == 1


def test_v2_questions_are_scored_in_their_groups() -> None:
    scores = score_dataset(squad(("a", ("x",)), ("b", ())), {"a": "x", "b": "y"})
    assert scores["exact"] == scores["f1"] == 50.0
    assert (scores["HasAns_f1"], scores["NoAns_f1"]) == (100.0, 0.0)
    assert "total" not in scores


def test_label_words_are_scored_by_accuracy_and_a_missing_one_is_wrong() -> None:
    choices = ("World", "Sports")
    examples = tuple(Example(str(i), {"text": "t"}, ("Sports",), choices) for i in range(4))
    dataset = Dataset("classification", examples, "news.csv")
    assert score_dataset(dataset, {"0": "Sports", "1": "World", "2": "Sports"}) == {"accuracy": 50.0}


def test_rates_and_loss_are_means_over_what_was_measured() -> None:
    answers = RecordedAnswers(
        {"a": "x", "b": "y"}, {"a": 1.0, "b": 2.0, "c": math.nan}, n_prompt_tokens=90, n_new_tokens=10, elapsed_s=4.0
    )
    measured = Measured({}, answers)
    assert (measured.loss, measured.tokens_per_s, measured.questions_per_s) == (1.5, 25.0, 0.5)
    unmeasured = Measured({}, RecordedAnswers({"a": "x"}))
    assert (unmeasured.loss, unmeasured.tokens_per_s, unmeasured.questions_per_s) == (None, None, None)


def test_importing_needs_no_llama_cpp() -> None:
    code = "import sys, fwdllama_eval.cli, fwdllama_eval.report, fwdllama_eval.squad; print('llama_cpp' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
