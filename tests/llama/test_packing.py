"""What is decoded together: neighbours of one kind, as many as fit, unless padding them costs more than another decode."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fwdllama.llama.context import ContextOptions
from fwdllama.llama.packing import DECODE_TOKENS, Need, packed

OPTIONS = ContextOptions(n_ctx_seq=100, n_seq=16, n_outputs=40, n_batch=64)


def decodes(groups: Sequence[Sequence[int]], n_tokens: Sequence[int], *, start: int = 20, n_outputs: int = 2) -> list[list[int]]:
    return packed(groups, lambda row: Need(start, n_tokens[row], n_outputs), OPTIONS)


def test_neighbours_share_a_decode_and_a_gap_begins_another() -> None:
    assert decodes([[0], [1], [2], [4], [5]], [5] * 6) == [[0, 1, 2], [3, 4]]
    assert decodes([[0, 1], [2, 3], [6, 7]], [5] * 8) == [[0, 1], [2]]


def test_groups_of_another_size_or_order_are_decoded_apart() -> None:
    assert decodes([[0, 1], [2, 3], [4], [5]], [5] * 6) == [[0, 1], [2, 3]]
    assert decodes([[4, 5], [2, 3], [0, 1]], [5] * 6) == [[0], [1], [2]]
    assert decodes([[0, 2], [3, 5]], [5] * 6) == [[0], [1]]


@pytest.mark.parametrize(
    ("n_tokens", "start", "n_outputs", "expected"),
    [(16, 20, 2, [[0, 1, 2, 3], [4]]), (5, 20, 20, [[0, 1], [2, 3], [4]]), (8, 92, 2, [[0, 1, 2, 3, 4]]), (9, 92, 2, [[0], [1], [2], [3], [4]])],
)
def test_no_decode_exceeds_tokens_outputs_or_cells(n_tokens: int, start: int, n_outputs: int, expected: list[list[int]]) -> None:
    assert decodes([[i] for i in range(5)], [n_tokens] * 5, start=start, n_outputs=n_outputs) == expected


def test_padding_is_accepted_up_to_what_another_decode_would_cost() -> None:
    assert decodes([[0], [1]], [4, 4 + DECODE_TOKENS]) == [[0, 1]]
    assert decodes([[0], [1]], [4, 5 + DECODE_TOKENS]) == [[0], [1]]
    assert decodes([[0, 1], [2, 3]], [4, 4, 10, 10]) == [[0], [1]]  # twice six tokens of padding
