"""The official scores: against figures that the published scripts gave, and against v2.0 cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fwdllama_eval.files import read_json, read_na_probs, read_predictions
from fwdllama_eval.squad import evaluate_v1, evaluate_v2, read_questions, score_questions

from fwdllama.errors import DataError


def squad(*qas: tuple[str, list[str]]) -> dict[str, Any]:
    questions = [{"id": id_, "question": "?", "answers": [{"text": text} for text in texts]} for id_, texts in qas]
    return {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": questions}]}]}


@pytest.mark.parametrize(
    ("system", "missing"), [("logistic-regression", ("5733f309d058e614000b664a",)), ("bert-ensemble", ())]
)
def test_published_predictions_score_as_the_official_script_scored_them(
    data_dir: Path, system: str, missing: tuple[str, ...]
) -> None:
    expected = read_json(data_dir / "squad-dev-sample.expected.json")
    scores = evaluate_v1(
        read_json(data_dir / "squad-dev-sample.json.gz"),
        read_predictions(data_dir / f"squad-dev-sample.predictions-{system}.json.gz"),
    )
    assert scores["exact_match"] == expected[system]["exact_match"]  # to the last digit, hence no approx
    assert scores["f1"] == expected[system]["f1"]
    assert scores["total"] == expected["questions"]
    assert scores["missing"] == missing


def test_v1_scores_a_missing_prediction_zero_and_names_it() -> None:
    scores = evaluate_v1(squad(("a", ["Denver"]), ("b", ["Carolina"])), {"a": "Denver"})
    assert scores == {"exact_match": 50.0, "f1": 50.0, "total": 2, "missing": ("b",)}


def test_v1_counts_an_answer_of_nothing_but_an_article_as_sharing_no_word() -> None:
    scores = evaluate_v1(squad(("a", ["the"])), {"a": "a"})
    assert (scores["exact_match"], scores["f1"]) == (100.0, 0.0)


def test_v1_refuses_a_question_without_answers() -> None:
    with pytest.raises(DataError, match=r"^The question 'b' has no accepted answer, so the data set is SQuAD v2\.0"):
        evaluate_v1(squad(("a", ["x"]), ("b", [])), {"a": "x", "b": ""})


MIXED = squad(("h1", ["Denver Broncos"]), ("h2", ["two"]), ("n1", []), ("n2", []))
SAID = {"h1": "Broncos", "h2": "", "n1": "", "n2": "wrong"}


def test_v2_scores_worked_by_hand() -> None:
    # h1: exact 0, F1 of one shared word of 1 and 2: 2 * 1 * 0.5 / 1.5; h2: declined wrongly; n1: right; n2: wrong
    f1_h1 = 2 * 1.0 * 0.5 / 1.5
    assert evaluate_v2(MIXED, SAID) == {
        "exact": 25.0,
        "f1": 100.0 * (f1_h1 + 1.0) / 4,
        "total": 4,
        "HasAns_exact": 0.0,
        "HasAns_f1": 100.0 * f1_h1 / 2,
        "HasAns_total": 2,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
        "missing": (),
    }


def test_v2_threshold_turns_doubtful_predictions_into_no_answer() -> None:
    na_probs = {"h1": 0.1, "h2": 0.2, "n1": 0.3, "n2": 0.9}
    scores = evaluate_v2(MIXED, SAID, na_probs, threshold=0.5)
    assert (scores["NoAns_exact"], scores["HasAns_exact"]) == (100.0, 0.0)  # n2 is declined now
    assert evaluate_v2(MIXED, SAID, na_probs, threshold=0.9)["NoAns_exact"] == 50.0  # above, not at
    assert evaluate_v2(MIXED, SAID, na_probs, threshold=0.0)["f1"] == 50.0  # all declined


def test_v2_best_thresholds_worked_by_hand() -> None:
    # From "all declined" (2 right of 4): h1 adds its score, h2 nothing, n1 (empty) nothing, n2 takes one away.
    na_probs = {"n2": 0.9, "h1": 0.1, "h2": 0.2, "n1": 0.3}
    scores = evaluate_v2(MIXED, SAID, na_probs)
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50.0, 0.0)  # h1 is not exact: declining stays best
    assert scores["best_f1"] == 100.0 * (2 + 2 * 1.0 * 0.5 / 1.5) / 4
    assert scores["best_f1_thresh"] == 0.1


def test_v2_best_threshold_takes_ties_in_the_order_of_the_probabilities() -> None:
    data, said = squad(("h", ["x"]), ("n", [])), {"h": "x", "n": "y"}
    first_h = evaluate_v2(data, said, {"h": 0.5, "n": 0.5})
    first_n = evaluate_v2(data, said, {"n": 0.5, "h": 0.5})
    assert (first_h["best_exact"], first_h["best_exact_thresh"]) == (100.0, 0.5)
    assert (first_n["best_exact"], first_n["best_exact_thresh"]) == (50.0, 0.0)


def test_v2_leaves_a_missing_prediction_out_and_names_it() -> None:
    scores = evaluate_v2(MIXED, {"h1": "Denver Broncos", "n1": ""})
    assert (scores["exact"], scores["total"], scores["missing"]) == (100.0, 2, ("h2", "n2"))
    assert (scores["HasAns_total"], scores["NoAns_total"]) == (1, 1)


def test_v2_ignores_references_that_normalise_to_nothing() -> None:
    assert evaluate_v2(squad(("a", ["the", "cat"])), {"a": "a"})["exact"] == 0.0
    assert evaluate_v2(squad(("a", ["the"])), {"a": ""})["f1"] == 100.0


def test_v2_gives_only_the_group_that_there_is() -> None:
    scores = evaluate_v2(squad(("a", ["x"])), {"a": "x"})
    assert "NoAns_exact" not in scores
    assert "best_exact" not in scores
    assert scores["HasAns_exact"] == 100.0


def test_v2_wants_a_probability_for_each_prediction() -> None:
    with pytest.raises(DataError, match=r"^The question 'h2' has a prediction but no no-answer probability"):
        evaluate_v2(MIXED, SAID, {"h1": 0.1})


def test_v2_without_any_matching_prediction_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^None of the 4 questions has a prediction"):
        evaluate_v2(MIXED, {"other": "x"})


def test_rules_of_v2_apply_if_any_question_has_no_answer() -> None:
    assert "exact" in score_questions(read_questions(MIXED), SAID)
    assert "exact_match" in score_questions(read_questions(squad(("a", ["x"]))), {})


@pytest.mark.parametrize("data", [[], {"data": [{"paragraphs": [{"qas": [{"id": "a"}]}]}]}, {"data": 3}, {}])
def test_other_json_is_refused_as_no_squad(data: Any) -> None:
    with pytest.raises(DataError, match=r"^The data set is not SQuAD JSON .*is needed\.$"):
        read_questions(data)


def test_no_questions_and_equal_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"holds no question"):
        read_questions({"data": []})
    with pytest.raises(DataError, match=r"two questions with the id 'a'"):
        read_questions(squad(("a", ["x"]), ("a", ["y"])))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", r"not JSON at line 1, column 2"),
        (b"\xff{}", r"not JSON: byte 0 is not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", r"the gzip data is damaged or cut short"),
        (b"[]", r"predictions are a JSON object of question id to answer, but this is a list"),
        (b'{"a": 3}', r"the prediction for 'a' is 3, but must be a string"),
        (b"[" * 100_000, r"brackets are nested too deeply"),
    ],
)
def test_garbage_as_predictions_gives_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_predictions(path)


def test_absent_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file\.$"):
        read_predictions(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "true", '"0.5"'])
def test_probabilities_must_be_numbers(tmp_path: Path, value: str) -> None:
    path = tmp_path / "na.json"
    path.write_text(f'{{"a": {value}}}')
    with pytest.raises(DataError, match=r"no-answer probability of 'a' is"):
        read_na_probs(path)
    path.write_text(json.dumps({"a": 0.5, "b": 1}))
    assert read_na_probs(path) == {"a": 0.5, "b": 1}
