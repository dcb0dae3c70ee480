"""Reports of evaluations: both models side by side, chosen by rule, on the same page as training reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fwdllama_eval.answer import Measured, RecordedAnswers, score_dataset
from fwdllama_eval.report import EvaluationSummary, evenly, ranked, render, score_rows, write_report

from fwdllama.report import AdapterFacts
from fwdllama.types import Dataset, Example

EVIL = "<script>alert(1)</script>"
DATASET = Dataset(
    "squad",
    tuple(
        Example(str(i), {"context": f"The answer is word{i}.", "question": f"Question {i}?"}, (f"word{i}",))
        for i in range(20)
    ),
    "dev.json",
)


def measured(right: int, *, losses: dict[str, float] | None = None, **changes: Any) -> Measured:
    """A model that answers the first `right` questions exactly and the others not at all like it."""
    predictions = {e.id: e.answers[0] if i < right else "something else" for i, e in enumerate(DATASET.examples)}
    answers = RecordedAnswers(predictions, losses or {}, 2000, 100, 42.0)
    return Measured(score_dataset(DATASET, predictions), answers, **changes)


def summary(base: Measured | None, tuned: Measured | None, **changes: Any) -> EvaluationSummary:
    return EvaluationSummary("A model", "today", DATASET, base, tuned, **changes)


def test_table_has_base_tuned_and_the_change() -> None:
    html = render(summary(measured(2), measured(9, losses={"0": 1.25})))
    assert "<th>Base</th><th>Tuned</th><th>Change</th>" in html
    for text in ["10.00", "45.00", "+35.00", "1.250", "50", "questions/s", "20 questions of dev.json"]:
        assert text in html


def test_base_alone_has_one_column_and_no_tuned_answers() -> None:
    html = render(summary(measured(2), None))
    assert "<th>Base</th></tr>" in html
    assert "<dt>Tuned" not in html


def test_best_come_by_f1_then_low_loss_and_worst_by_f1_then_high_loss() -> None:
    losses = {str(i): float(i) for i in range(20)}
    best, worst = ranked(summary(None, measured(5, losses=losses)), DATASET.examples, 3)
    assert [e.id for e in best] == ["0", "1", "2"]
    assert [e.id for e in worst] == ["19", "18", "17"]


@pytest.mark.parametrize("n_asked", [0, 1, 2, 3])
def test_no_question_is_both_best_and_worst(n_asked: int) -> None:
    best, worst = ranked(summary(None, measured(1)), DATASET.examples[:n_asked], 6)
    assert len(best) + len(worst) == n_asked
    assert not {e.id for e in best} & {e.id for e in worst}


def test_side_by_side_is_spread_over_the_file() -> None:
    assert [e.id for e in evenly(DATASET.examples, 4)] == ["0", "5", "10", "15"]
    assert evenly(DATASET.examples[:2], 4) == list(DATASET.examples[:2])


def test_figures_are_those_of_the_training_report() -> None:
    html = render(summary(measured(2), measured(9)))
    assert html.count("<svg") == 2
    assert "plot-scores" in html
    assert "Answers by quality" in html


def test_labels_have_no_bands() -> None:
    examples = (Example("a", {"text": "t"}, ("World",), ("World", "Sports")),)
    answers = RecordedAnswers({"a": "World"})
    dataset = Dataset("classification", examples, "news.csv")
    html = render(EvaluationSummary("t", "w", dataset, Measured({"accuracy": 100.0}, answers), None))
    assert "Answers by quality" not in html
    assert html.count("<svg") == 1


def test_texts_from_outside_are_escaped() -> None:
    dataset = Dataset("squad", (Example("a", {"context": EVIL, "question": EVIL}, (EVIL,)),), EVIL)
    answered = Measured({"f1": 1.0}, RecordedAnswers({"a": EVIL}))
    facts = AdapterFacts(EVIL, 1, EVIL, "answer")
    html = render(EvaluationSummary(EVIL, EVIL, dataset, answered, answered, facts, {EVIL: EVIL}))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 10


def test_rows_that_nobody_measured_are_left_out() -> None:
    labels = [row.label for row in score_rows(Measured({"f1": 1.0}, RecordedAnswers({})), None)]
    assert labels == ["F1"]


def test_report_without_results_is_refused() -> None:
    with pytest.raises(ValueError, match="without results"):
        render(summary(None, None))


def test_report_is_written_whole(tmp_path: Path) -> None:
    write_report(summary(measured(1), None), tmp_path / "eval.html")
    assert (tmp_path / "eval.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
