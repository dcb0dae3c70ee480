"""Any data file, plain or gzip, as a `Dataset`; and part of a dataset held out.

Both the compression and the kind are told from the content, never from the name: data sets are renamed more often
than not. A file is opened once and read forward only, so pipes work too, and no more examples are kept than asked.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, TextIO

from fwdllama.errors import DataError, UsageError
from fwdllama.tasks import Kind
from fwdllama.tasks.classification import read_classification
from fwdllama.tasks.pairs import read_pairs
from fwdllama.tasks.squad import read_squad
from fwdllama.types import Dataset, Example

_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 1 << 16


def load_dataset(
    path: Path,
    *,
    kind: Literal["auto", "squad", "pairs", "classification"] = "auto",
    labels: Mapping[str, str] | None = None,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Read the first `limit` usable examples of a file, in its order, with ids made unique.

    `labels` ({class: word}), `text_columns` and `label_column` are for classification only. `skipped` counts what was
    left out of the part that was read. An id that occurs again gets `#2`, `#3`, ... appended.

    Raises:
        DataError: the file cannot be read, or what it holds cannot be used.
        UsageError: `limit` is less than 1, or options for classification were given for another kind.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit of examples is {limit}, but must be at least 1.")
    source = str(path)
    skipped: Counter[str] = Counter()
    with _open(path) as (stream, head):
        if not head.strip():
            raise DataError(f"{source}: the file is empty.")
        found = _detect(head, source) if kind == "auto" else kind
        examples: Iterator[Example]
        if found == "classification":
            examples = read_classification(
                stream,
                source,
                skipped,
                labels=labels,
                text_columns=text_columns,
                label_column=label_column,
                limit=limit,
            )
        elif labels is not None or text_columns is not None or label_column is not None:
            raise UsageError(f"{source}: label words and columns are for classification, but this is {found} data.")
        else:
            read = read_squad(stream, source, skipped) if found == "squad" else read_pairs(stream, source)
            examples = islice(read, limit)
        kept = tuple(_unique(_encodable(example, source) for example in examples))
    if not kept:
        raise DataError(f"{source}: {_nothing_left(skipped)}.")
    return Dataset(found, kept, source, dict(skipped))


def split_by_group(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out about `fraction` of the examples, as (train, held out), each in the order of the file.

    Questions on one paragraph stay together, since seeing a paragraph's other questions in training helps with its
    own; of other kinds every example stands alone. Groups are drawn in the order of a hash of seed and content, which
    is the same on every machine, until `fraction` is reached; one group always stays for training.

    Raises:
        UsageError: `fraction` is not between 0 and 1.
        DataError: there is one group only.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"The fraction to hold out is {fraction}, but must be between 0 and 1.")
    by_context = dataset.kind == "squad"
    keys = [example.fields["context"] if by_context else example.id for example in dataset.examples]
    sizes = Counter(keys)
    if len(sizes) < 2:
        what = "paragraph" if by_context else "example"
        raise DataError(f"{dataset.source}: nothing can be held out of a single {what}; at least two are needed.")
    held_out: set[str] = set()
    n_held_out = 0
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())[:-1]:
        if n_held_out >= fraction * len(keys):
            break
        held_out.add(key)
        n_held_out += sizes[key]
    pairs = list(zip(keys, dataset.examples, strict=True))
    train = tuple(example for key, example in pairs if key not in held_out)
    return (
        replace(dataset, examples=train),
        replace(dataset, examples=tuple(example for key, example in pairs if key in held_out), skipped={}),
    )


@contextmanager
def _open(path: Path) -> Iterator[tuple[TextIO, str]]:
    """The file as text, not yet read from, and its beginning; whatever goes wrong in reading becomes a DataError."""
    try:
        with path.open("rb", buffering=0) as file:
            raw = io.BufferedReader(file, _HEAD_BYTES)
            compressed = raw.peek(2).startswith(_GZIP)
            plain = io.BufferedReader(gzip.GzipFile(fileobj=raw), _HEAD_BYTES) if compressed else raw
            head = plain.peek(_HEAD_BYTES).decode("utf-8-sig", errors="ignore")
            # newline="": the csv module needs line ends as they are; the other readers do not mind
            yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline=""), head
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, not a data file.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short; fetch or compress the file again.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: not UTF-8 text (byte 0x{byte:02x}); data must be UTF-8, plain or gzip.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _detect(head: str, source: str) -> Kind:
    """Which kind a file is, from its beginning.

    In JSON a quote inside a string is escaped, so `"prompt":` can only be a key, and so can `"data": [`.
    """
    text = head.lstrip()
    if text.startswith(("{", "[")):
        key = re.search(r'"(?:(prompt)"\s*:|paragraphs"\s*:|data"\s*:\s*\[)', text)
        if key is not None:
            return "pairs" if key[1] else "squad"
        several_objects = re.match(r"\{[^\n]*\}\s*\n\s*\{", text) is not None
        return "pairs" if several_objects else "squad"
    if "," not in text:
        begins = text.splitlines()[0][:20]
        kinds = "neither SQuAD JSON, nor JSONL of prompts and answers, nor CSV with labels"
        raise DataError(f"{source}: {kinds}; it begins {begins!r}.")
    return "classification"


def _unique(examples: Iterable[Example]) -> Iterator[Example]:
    taken: set[str] = set()
    occurrences: Counter[str] = Counter()
    for example in examples:
        id_ = example.id
        while id_ in taken:
            occurrences[example.id] += 1
            id_ = f"{example.id}#{occurrences[example.id] + 1}"
        taken.add(id_)
        yield example if id_ == example.id else replace(example, id=id_)


def _encodable(example: Example, source: str) -> Example:
    """The example itself; half a surrogate pair, which JSON escapes can spell, would stop the tokeniser much later."""
    try:
        for text in (example.id, *example.fields.values(), *example.answers):
            text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{source}: example {example.id!a} holds half a character, {half}.") from error
    return example


def _nothing_left(skipped: Mapping[str, int]) -> str:
    if not skipped:
        return "there are no examples in it"
    return "none of its examples can be used: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items())
