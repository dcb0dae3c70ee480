"""Classification CSV: a class and one or more texts a row, read into examples with the field `text` and label words.

With or without a header; AG News's own layout (class index, title, description) needs no options. Its words are built
in, but used only if the file's classes are exactly 1 to 4: a file of classes 1 and 2 is as likely to be polarity, and
training it on the words World and Sports would succeed and be wrong. Telling that takes the whole file, so without
given words it is read to its end, keeping no more examples than asked.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from fwdllama.errors import DataError
from fwdllama.types import Example

AG_NEWS: Mapping[str, str] = {"1": "World", "2": "Sports", "3": "Business", "4": "Technology"}

NO_TEXT = "without a text"

_LABEL_NAMES = ("label", "class", "class index", "class_index", "category", "sentiment", "target", "intent")
_INDEX_NAMES = ("", "id", "idx", "index")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, from 0; `header` says whether the first row holds their names rather than an example."""

    label: int
    texts: tuple[int, ...]
    header: bool
    count: int


def read_classification(
    stream: TextIO,
    source: str,
    skipped: Counter[str],
    *,
    labels: Mapping[str, str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    limit: int | None = None,
) -> Iterator[Example]:
    """Yield one example a row, at most `limit`; `choices` are the label words in the order of `labels`.

    Columns are named as in the header, or counted from 1. By default the label is in the column with a usual name
    (label, class, category, ...) or else in the first one, and all others but an id are joined, a line each, into the
    text. Rows are named `row-N`, from 1, as a spreadsheet shows them.

    Raises:
        DataError: a row, a column, a label or the given label words cannot be used.
    """
    words = _label_words(AG_NEWS if labels is None else labels, source)
    choices = tuple(words.values())
    columns: Columns | None = None
    seen: set[str] = set()
    kept = 0
    for number, row in _rows(stream, source):
        if columns is None:
            columns = find_columns(row, source, text_columns=text_columns, label_column=label_column)
            if columns.header:
                continue
        if len(row) != columns.count:
            widths = f"{_count(len(row), 'column')}, but the first row has {columns.count}"
            raise DataError(f"{source}: row {number} has {widths}; a text with commas must be in double quotes.")
        label = row[columns.label].strip()
        if label not in words:
            raise DataError(f"{source}: row {number} has the unknown label {label!r}; {_known(labels)}.")
        seen.add(label)
        text = "\n".join(filter(None, (row[column].strip() for column in columns.texts)))
        if not text:
            skipped[NO_TEXT] += 1
        elif limit is None or kept < limit:
            kept += 1
            yield Example(f"row-{number}", {"text": text}, (words[label],), choices)
        if labels is not None and kept == limit:
            return
    if labels is None and seen and len(seen) < len(AG_NEWS):
        found = ", ".join(sorted(seen))
        reason = "so these are not AG News's classes 1 to 4"
        raise DataError(f"{source}: the only labels are {found}, {reason}; give a label word for each.")


def find_columns(
    first_row: Sequence[str], source: str, *, text_columns: Sequence[str] | None, label_column: str | None
) -> Columns:
    """Decide from the first row, and from what the user named, which columns are what.

    The row is a header if it has a column named by the user, or a usual name for the label. A number always counts
    columns: in a file without a header it may well be the first row's label.

    Raises:
        DataError: a named column does not exist, is named twice, or nothing is left for the text.
    """
    names = [cell.strip() for cell in first_row]
    lower = [name.lower() for name in names]
    named = [*(text_columns or ()), *([label_column] if label_column is not None else [])]
    usual_names = [name for name in _LABEL_NAMES if name in lower]
    header = bool(usual_names) or any(name in names and not name.isdecimal() for name in named)
    usual = lower.index(usual_names[0]) if usual_names else 0
    label = usual if label_column is None else _column(label_column, names, header, source)
    if text_columns is not None:
        texts = tuple(_column(name, names, header, source) for name in text_columns)
    else:
        indexes = _INDEX_NAMES if header else ()
        texts = tuple(i for i, name in enumerate(lower) if i != label and name not in indexes)
    if label in texts:
        raise DataError(f"{source}: the column {names[label]!r} cannot be both the label and a text; name another one.")
    if not texts:
        width = _count(len(names), "column")
        raise DataError(f"{source}: the first row has {width}, but a label and a text are needed.")
    return Columns(label, texts, header, len(names))


def _column(name: str, names: Sequence[str], header: bool, source: str) -> int:
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    if name in names:
        return names.index(name)
    if not header:
        raise DataError(f"{source}: no column {name!r}: there is no header, so use a number from 1 to {len(names)}.")
    raise DataError(f"{source}: no column {name!r}; the header has {', '.join(names)}.")


def _label_words(labels: Mapping[str, str], source: str) -> dict[str, str]:
    """The given words without surrounding blanks, by class; two classes with one word could not be told apart."""
    words: dict[str, str] = {}
    for label, given in labels.items():
        word = given.strip()
        if not word:
            raise DataError(f"{source}: the label word of class {label!r} is empty.")
        other = next((known for known in words if words[known].casefold() == word.casefold()), None)
        if other is not None:
            raise DataError(f"{source}: the classes {other!r} and {label!r} have the same label word {word!r}.")
        words[label.strip()] = word
    if len(words) < 2:
        raise DataError(f"{source}: classification needs at least two label words, not {len(words)}.")
    return words


def _known(labels: Mapping[str, str] | None) -> str:
    if labels is None:
        return "without given label words only AG News's 1, 2, 3 and 4 are known"
    return f"the given ones are {', '.join(labels)}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _rows(stream: TextIO, source: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with their numbers from 1; `strict`, since lax quoting swallows rows silently."""
    reader = csv.reader(stream, strict=True)
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{source}: row {number} is not CSV: {error}.") from error
        if row:
            yield number, row
