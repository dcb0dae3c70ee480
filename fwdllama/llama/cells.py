"""The bytes that `llama_state_seq_get_data` gives for a sequence, taken apart into what belongs to each of its cells.

Sequences that begin alike hold the same cells there, so with this they need to be stored once. llama.cpp promises no layout: what is not exactly
as expected, to the last byte and with cell i at position i, is not understood, and nothing is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Place = tuple[slice, slice, tuple[int, int, int]]  # a literal, the section behind it, and the section's (outer, n_cells, cell_bytes)

_PLACE_BYTES = 12  # of a cell: its position, the number of its sequences, the sequence


@dataclass(frozen=True)
class Layout:
    """A literal, a section, a literal, ... and a last literal. A section has the shape (outer, n_cells, cell_bytes)."""

    literals: tuple[int, ...]  # bytes
    sections: tuple[tuple[int, int], ...]  # (outer, cell_bytes)

    def size_bytes(self, n_cells: int) -> int:
        """Of a sequence of so many cells."""
        return sum(self.literals) + n_cells * sum(outer * width for outer, width in self.sections)

    def places(self, n_cells: int) -> Iterator[Place]:
        """Where everything is in a sequence of so many cells."""
        at = 0
        for literal, (outer, width) in zip(self.literals, (*self.sections, (0, 0)), strict=True):
            middle, end = at + literal, at + literal + outer * n_cells * width
            yield slice(at, middle), slice(middle, end), (outer, n_cells, width)
            at = end


def layout_of(state: Bytes, n_cells: int) -> Layout | None:
    """The layout of a saved sequence whose cells are those of positions 0 to n_cells - 1, in this order; None where it is another."""
    walk = _Walk(state, n_cells)
    try:
        walk.number("<Ii")  # magic, sequence
        while walk.at < len(state):
            _cache(walk)
    except (_UnknownError, struct.error):
        return None
    return Layout((*walk.literals, walk.at - walk.begun), tuple(walk.sections))


class _UnknownError(Exception):
    """Something is not as expected."""


class _Walk:
    """A place in a saved sequence that moves towards its end."""

    def __init__(self, state: Bytes, n_cells: int) -> None:
        self.state, self.n_cells = state, n_cells
        self.at = self.begun = 0  # now, and where the literal began that this is in
        self.literals: list[int] = []
        self.sections: list[tuple[int, int]] = []

    def number(self, form: str) -> int:
        """The last of the numbers that are here."""
        found: int = struct.unpack_from(form, self.state.data, self.at)[-1]
        self.at += struct.calcsize(form)
        return found

    def section(self, outer: int, width: int) -> Bytes:
        """Pass over what belongs to cells."""
        size = outer * self.n_cells * width
        if not size or self.at + size > len(self.state):
            raise _UnknownError
        self.literals.append(self.at - self.begun)
        self.sections.append((outer, width))
        self.at = self.begun = self.at + size
        return self.state[self.at - size : self.at]


def _cache(walk: _Walk) -> None:
    """One KV cache; a model with sliding windows has two."""
    n_streams = walk.number("<I")
    for _ in range(n_streams):
        n_cells = walk.number("<I")
        if not n_cells:
            continue
        if n_cells != walk.n_cells:  # beyond a sliding window: cells that are left out would make the others move
            raise _UnknownError
        places = np.frombuffer(walk.section(1, _PLACE_BYTES).tobytes(), np.int32).reshape(n_cells, 3)
        if not np.array_equal(places[:, 0], np.arange(n_cells)) or (places[:, 1] != 1).any():
            raise _UnknownError
        transposed, n_layers = walk.number("<I"), walk.number("<I")
        for _ in range(n_layers):
            walk.section(1, walk.number("<iQ"))  # type of K, bytes of a row
        for _ in range(n_layers):
            if transposed:
                width, outer = walk.number("<iI"), walk.number("<I")  # type of V, bytes of a number, numbers of a row
                walk.section(outer, width)
            else:
                walk.section(1, walk.number("<iQ"))
