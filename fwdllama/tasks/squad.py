"""SQuAD v1.1 and v2.0 JSON, read into examples with the fields `context` and `question`.

`answer_start` is not read: training needs the text of an answer, not its place, and rebuilt files often have it
wrong. Whether a question without answers is unanswerable (v2.0) or merely unusable (v1.1) is decided by its
`is_impossible`, and by the file's `version` where that is absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from fwdllama.errors import DataError
from fwdllama.types import Example

NO_ANSWER = "without an answer"
NO_QUESTION = "with an empty question"

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}


def read_squad(stream: TextIO, source: str, skipped: Counter[str]) -> Iterator[Example]:
    """Yield the questions of a SQuAD file in its order; what is left out is counted in `skipped` under its reason.

    Surrounding blanks of contexts, questions and answers are dropped (every thirtieth SQuAD question has some).
    Questions without an id are named `question-N` by their place in the file, from 1.

    Raises:
        DataError: the file is not JSON, or not of this shape; the message names the place, as `data[0].paragraphs[2]`.
    """
    root = _parse(stream, source)
    if not isinstance(root, dict):
        raise DataError(f"{source}: SQuAD data is an object with the key 'data', but this file holds {_name(root)}.")
    version_2 = str(root.get("version", "")).lower().lstrip("v").startswith("2")
    number = 0
    for a, article in enumerate(_items(root, "data", "", source)):
        for p, paragraph in enumerate(_items(article, "paragraphs", f"data[{a}]", source)):
            where = f"data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, where, source).strip()
            for q, question in enumerate(_items(paragraph, "qas", where, source)):
                number += 1
                example = _example(question, context, version_2, f"{where}.qas[{q}]", source, number)
                if not example.fields["question"]:
                    skipped[NO_QUESTION] += 1
                elif not example.answers and not _impossible(question, version_2):
                    skipped[NO_ANSWER] += 1
                else:
                    yield example


def _example(node: Any, context: str, version_2: bool, where: str, source: str, number: int) -> Example:
    question = _get(node, "question", str, where, source).strip()
    id_ = node.get("id", f"question-{number}")
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise DataError(f"{source}: {where}.id is {_name(id_)}, but must be a string.")
    impossible = node.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{source}: {where}.is_impossible is {_name(impossible)}, but must be true or false.")
    references = _items(node, "answers", where, source) if "answers" in node or not _impossible(node, version_2) else []
    texts = [_get(answer, "text", str, f"{where}.answers[{i}]", source).strip() for i, answer in enumerate(references)]
    answers = tuple(text for text in texts if text)
    if answers and impossible:
        both = f"is_impossible true, but also the answer {answers[0]!r}"
        raise DataError(f"{source}: {where} has {both}; keep one of the two.")
    return Example(str(id_), {"context": context, "question": question}, answers)


def _impossible(node: dict[str, Any], version_2: bool) -> bool:
    return bool(node.get("is_impossible", version_2))


def _parse(stream: TextIO, source: str) -> Any:
    text = stream.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (RecursionError, ValueError) as error:  # what the parser refuses although it may be JSON
        reason = "its brackets are too deep, or a number in it is too long"
        raise DataError(f"{source}: not SQuAD data: {reason}.") from error


def _items(node: Any, key: str, where: str, source: str) -> list[Any]:
    items: list[Any] = _get(node, key, list, where, source)
    return items


def _get(node: Any, key: str, kind: type, where: str, source: str) -> Any:
    """`node[key]`, which must be of `kind`; `where` is the path to `node`, empty at the top."""
    if not isinstance(node, dict):
        raise DataError(f"{source}: {where} is {_name(node)}, but must be an object with the key {key!r}.")
    if key not in node:
        raise DataError(f"{source}: {where or 'the top level'} has no key {key!r}.")
    if not isinstance(node[key], kind):
        path = f"{where}.{key}" if where else key
        raise DataError(f"{source}: {path} is {_name(node[key])}, but must be {_KINDS[kind]}.")
    return node[key]


def _name(value: Any) -> str:
    return _KINDS.get(type(value), "null")
