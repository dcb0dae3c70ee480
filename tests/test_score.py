"""The scores agree with the official evaluation, on real predictions to the last digit and at its odd edges."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.score import accuracy, exact_match, f1, normalise, percent, squad_version
from fwdllama.tasks.load import load_dataset

words = st.sampled_from(["the", "a", "Denver", "denver", "Broncos", "24\u201310", "it's", "its", "...", "50%", "U.S."])
answers = st.lists(words, max_size=6).map(" ".join)


@pytest.mark.parametrize("system", ["logistic-regression", "bert-ensemble"])
def test_means_equal_those_of_the_official_script_to_the_last_digit(data_dir: Path, system: str) -> None:
    expected = json.loads((data_dir / "squad-dev-sample.expected.json").read_text())
    with gzip.open(data_dir / f"squad-dev-sample.predictions-{system}.json.gz", "rt", encoding="utf-8") as file:
        predictions = json.load(file)
    examples = load_dataset(data_dir / "squad-dev-sample.json.gz").examples
    assert len(examples) == expected["questions"]
    for name, score in (("exact_match", exact_match), ("f1", f1)):
        # a question that a system left out counts as wrong
        scores = [score(predictions[e.id], e.answers) if e.id in predictions else 0.0 for e in examples]
        assert percent(scores) == expected[system][name]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Broncos", "broncos"),
        ("  A  cat, an owl;\tthe\nend ", "cat owl end"),
        ("a-b c.d", "ab cd"),
        ("theatre", "theatre"),
        ("24\u201310", "24\u201310"),
        ("the-a.n", "thean"),
        ("“the” war", "“ ” war"),
        ("!?", ""),
    ],
)
def test_normalisation_drops_ascii_punctuation_then_articles_then_blanks(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_the_best_reference_counts() -> None:
    assert exact_match("Broncos", ["Denver Broncos", "The Broncos"]) == 1.0
    assert f1("Denver Broncos team", ["Broncos", "Denver Broncos"]) == 2 * (2 / 3) * 1.0 / (2 / 3 + 1.0)
    assert f1("Panthers", ["Broncos"]) == 0.0


def test_f1_counts_a_repeated_word_only_as_often_as_it_is_in_the_reference() -> None:
    assert f1("no no no", ["no"]) == 2 * (1 / 3) * 1.0 / (1 / 3 + 1.0)


@pytest.mark.parametrize(("prediction", "score"), [("", 1.0), (" ", 1.0), ("the", 1.0), ("Denver", 0.0)])
def test_a_question_without_answer_is_right_only_if_nothing_is_predicted(prediction: str, score: float) -> None:
    assert exact_match(prediction, ()) == score
    assert f1(prediction, ()) == score
    assert f1(prediction, ("",)) == score
    assert f1(prediction, (), version="2.0") == score


def test_versions_differ_where_an_answer_normalises_to_nothing() -> None:
    assert exact_match("a", ["The"]) == exact_match("a", ["The"], version="2.0") == 1.0
    assert f1("a", ["The"]) == 0.0
    assert f1("a", ["The"], version="2.0") == 1.0
    assert exact_match("", ["The", "Denver"]) == 1.0
    assert exact_match("", ["The", "Denver"], version="2.0") == 0.0
    assert f1("", ["The", "Denver"], version="2.0") == 0.0


@given(answers, st.lists(answers, min_size=1, max_size=3), st.sampled_from(["1.1", "2.0"]))
def test_f1_is_at_least_exact_match_where_words_are_left(prediction: str, references: list[str], version: str) -> None:
    score = f1(prediction, references, version=version)  # type: ignore[arg-type]
    assert 0.0 <= score <= 1.0
    if normalise(prediction):
        assert score >= exact_match(prediction, references, version=version)  # type: ignore[arg-type]


@given(answers, answers)
def test_f1_does_not_tell_prediction_from_reference(one: str, other: str) -> None:
    assert f1(one, [other], version="2.0") == f1(other, [one], version="2.0")


def test_a_set_is_scored_as_v2_if_any_question_has_no_answer() -> None:
    assert squad_version([("x",), ("y", "z")]) == "1.1"
    assert squad_version([("x",), ()]) == "2.0"


def test_percent_adds_one_score_after_the_other() -> None:
    scores = [0.1] * 10  # compensated summation would give 10.0
    assert percent(scores) == 100.0 * 0.9999999999999999 / 10


def test_means_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the mean of no scores is undefined$"):
        percent([])
    with pytest.raises(ValueError, match=r"^the accuracy of no predictions is undefined$"):
        accuracy([], [])


def test_accuracy_is_the_share_of_exact_labels() -> None:
    assert accuracy(["World", "world", "Sports"], ["World", "World", "Sports"]) == 2 / 3
    with pytest.raises(ValueError, match=r"^1 predictions cannot be compared with 2 labels$"):
        accuracy(["World"], ["World", "Sports"])
