"""Classification CSV: labels, columns and headers, and the sentence for each way a file can be wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fwdllama.errors import DataError
from fwdllama.tasks.load import load_dataset
from fwdllama.types import Example

AG_WORDS = ("World", "Sports", "Business", "Technology")
AG_ROWS = '3,Rates rise,"Banks, again"\n1,Vote,Held\n4,Chip, Smaller \n2,Cup,Won\n'
TONE = {"neg": "bad", "pos": "good"}


def write(folder: Path, text: str) -> Path:
    path = folder / "x.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_ag_news_needs_no_options(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, AG_ROWS))
    assert dataset.kind == "classification"
    assert dataset.examples[0] == Example("row-1", {"text": "Rates rise\nBanks, again"}, ("Business",), AG_WORDS)
    assert dataset.examples[2].fields["text"] == "Chip\nSmaller"
    assert [example.answers[0] for example in dataset.examples] == ["Business", "World", "Technology", "Sports"]


def test_a_header_changes_nothing_but_the_row_numbers(tmp_path: Path) -> None:
    plain = load_dataset(write(tmp_path, AG_ROWS)).examples
    headed = load_dataset(write(tmp_path, "Class Index,Title,Description\n" + AG_ROWS)).examples
    assert [example.fields for example in headed] == [example.fields for example in plain]
    assert [example.answers for example in headed] == [example.answers for example in plain]
    assert headed[0].id == "row-2"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("nice film,pos\n", {"label_column": "2"}),
        ("text,label\nnice film,pos\n", {}),
        ("id,Sentiment,review\n7,pos,nice film\n", {}),
        ("tone,review\npos,nice film\n", {"label_column": "tone"}),
        ("tone,review,by\npos,nice film,me\n", {"label_column": "tone", "text_columns": ["review"]}),
        ("review,by,tone\nnice film,me,pos\n", {"label_column": "3", "text_columns": ["review"]}),
        ("me,pos,film,nice\n", {"label_column": "2", "text_columns": ["4", "3"]}),
        ("pos,nice film,\r\n\r\n", {}),
    ],
)
def test_label_and_texts_are_found_by_name_or_number(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    (example,) = load_dataset(write(tmp_path, text), labels=TONE, **options).examples
    assert example.fields["text"].replace("\n", " ") == "nice film"
    assert example.answers == ("good",)
    assert example.choices == ("bad", "good")


def test_a_number_counts_columns_even_where_the_first_label_is_that_number(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, AG_ROWS), label_column="1", text_columns=["3"])
    assert len(dataset.examples) == 4
    assert dataset.examples[0].fields["text"] == "Banks, again"


def test_rows_without_text_are_counted_and_skipped(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, "pos,nice\nneg, \nneg,dull\n"), labels=TONE)
    assert [example.id for example in dataset.examples] == ["row-1", "row-3"]
    assert dataset.skipped == {"without a text": 1}


def test_limit_keeps_the_first_examples_and_still_sees_all_classes(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, AG_ROWS), limit=1)
    assert [example.answers[0] for example in dataset.examples] == ["Business"]


def test_two_classes_are_not_taken_for_ag_news_whatever_the_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the only labels are 1, 2, so these are not AG News's classes 1 to 4"):
        load_dataset(write(tmp_path, "1,a\n2,b\n"), limit=1)


def test_with_given_words_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "pos,nice\nneg,dull\nodd,row\n")
    assert len(load_dataset(path, labels=TONE, limit=2).examples) == 2


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (
            "1,a\n2,b\n",
            {},
            "the only labels are 1, 2, so these are not AG News's classes 1 to 4; give a label word for each.",
        ),
        (
            "1,a\n5,b\n",
            {},
            "row 2 has the unknown label '5'; without given label words only AG News's 1, 2, 3 and 4 are known.",
        ),
        ("pos,a\nodd,b\n", {"labels": TONE}, "row 2 has the unknown label 'odd'; the given ones are neg, pos."),
        (
            "pos,a\n",
            {"labels": {"neg": "bad", "pos": "Bad "}},
            "the classes 'neg' and 'pos' have the same label word 'Bad'.",
        ),
        ("pos,a\n", {"labels": {"neg": " ", "pos": "good"}}, "the label word of class 'neg' is empty."),
        ("pos,a\n", {"labels": {"pos": "good"}}, "classification needs at least two label words, not 1."),
        (
            "pos,a\nneg,b,c\n",
            {"labels": TONE},
            "row 2 has 3 columns, but the first row has 2; a text with commas must be in double quotes.",
        ),
        ('pos,a\nneg,"b" c\n', {"labels": TONE}, "row 2 is not CSV: ',' expected after '\"'."),
        ('pos,a\nneg,"b\npos,c\n', {"labels": TONE}, "row 2 is not CSV: unexpected end of data."),
        (
            "pos,a\n",
            {"labels": TONE, "label_column": "tone"},
            "no column 'tone': there is no header, so use a number from 1 to 2.",
        ),
        (
            "label,text\npos,a\n",
            {"labels": TONE, "text_columns": ["body"]},
            "no column 'body'; the header has label, text.",
        ),
        (
            "pos,a\n",
            {"labels": TONE, "label_column": "3"},
            "no column '3': there is no header, so use a number from 1 to 2.",
        ),
        (
            "label,text\npos,a\n",
            {"labels": TONE, "text_columns": ["label"]},
            "the column 'label' cannot be both the label and a text; name another one.",
        ),
        ("label\npos\n", {"labels": TONE}, "the first row has 1 column, but a label and a text are needed."),
        ("label,text\n", {"labels": TONE}, "there are no examples in it."),
        ("pos,\nneg, \n", {"labels": TONE}, "none of its examples can be used: 2 without a text."),
    ],
)
def test_bad_files_are_refused_with_the_row(tmp_path: Path, text: str, options: dict[str, Any], sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        load_dataset(path, kind="classification", **options)
    assert str(caught.value) == f"{path}: {sentence}"


def test_real_files_are_read_whole(data_dir: Path) -> None:
    dataset = load_dataset(data_dir / "agnews-dev-800.csv.gz")
    assert Counter(example.answers[0] for example in dataset.examples) == dict(
        zip(AG_WORDS, (206, 199, 208, 187), strict=True)
    )
    assert len(load_dataset(data_dir / "agnews-train-3200.csv.gz", limit=100).examples) == 100
