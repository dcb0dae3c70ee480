"""What of a SQuAD file becomes an example, what is skipped, and what is refused with which sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import DataError
from fwdllama.tasks.load import load_dataset

PARAGRAPH = "Denver beat Carolina 24\u201310 in Santa Clara."


def squad(*questions: dict[str, Any], version: str | None = "1.1", context: Any = PARAGRAPH) -> dict[str, Any]:
    root = {"data": [{"title": "Bowl", "paragraphs": [{"context": context, "qas": list(questions)}]}]}
    return root if version is None else {"version": version, **root}


def question(*texts: str, **more: Any) -> dict[str, Any]:
    return {"id": "q", "question": "Who won?", "answers": [{"text": t, "answer_start": 0} for t in texts], **more}


def write(folder: Path, root: Any) -> Path:
    path = folder / "x.json"
    path.write_text(root if isinstance(root, str) else json.dumps(root), encoding="utf-8")
    return path


def test_all_reference_answers_are_kept_in_order(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, squad(question("Denver", "Denver Broncos", "Denver"))))
    (example,) = dataset.examples
    assert dataset.kind == "squad"
    assert dataset.skipped == {}
    assert example.id == "q"
    assert example.fields == {"context": PARAGRAPH, "question": "Who won?"}
    assert example.answers == ("Denver", "Denver Broncos", "Denver")
    assert example.choices == ()


def test_surrounding_blanks_are_dropped(tmp_path: Path) -> None:
    root = squad(question(" Denver\n", question="  Who won? "), context=f"{PARAGRAPH} \n")
    (example,) = load_dataset(write(tmp_path, root)).examples
    assert example.fields == {"context": PARAGRAPH, "question": "Who won?"}
    assert example.answers == ("Denver",)


def test_impossible_questions_of_v2_have_no_answers_and_are_not_skipped(tmp_path: Path) -> None:
    impossible = {"id": "i", "question": "Why?", "is_impossible": True, "plausible_answers": [{"text": "Denver"}]}
    root = squad(question("Denver", is_impossible=False), impossible, question(id="e"), version="v2.0")
    dataset = load_dataset(write(tmp_path, root))
    assert [(example.id, example.answers) for example in dataset.examples] == [("q", ("Denver",)), ("i", ()), ("e", ())]
    assert dataset.skipped == {}


@pytest.mark.parametrize("version", ["1.1", None])
def test_v1_questions_without_answer_or_words_are_counted_and_skipped(tmp_path: Path, version: str | None) -> None:
    root = squad(question(), question(" "), question("x", question=" "), question("Denver", id="d"), version=version)
    dataset = load_dataset(write(tmp_path, root))
    assert [example.id for example in dataset.examples] == ["d"]
    assert dataset.skipped == {"without an answer": 2, "with an empty question": 1}


def test_a_v2_question_said_to_be_possible_but_without_answer_is_skipped(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, squad(question(is_impossible=False), question("Denver"), version="v2.0")))
    assert dataset.skipped == {"without an answer": 1}


def test_missing_ids_are_made_up_from_the_place_in_the_file(tmp_path: Path) -> None:
    nameless = question("Denver")
    del nameless["id"]
    dataset = load_dataset(write(tmp_path, squad(question("x", id=7), question(), nameless)))
    assert [example.id for example in dataset.examples] == ["7", "question-3"]


def without(node: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != key}


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ('{\n "data": [,]}', "not JSON at line 2, column 11: Expecting value."),
        ('{"data": [', "not JSON at line 1, column 11: Expecting value."),
        ('{"data": [' + "[" * 100_000, "not SQuAD data: its brackets are too deep, or a number in it is too long."),
        ('{"data": [' + "9" * 5000 + "]}", "not SQuAD data: its brackets are too deep, or a number in it is too long."),
        ([1], "SQuAD data is an object with the key 'data', but this file holds a list."),
        ({"version": "1.1"}, "the top level has no key 'data'."),
        ({"data": {}}, "data is an object, but must be a list."),
        ({"data": [3]}, "data[0] is a number, but must be an object with the key 'paragraphs'."),
        ({"data": [{"title": "x"}]}, "data[0] has no key 'paragraphs'."),
        (squad(context=None), "data[0].paragraphs[0].context is null, but must be a string."),
        (
            squad(question("x"), without(question("x"), "question")),
            "data[0].paragraphs[0].qas[1] has no key 'question'.",
        ),
        (squad(without(question("x"), "answers")), "data[0].paragraphs[0].qas[0] has no key 'answers'."),
        (squad(question("x", answers="x")), "data[0].paragraphs[0].qas[0].answers is a string, but must be a list."),
        (
            squad(question("x", answers=[{"text": "x"}, {"text": True}])),
            "data[0].paragraphs[0].qas[0].answers[1].text is a truth value, but must be a string.",
        ),
        (squad(question("x", id=None)), "data[0].paragraphs[0].qas[0].id is null, but must be a string."),
        (
            squad(question("x", is_impossible="no")),
            "data[0].paragraphs[0].qas[0].is_impossible is a string, but must be true or false.",
        ),
        (
            squad(question("x", is_impossible=True)),
            "data[0].paragraphs[0].qas[0] has is_impossible true, but also the answer 'x'; keep one of the two.",
        ),
        (squad(), "there are no examples in it."),
        (squad(question(), question(id="r")), "none of its examples can be used: 2 without an answer."),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, root: Any, sentence: str) -> None:
    path = write(tmp_path, root)
    with pytest.raises(DataError) as caught:
        load_dataset(path, kind="squad")
    assert str(caught.value) == f"{path}: {sentence}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["data", "paragraphs", "qas", "context", "question", "answers", "text", "id", "is_impossible"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=30,
)


@given(json_values)
def test_any_json_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = write(tmp_path_factory.getbasetemp(), {"data": value})
    refusal = None
    try:
        assert load_dataset(path, kind="squad").examples
    except DataError as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith(f"{path}: ") and "\n" not in refusal)


def test_real_files_are_read_whole(data_dir: Path) -> None:
    train = load_dataset(data_dir / "squad-train-4000.json.gz")
    assert (train.kind, len(train.examples), train.skipped) == ("squad", 4000, {})
    assert len({example.fields["context"] for example in train.examples}) == 800
    dev = load_dataset(data_dir / "squad-dev-sample.json.gz")
    assert dev.examples[0].id == "56be4db0acb8001400a502ec"
    assert dev.examples[0].answers == ("Denver Broncos",) * 3
