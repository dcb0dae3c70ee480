"""What an oracle holds of an example in a row of its batch, and which rows are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.types import Encoded


@dataclass
class Row:
    """What a loss decodes for one example: tokens behind the prompt, and which of them predict the target."""

    start: int  # position of the first invocation token
    tokens: NDArray[np.int32] | NDArray[np.float32]  # invocation + target[:-1], or what they are at the entrance of the top
    first: int  # index in tokens of the one that predicts target[0]
    target: NDArray[np.int32]
    choices: NDArray[np.int32]


def row_of(example: Encoded) -> Row:
    """The example's, while what enters the top is not known."""
    return Row(
        len(example.prompt),
        np.array(example.invocation + example.target[:-1], np.int32),
        len(example.invocation) - 1,
        np.array(example.target, np.int32),
        np.array(example.choices, np.int32),
    )


def n_behind(example: Encoded) -> int:
    """Tokens that a loss decodes behind the example's prompt."""
    return len(example.invocation) + len(example.target) - 1


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
