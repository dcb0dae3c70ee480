"""Files of any kind and compression are told by content; groups are held out whole and the same everywhere."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import DataError, UsageError
from fwdllama.tasks.load import load_dataset, split_by_group
from fwdllama.types import Dataset, Example

PAIR = '{"prompt": "Say \\"data\\": [1]", "answer": "x"}\n'
QUESTION = {"id": "q", "question": 'Is "prompt": a key?', "answers": [{"text": "no", "answer_start": 0}]}
SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "c, d", "qas": [QUESTION]}]}]}
CSV = "1,a\n2,b\n3,c\n4,d\n"

CONTENTS = [
    ("squad", json.dumps(SQUAD)),
    ("squad", json.dumps(SQUAD, indent=1)),
    ("squad", json.dumps({"data": SQUAD["data"]}) + "\n"),
    ("pairs", PAIR),
    ("pairs", "\n" + PAIR * 3),
    ("pairs", '{"data": "x", "prompt": "y", "answer": "z"}\n'),
    ("classification", CSV),
    ("classification", CSV.replace("\n", "\r\n")),
]


@pytest.mark.parametrize(("kind", "text"), CONTENTS)
@pytest.mark.parametrize("name", ["x.json", "x.csv.gz"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_kind_and_compression_are_told_from_content(
    tmp_path: Path, kind: str, text: str, name: str, compressed: bool, bom: str
) -> None:
    data = (bom + text).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if compressed else data)
    dataset = load_dataset(path)
    assert dataset.kind == kind
    assert dataset.source == str(path)
    assert dataset.examples


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(PAIR.encode()),))
    writer.start()
    assert load_dataset(pipe).kind == "pairs"
    writer.join()


def test_a_file_longer_than_the_first_look_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(PAIR * 5000)
    assert len(load_dataset(path).examples) == 5000


def test_repeated_ids_are_made_unique(tmp_path: Path) -> None:
    path = tmp_path / "x"
    ids = ["a", "a", "a#2", "a", "line-2"]
    path.write_text("".join(json.dumps({"prompt": "p", "answer": "x", "id": id_}) + "\n" for id_ in ids))
    assert [example.id for example in load_dataset(path).examples] == ["a", "a#2", "a#2#2", "a#3", "line-2"]


def test_limit_takes_the_first_examples_in_file_order(data_dir: Path) -> None:
    path = data_dir / "squad-dev-sample.json.gz"
    assert load_dataset(path, limit=400).examples == load_dataset(path).examples[:400]


def damaged_gzip(at: int) -> bytes:
    data = bytearray(gzip.compress(PAIR.encode() * 9))
    data[at] ^= 0xFF
    return bytes(data)


GZIP_SENTENCE = "the gzip data is damaged or cut short; fetch or compress the file again."


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "the file is empty."),
        (b" \n\n", "the file is empty."),
        (gzip.compress(b""), "the file is empty."),
        (gzip.compress(PAIR.encode() * 9)[:-9], GZIP_SENTENCE),
        (gzip.compress(PAIR.encode())[:5], GZIP_SENTENCE),
        (damaged_gzip(2), GZIP_SENTENCE),
        (damaged_gzip(20), GZIP_SENTENCE),
        (damaged_gzip(-5), GZIP_SENTENCE),
        ('{"prompt": "é"'.encode("latin-1"), "not UTF-8 text (byte 0xe9); data must be UTF-8, plain or gzip."),
        (CSV.encode("utf-16"), "not UTF-8 text (byte 0xff); data must be UTF-8, plain or gzip."),
        (
            b"Once upon a time there was\n",
            "neither SQuAD JSON, nor JSONL of prompts and answers, nor CSV with labels; "
            "it begins 'Once upon a time the'.",
        ),
        (b'{"question": "x"}\n{"question": "y"}\n', "line 1 has no key 'prompt'."),
        (b'{"title": "x"}\n', "the top level has no key 'data'."),
        (b"[]", "SQuAD data is an object with the key 'data', but this file holds a list."),
        (b'{"prompt": "\\ud83d", "answer": "x"}', "example 'line-1' holds half a character, \\ud83d."),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_dataset(path)
    assert str(caught.value) == f"{path}: {sentence}"


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path / "none.json")
    assert str(caught.value) == f"{tmp_path / 'none.json'}: no such file."
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a folder, not a data file."
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path / ("x" * 300))
    assert str(caught.value) == f"{tmp_path / ('x' * 300)}: cannot be read: File name too long."


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, compressed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(gzip.compress(data) if compressed else data)
    refusal = None
    try:
        assert load_dataset(path).examples
    except DataError as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith(f"{path}: ") and "\n" not in refusal)


@pytest.mark.parametrize("options", [{"labels": {"1": "x", "2": "y"}}, {"text_columns": ["2"]}, {"label_column": "1"}])
def test_options_for_classification_are_refused_elsewhere(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "x"
    path.write_text(PAIR)
    with pytest.raises(UsageError) as caught:
        load_dataset(path, **options)
    assert str(caught.value) == f"{path}: label words and columns are for classification, but this is pairs data."


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^The limit of examples is 0, but must be at least 1\.$"):
        load_dataset(tmp_path / "x", limit=0)


def dataset(sizes: list[int]) -> Dataset:
    """`sizes[i]` questions on paragraph i, those of different paragraphs interleaved."""
    places = sorted((n, p) for p, size in enumerate(sizes) for n in range(size))
    examples = (Example(f"{p}-{n}", {"context": f"paragraph {p}", "question": "?"}, ("x",)) for n, p in places)
    return Dataset("squad", tuple(examples), "x.json", {"without an answer": 1})


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_paragraphs_are_held_out_whole_and_in_file_order(sizes: list[int], fraction: float, seed: int) -> None:
    whole = dataset(sizes)
    train, held_out = split_by_group(whole, fraction, seed)
    contexts = [{example.fields["context"] for example in part.examples} for part in (train, held_out)]
    assert contexts[0]
    assert contexts[1]
    assert contexts[0].isdisjoint(contexts[1])
    in_train = set(map(id, train.examples))
    assert train.examples == tuple(e for e in whole.examples if id(e) in in_train)
    assert held_out.examples == tuple(e for e in whole.examples if id(e) not in in_train)
    largest = max(sizes)
    assert abs(len(held_out.examples) - fraction * len(whole.examples)) <= largest


def test_a_split_is_the_same_on_every_machine_and_differs_by_seed() -> None:
    whole = dataset([1] * 12)
    ids = [[e.id for e in split_by_group(whole, 0.25, seed)[1].examples] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] == ["3-0", "7-0", "10-0"]
    assert ids[2] != ids[0]


def test_skipped_questions_are_reported_once() -> None:
    train, held_out = split_by_group(dataset([2, 2]), 0.5, 0)
    assert train.skipped == {"without an answer": 1}
    assert held_out.skipped == {}


def test_other_kinds_are_held_out_example_by_example() -> None:
    examples = tuple(Example(f"line-{n}", {"prompt": "the same"}, ("x",)) for n in range(10))
    train, held_out = split_by_group(Dataset("pairs", examples, "x.jsonl"), 0.3, 5)
    assert (len(train.examples), len(held_out.examples)) == (7, 3)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        split_by_group(dataset([5]), 0.2, 0)
    assert str(caught.value) == "x.json: nothing can be held out of a single paragraph; at least two are needed."
    pair = Dataset("pairs", (Example("line-1", {"prompt": "p"}, ("x",)),), "x.jsonl")
    with pytest.raises(DataError) as caught:
        split_by_group(pair, 0.2, 0)
    assert str(caught.value) == "x.jsonl: nothing can be held out of a single example; at least two are needed."
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError) as usage:
            split_by_group(dataset([1, 1]), fraction, 0)
        assert str(usage.value) == f"The fraction to hold out is {fraction}, but must be between 0 and 1."
