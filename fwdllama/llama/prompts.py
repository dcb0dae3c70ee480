"""Filling a context's sequences with prompts, a common beginning decoded once.

SQuAD asks about five questions of a paragraph, so a batch drawn by paragraph shares most of its prompt tokens. A sequence whose
prompt begins like its neighbour's copies that one's cells and decodes only the rest; the rests of one unit share decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fwdllama.llama.context import Context, Tokens

MIN_SHARED = 16  # shorter common beginnings are not worth a copy of the whole sequence's cells


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many leading tokens a and b share."""
    n = min(len(a), len(b))
    different = np.nonzero(a[:n] != b[:n])[0]
    return int(different[0]) if len(different) else n


def units(prompts: Sequence[Tokens | None], size: int) -> list[range]:
    """Blocks of `size` neighbouring rows: what is decoded together, and only together.

    A prompt's cells must come out the same to the last bit whichever other prompts a batch holds, or a resumed run would differ from
    an unbroken one; kernels differ by the number of rows they are given. So nothing is shared beyond a unit.
    """
    return [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]


def fill(context: Context, prompts: Sequence[Tokens | None], unit: range | None = None, *, share: bool = True) -> None:
    """Make sequence i of `context` hold prompts[i], for all i in `unit` (default: all); None leaves a sequence empty.

    Cells behind a prompt's end may hold padding and must be forgotten before they are decoded anew. Every prompt must be non-empty
    and fit the context.
    """
    rests: list[tuple[int, int, Tokens]] = []  # sequence, first position, tokens
    leaders: list[tuple[int, Tokens]] = []
    for i in unit if unit is not None else range(len(prompts)):
        context.forget(i, 0)
        prompt = prompts[i]
        if prompt is None:
            continue
        shared = [(min(common_prefix(prompt, other), len(prompt) - 1), j) for j, other in leaders] if share else []
        n, leader = max(shared, key=lambda pair: (pair[0], -pair[1]), default=(0, -1))
        if n < MIN_SHARED:
            decode_rows(context, [(i, 0, prompt)])
            leaders.append((i, prompt))
        else:
            context.copy(leader, i)
            context.forget(i, n)
            rests.append((i, n, prompt[n:]))
    for group in packed(rests, context.options.n_batch, context.options.n_ctx_seq):
        decode_rows(context, group)


def packed(rows: list[tuple[int, int, Tokens]], n_batch: int, n_ctx_seq: int) -> Iterator[list[tuple[int, int, Tokens]]]:
    """Group rows of similar length so that each, padded to its longest row, fits a decode and its sequences."""
    group: list[tuple[int, int, Tokens]] = []
    for row in sorted(rows, key=lambda row: (len(row[2]), row[0])):
        width = len(row[2])  # the longest so far
        if group and ((len(group) + 1) * width > n_batch or max(start for _, start, _ in group) + width > n_ctx_seq):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def decode_rows(context: Context, rows: Sequence[tuple[int, int, Tokens]]) -> None:
    """Decode several sequences' tokens without outputs, padded behind to one width; one long row is cut into several decodes."""
    width = max(len(tokens) for _, _, tokens in rows)
    step = context.options.n_batch // len(rows)
    for begin in range(0, width, step):
        end = min(begin + step, width)
        n = end - begin
        tokens = np.zeros((len(rows), n), np.int32)
        positions = np.empty((len(rows), n), np.int32)
        sequences = np.empty((len(rows), n), np.int32)
        for r, (sequence, start, row) in enumerate(rows):
            piece = row[begin:end]
            tokens[r, : len(piece)] = piece
            positions[r] = np.arange(start + begin, start + end)
            sequences[r] = sequence
        context.decode(tokens.ravel(), positions.ravel(), sequences.ravel(), np.zeros(tokens.size, np.int8))
