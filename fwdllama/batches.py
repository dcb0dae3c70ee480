"""Which examples each step sees: a rolling batch, a pure function of (seed, step).

Decoding a prompt costs as much as ten probes, while the prompts' KV cache does not depend on theta in scope `answer`. So a batch keeps
its examples for several steps and replaces only its oldest units before each. Many different examples a step matter more than
many directions for each (LOG.md).

A unit is up to `unit_size` examples whose prompts begin alike, such as the questions of one paragraph; their common beginning is
decoded once. Units are made into tokens when they are first drawn, so that a large file costs no more at start than a small one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError
from fwdllama.types import Encoded, Example

Rows = list[Encoded | None]


class Units(Protocol):
    """Units by number. A unit may be empty, when none of its examples can be used; then another is drawn in its place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Encoded, ...]: ...


class EncodedUnits:
    """Units of a data set, made into tokens on demand; counts the examples left out for their length."""

    def __init__(
        self,
        groups: Sequence[Sequence[Example]],
        encode: Callable[[Example], Encoded],
        n_ctx: int,
        source: str,
        n_outputs: int | None = None,  # the most tokens of one example that are predicted at once; None: any number
    ) -> None:
        self._groups, self._encode, self.n_ctx, self.source, self.n_outputs = groups, encode, n_ctx, source, n_outputs
        self._made: dict[int, tuple[Encoded, ...]] = {}
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._groups)

    def __getitem__(self, index: int) -> tuple[Encoded, ...]:
        """Unit `index`, without the examples that do not fit `n_ctx` tokens, or whose answers do not fit a decode."""
        if index not in self._made:
            kept = []
            for example in self._groups[index]:
                encoded = self._encode(example)
                if self.n_outputs is not None and len(encoded.target) > self.n_outputs:
                    self.skipped[f"answer longer than the {self.n_outputs} tokens that are predicted at once"] += 1
                elif encoded.n_tokens <= self.n_ctx:
                    kept.append(encoded)
                elif len(encoded.prompt) + len(encoded.invocation) > self.n_ctx:
                    self.skipped[f"prompt longer than the context of {self.n_ctx} tokens"] += 1
                else:
                    self.skipped[f"answer longer than the context of {self.n_ctx} tokens leaves room for"] += 1
            self._made[index] = tuple(kept)
        return self._made[index]


def groups_of(examples: Sequence[Example], size: int) -> list[tuple[Example, ...]]:
    """Neighbours that share a context, in even parts of at most `size`; an example without a context is alone.

    Even parts, because an orphan of a paragraph costs a whole prompt and leaves its slot's other rows empty.
    """
    whole: list[list[Example]] = []
    for example in examples:
        key = _key(example)
        if whole and key is not None and _key(whole[-1][0]) == key:
            whole[-1].append(example)
        else:
            whole.append([example])
    parts: list[tuple[Example, ...]] = []
    for group in whole:
        n_parts = -(-len(group) // size)
        parts += [tuple(group[i * len(group) // n_parts : (i + 1) * len(group) // n_parts]) for i in range(n_parts)]
    return parts


def _key(example: Example) -> Hashable | None:
    return example.fields.get("context")


class RollingBatches:
    """The batch of every step: `n_slots` units, of which `fresh` are replaced before each step after the first.

    Raises:
        DataError: no unit has an example that fits.
    """

    def __init__(self, units: Units, *, unit_size: int, n_slots: int, fresh: int, seed: int) -> None:
        self.units, self.unit_size, self.seed = units, unit_size, seed
        self._drawn: list[tuple[Encoded, ...]] = []
        self._next = 0
        usable = 0
        while usable < n_slots and self._next < len(units):  # a small data set fills fewer slots
            usable += self._draw()
        if not usable:
            n_ctx = getattr(units, "n_ctx", None)
            raise DataError(
                f"{getattr(units, 'source', 'the data')}: none of its examples fits the context of {n_ctx} tokens. Use a larger --ctx."
            )
        self.n_slots = usable
        self.fresh = min(fresh, usable)

    def _draw(self) -> bool:
        """Take the next unit of an endless sequence of shuffled passes; whether it has examples."""
        epoch, place = divmod(self._next, len(self.units))
        self._next += 1
        unit = self.units[int(shuffled(self.seed, epoch, len(self.units))[place])]
        if unit:
            self._drawn.append(tuple(replace(example, unit=len(self._drawn)) for example in self._ordered(unit)))
        return bool(unit)

    def _ordered(self, unit: tuple[Encoded, ...]) -> list[Encoded]:
        """As many as a slot holds, in the order of their rows."""
        return sorted(unit[: self.unit_size], key=lambda example: len(example.target))

    def through(self, n_steps: int | None) -> list[tuple[Encoded, ...]]:
        """The units of the batches of steps 0 to `n_steps`, each as its rows stand in a batch; None: all that there are."""
        n_drawn = None if n_steps is None else self.n_slots + n_steps * self.fresh
        if n_drawn is None or n_drawn >= len(self.units):
            return [tuple(self._ordered(unit)) for i in range(len(self.units)) if (unit := self.units[i])]
        while len(self._drawn) < n_drawn:
            self._draw()
        return self._drawn[:n_drawn]

    def batch(self, step: int) -> tuple[Rows, list[int]]:
        """The rows of `step`, n_slots x unit_size of them, None at the end where units are short, and which rows are new in this step.

        Rows with equally long answers are neighbours, because the engine decodes neighbours at once and pads them to one length.
        """
        n_drawn = self.n_slots + step * self.fresh
        while len(self._drawn) < n_drawn:
            self._draw()
        held = [example for unit in self._drawn[n_drawn - self.n_slots : n_drawn] for example in unit]
        held.sort(key=lambda example: len(example.target))
        oldest_new = 0 if step == 0 else n_drawn - self.fresh
        new = [row for row, example in enumerate(held) if example.unit is not None and example.unit >= oldest_new]
        return [*held, *[None] * (self.n_slots * self.unit_size - len(held))], new


def shuffled(seed: int, epoch: int, n: int) -> NDArray[np.intp]:
    """A permutation of range(n) from raw words, which, unlike numpy's own shuffles, no release may change."""
    words = np.random.Philox(key=seed, counter=[0, 0, 1, epoch]).random_raw(n)
    return np.argsort(words, kind="stable")


def grouped(rows: Sequence[Encoded | None], size: int, shift: int) -> list[tuple[int, ...]]:
    """The rows that hold examples in groups of `size` neighbours, because the engine decodes neighbours at once.

    `shift` moves the borders, so that an example meets others in the next step; what remains at the ends forms smaller groups.
    A size of all examples or more gives one group.
    """
    held = [row for row, example in enumerate(rows) if example is not None]
    if held and size >= len(held):
        return [tuple(held)]
    groups: list[list[int]] = []
    for row in held:
        border = (row + shift) % size == 0
        if not groups or border or groups[-1][-1] != row - 1:
            groups.append([])
        groups[-1].append(row)
    return [tuple(group) for group in groups]
