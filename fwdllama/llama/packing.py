"""Which rows of a batch are decoded together.

llama.cpp takes consecutive sequences into one micro-batch, others one by one, and every sequence with equally many tokens, so shorter rows
are padded. Padding is computed like anything else, but a decode more costs, too: the weights are fetched once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fwdllama.llama.context import ContextOptions

# What a decode costs beside its tokens, in tokens: 11 ms of 1.0 ms each, SmolLM2 INT8 (LOG.md).
DECODE_TOKENS = 11


@dataclass(frozen=True)
class Need:
    """What a row asks of a decode: the position where it begins, its tokens, and how many of them have logits."""

    start: int
    n_tokens: int
    n_outputs: int


def packed(groups: Sequence[Sequence[int]], need: Callable[[int], Need], options: ContextOptions) -> list[list[int]]:
    """Indices of the groups of rows that each decode takes, in order; a group that no decode can hold or merge is alone.

    Groups in one decode are of one size, and each begins with the row behind the last of the one before.
    """
    decodes: list[list[int]] = []
    held: list[Need] = []  # by the last decode
    for index, group in enumerate(groups):
        more = [need(row) for row in group]
        if decodes and _continues(groups[decodes[-1][-1]], group) and _fits(held, more, options):
            decodes[-1].append(index)
            held += more
        else:
            decodes.append([index])
            held = more
    return decodes


def _continues(before: Sequence[int], after: Sequence[int]) -> bool:
    first = before[0]
    return len(before) == len(after) and [*before, *after] == list(range(first, first + 2 * len(after)))


def _fits(held: Sequence[Need], more: Sequence[Need], options: ContextOptions) -> bool:
    """Whether one decode can hold both, and pads by less than a second one would cost."""
    together = [*held, *more]
    n_tokens = _n_tokens(together)
    return (
        n_tokens <= options.n_batch
        and sum(row.n_outputs for row in together) <= options.n_outputs
        and max(row.start for row in together) + max(row.n_tokens for row in together) <= options.n_ctx_seq
        and n_tokens - _n_tokens(held) - _n_tokens(more) <= DECODE_TOKENS
    )


def _n_tokens(rows: Sequence[Need]) -> int:
    """Tokens of a decode of these rows, padding included."""
    return len(rows) * max(row.n_tokens for row in rows)
