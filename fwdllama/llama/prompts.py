"""Filling a context's sequences with prompts, a common beginning decoded once.

SQuAD asks about five questions of a paragraph, so a batch drawn by paragraph shares most of its prompt tokens. A sequence whose
prompt begins like an earlier one's copies that one's cells and decodes only the rest.

Every decode holds one sequence: kernels differ by the number of rows they are given, and a prompt's cells must come out the same to
the last bit whatever else a batch holds, or a resumed run would differ from an unbroken one. It costs nothing: prompts are long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fwdllama.llama.context import Context, Tokens

MIN_SHARED = 16  # shorter common beginnings are not worth a copy of the whole sequence's cells


def key_of(sequences: Iterable[Sequence[int] | Tokens]) -> bytes:
    """16 bytes that tell these token sequences, in this order, from all others."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(np.asarray(tokens, "<i4").tobytes())
    return digest.digest()


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many leading tokens a and b share."""
    n = min(len(a), len(b))
    different = np.nonzero(a[:n] != b[:n])[0]
    return int(different[0]) if len(different) else n


def plan(prompts: Sequence[Tokens | None], rows: Iterable[int]) -> list[tuple[int, int, int]]:
    """(row, leader, n) for every row that holds a prompt: its first n tokens are those of the earlier row `leader`.

    A row that shares less than half of its prompt leads itself (n = 0), so that others may follow it.
    """
    found: list[tuple[int, int, int]] = []
    leaders: list[int] = []
    for row in rows:
        prompt = prompts[row]
        if prompt is None:
            continue
        best, leader = 0, row
        for other in leaders:
            candidate = prompts[other]
            assert candidate is not None
            shared = min(common_prefix(prompt, candidate), len(prompt) - 1)
            if shared > best and shared >= max(MIN_SHARED, len(prompt) // 2):
                best, leader = shared, other
        if leader == row:
            leaders.append(row)
        found.append((row, leader, best))
    return found


def fill(
    context: Context,
    prompts: Sequence[Tokens | None],
    rows: Iterable[int] | None = None,
    *,
    states: Mapping[int, NDArray[np.float32]] | None = None,
) -> None:
    """Make sequence i of `context` hold exactly prompts[i], for all i in `rows` (default: all); None leaves a sequence empty.

    Every prompt must be non-empty and fit the context. `states` gives what enters the first layer, (n_tokens, n_embd) for every
    row and at least its prompt, where the context's model is the top of one.
    """
    chosen = list(range(len(prompts)) if rows is None else rows)
    for row in chosen:
        context.forget(row, 0)
    for row, leader, n in plan(prompts, chosen):
        prompt = prompts[row]
        assert prompt is not None
        if n:
            context.copy(leader, row)
            context.forget(row, n)
        decode(context, row, n, prompt[n:] if states is None else states[row][n : len(prompt)])


def decode(context: Context, sequence: int, start: int, tokens: Tokens | NDArray[np.float32]) -> None:
    """Decode one sequence's tokens from position `start` on without outputs, in as many pieces as the context's n_batch asks for."""
    step = context.n_batch
    for begin in range(0, len(tokens), step):
        piece = tokens[begin : begin + step]
        positions = np.arange(start + begin, start + begin + len(piece), dtype=np.int32)
        context.decode(piece, positions, np.full(len(piece), sequence, np.int32), np.zeros(len(piece), np.int8))
