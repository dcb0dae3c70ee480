"""JSONL of prompts and answers: one object a line with `prompt`, and `answer` (a string) or `answers` (a list of them).

A line may name itself with `id`; other keys are ignored, so that files made for other trainers can be used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from fwdllama.errors import DataError
from fwdllama.types import Example


def read_pairs(stream: TextIO, source: str) -> Iterator[Example]:
    """Yield one example a line, with the field `prompt`, reading no further than asked; blank lines are passed over.

    Lines without an id are named `line-N`, from 1.

    Raises:
        DataError: a line is not JSON or not of this shape; the message has its number.
    """
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _example(line, number, f"{source}: line {number}")


def _example(line: str, number: int, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON at column {error.colno}: {error.msg}.") from error
    except (RecursionError, ValueError) as error:  # what the parser refuses although it may be JSON
        raise DataError(f"{where} is not a pair: its brackets are too deep, or a number in it is too long.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} must be an object with the keys 'prompt' and 'answer'.")
    id_ = record.get("id", f"line-{number}")
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise DataError(f"{where}: 'id' must be a string.")
    if "prompt" not in record:
        raise DataError(f"{where} has no key 'prompt'.")
    return Example(str(id_), {"prompt": _text(record["prompt"], "'prompt'", where)}, _answers(record, where))


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answer" in record and "answers" in record:
        raise DataError(f"{where} has both 'answer' and 'answers'; keep one of the two.")
    if "answer" in record:
        return (_text(record["answer"], "'answer'", where),)
    if "answers" not in record:
        raise DataError(f"{where} has no key 'answer' (a string) or 'answers' (a list of strings).")
    answers = record["answers"]
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: 'answers' must be a list of at least one string.")
    return tuple(_text(answer, f"answers[{i}]", where) for i, answer in enumerate(answers))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be a string that is not empty.")
    return value.strip()
