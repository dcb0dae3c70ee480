"""JSONL of prompts and answers: what is read, and the sentence for each way a line can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import DataError
from fwdllama.tasks.load import load_dataset
from fwdllama.types import Example

visible = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


def test_one_or_several_answers_make_an_example(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "Say hi", "answer": " hi ", "note": 1}\n\n{"answers": ["a", "b"], "prompt": "Say a", "id": "n"}\n'
    )
    dataset = load_dataset(path)
    assert dataset.kind == "pairs"
    assert dataset.examples == (
        Example("line-1", {"prompt": "Say hi"}, ("hi",)),
        Example("n", {"prompt": "Say a"}, ("a", "b")),
    )


@given(st.lists(st.tuples(visible, st.lists(visible, min_size=1, max_size=3)), min_size=1, max_size=5), st.booleans())
def test_any_text_survives_but_for_its_margins(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, list[str]]], ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    lines = [json.dumps({"prompt": p, "answers": a}, ensure_ascii=ascii_only) + "\n" for p, a in pairs]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    read = [(example.fields["prompt"], list(example.answers)) for example in load_dataset(path).examples]
    assert read == [(prompt.strip(), [answer.strip() for answer in answers]) for prompt, answers in pairs]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": }', " is not JSON at column 12: Expecting value."),
        ("[" * 100_000, " is not a pair: its brackets are too deep, or a number in it is too long."),
        ('["prompt"]', " must be an object with the keys 'prompt' and 'answer'."),
        ('{"answer": "x"}', " has no key 'prompt'."),
        ('{"prompt": "x"}', " has no key 'answer' (a string) or 'answers' (a list of strings)."),
        ('{"prompt": " ", "answer": "x"}', ": 'prompt' must be a string that is not empty."),
        ('{"prompt": "x", "answer": 42}', ": 'answer' must be a string that is not empty."),
        ('{"prompt": "x", "answers": []}', ": 'answers' must be a list of at least one string."),
        ('{"prompt": "x", "answers": "y"}', ": 'answers' must be a list of at least one string."),
        ('{"prompt": "x", "answers": ["y", ""]}', ": answers[1] must be a string that is not empty."),
        ('{"prompt": "x", "answers": ["y"], "answer": "y"}', " has both 'answer' and 'answers'; keep one of the two."),
        ('{"prompt": "x", "answer": "y", "id": null}', ": 'id' must be a string."),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        load_dataset(path)
    assert str(caught.value) == f"{path}: line 3{sentence}"


def test_lines_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n{"prompt": "x", "answer": "y"}\nbroken\n')
    assert len(load_dataset(path, limit=2).examples) == 2
    with pytest.raises(DataError, match=r"line 3 is not JSON at column 1: Expecting value\.$"):
        load_dataset(path, limit=3)
