"""What an oracle holds of an example in a row of its batch, and which rows are computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError
from fwdllama.types import Encoded


@dataclass
class Row:
    """What a loss decodes for one example: tokens behind the prompt, and which of them predict the target."""

    start: int  # position of the first invocation token
    tokens: NDArray[np.int32] | NDArray[np.float32]  # invocation + target[:-1], or what they are at the entrance of the top
    first: int  # index in tokens of the one that predicts target[0]
    target: NDArray[np.int32]  # this and `choices` by their places among the tokens that have logits
    choices: NDArray[np.int32]

    def cut(self, n_targets: int | None) -> Row:
        """The row of its first `n_targets` target tokens alone, None: of all; what would only predict the others is not decoded."""
        if n_targets is None or n_targets >= len(self.target):
            return self
        return replace(self, tokens=self.tokens[: self.first + n_targets], target=self.target[:n_targets])


@dataclass(frozen=True)
class Decode:
    """What one decode is given for several sequences of one padded length, each array in the order of its tokens."""

    tokens: NDArray[np.int32] | NDArray[np.float32]  # (n,), or (n, n_embd) at the entrance of a top
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    wants: NDArray[np.int8]  # whose logits are computed


def laid(sequences: Sequence[int], rows: Sequence[Row], even: tuple[int, int] | None = None) -> Decode:
    """Rows in the sequences given, shorter ones padded; `even` is a number of equal parts, and how many logits each of them must ask for."""
    width = max(len(row.tokens) for row in rows)
    shape = (len(rows), width)
    tokens = np.zeros((*shape, *rows[0].tokens.shape[1:]), rows[0].tokens.dtype)
    wants = np.zeros(shape, np.int8)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        wants[i, row.first : len(row.tokens)] = 1
    if even:
        for part in wants.reshape(even[0], -1):
            part[np.flatnonzero(part == 0)[: even[1] - int(part.sum())]] = 1
    positions = np.add.outer([row.start for row in rows], np.arange(width)).astype(np.int32)
    flat: NDArray[np.int32] | NDArray[np.float32] = tokens.reshape(len(rows) * width, *tokens.shape[2:])
    return Decode(flat, positions.ravel(), np.repeat(np.array(sequences, np.int32), width), wants.ravel())


def row_of(example: Encoded, shortlist: NDArray[np.int32] | None = None) -> Row:
    """The example's, while what enters the top is not known; `shortlist` are the tokens, ascending, that have logits.

    Raises:
        DataError: another one is asked for.
    """
    return Row(
        len(example.prompt),
        np.array(example.invocation + example.target[:-1], np.int32),
        len(example.invocation) - 1,
        _places(example, example.target, shortlist),
        _places(example, example.choices, shortlist),
    )


def _places(example: Encoded, tokens: tuple[int, ...], shortlist: NDArray[np.int32] | None) -> NDArray[np.int32]:
    wanted = np.array(tokens, np.int32)
    if shortlist is None:
        return wanted
    places = np.searchsorted(shortlist, wanted).astype(np.int32)
    missing = wanted[shortlist[np.minimum(places, len(shortlist) - 1)] != wanted]
    if len(missing):
        raise DataError(f"example {example.id}: token {missing[0]} of its answer is not among the {len(shortlist)} whose logits are computed.")
    return places


def n_behind(example: Encoded) -> int:
    """Tokens that a loss decodes behind the example's prompt."""
    return len(example.invocation) + len(example.target) - 1


Moves = list[tuple[int, int]]  # (old row, new row)
Members = list[tuple[int, tuple[int, ...], tuple[int, ...]]]  # rows, their prompts, and what else was computed in advance


def units_of(examples: Sequence[Encoded | None], *, trunk: bool) -> dict[int, Members]:
    """Rows whose prompts are decoded together, by unit; an example without one is a unit of its own, numbered below zero by row."""
    units: dict[int, Members] = {}
    for row, example in enumerate(examples):
        if example is not None:
            key = example.unit if example.unit is not None else -1 - row
            behind = example.invocation + example.target[:-1] if trunk else ()
            units.setdefault(key, []).append((row, example.prompt, behind))
    return units


def kept_units(before: Mapping[int, Members], after: Mapping[int, Members]) -> dict[int, Moves]:
    """Units of a batch that were in the one before as they are now, wherever their rows were."""
    return {
        key: [(was, row) for (was, *_), (row, *_) in zip(before[key], members, strict=True)]
        for key, members in after.items()
        if key in before and [rest for _, *rest in before[key]] == [rest for _, *rest in members]
    }


def rearranged(moves: Mapping[int, int], n: int) -> list[tuple[int, int]] | None:
    """Copies (from, to) between n places, one after the other, that bring everything from its old place to its new one.

    None where a circle of places would need one that is empty, and there is none.

    >>> rearranged({0: 1, 1: 2, 3: 3}, 4)
    [(1, 2), (0, 1)]
    >>> rearranged({0: 1, 1: 0}, 3)
    [(1, 2), (0, 1), (2, 0)]
    """
    waiting = {was: now for was, now in moves.items() if was != now}
    taken = set(moves)
    order: list[tuple[int, int]] = []
    while waiting:
        was = next((was for was, now in waiting.items() if now not in taken), None)
        if was is None:  # only circles are left
            spare = next((place for place in reversed(range(n)) if place not in taken), None)
            if spare is None:
                return None
            was, now = waiting.popitem()
            waiting[spare] = now
            taken.add(spare)
            order.append((was, spare))
        else:
            now = waiting.pop(was)
            taken.add(now)
            order.append((was, now))
        taken.remove(was)
    return order
