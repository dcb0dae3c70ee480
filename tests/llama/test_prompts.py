"""Prompts that begin alike are decoded once, and every sequence still holds exactly its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.prompts import MIN_SHARED, common_prefix, fill, packed, units
from gguf_tools.synth import write_tiny_llama

Tokens = NDArray[np.int32]
NOISE = 2e-5
PROBE = 77


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    path = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")
    options = ContextOptions(n_ctx_seq=256, n_seq=6, n_outputs=8, n_batch=128, n_threads=1, kv_type="f32", flash=False)
    with Model(path) as model, Context(model, options) as opened:
        yield opened


def drawn(n: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(3, 300, n).astype(np.int32)


PARAGRAPH, OTHER = drawn(90, 1), drawn(50, 2)
PROMPTS = [
    np.concatenate([PARAGRAPH, drawn(7, 3)]),
    np.concatenate([PARAGRAPH, drawn(31, 5)]),
    np.concatenate([PARAGRAPH, drawn(12, 8)]),
    np.concatenate([OTHER, drawn(20, 4)]),
    np.concatenate([OTHER[:40], drawn(3, 6)]),
    drawn(5, 7),
]


def held(context: Context, prompts: Sequence[Tokens]) -> list[NDArray[np.float32]]:
    """What each sequence makes of one more token after its prompt: it depends on every cell that it holds."""
    rows = []
    for i, prompt in enumerate(prompts):
        context.forget(i, len(prompt))
        one, at = np.array([PROBE], np.int32), np.array([len(prompt)], np.int32)
        logits = context.decode(one, at, np.array([i], np.int32), np.ones(1, np.int8))
        assert logits is not None
        rows.append(logits[0].copy())
    return rows


def alone(context: Context, prompt: Tokens) -> NDArray[np.float32]:
    """The same for one prompt decoded token by token."""
    context.clear()
    logits = None
    for position, token in enumerate([*prompt, PROBE]):
        one, at = np.array([token], np.int32), np.array([position], np.int32)
        logits = context.decode(one, at, np.zeros(1, np.int32), np.ones(1, np.int8))
    assert logits is not None
    last: NDArray[np.float32] = logits[0].copy()
    return last


def test_every_sequence_holds_exactly_its_own_prompt(context: Context) -> None:
    expected = [alone(context, prompt) for prompt in PROMPTS]
    fill(context, PROMPTS)
    for got, wanted in zip(held(context, PROMPTS), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_units_are_blocks_of_neighbouring_rows() -> None:
    assert units(PROMPTS, 4) == [range(4), range(4, 6)]
    assert units(PROMPTS, 1) == [range(i, i + 1) for i in range(6)]
    assert units([], 3) == []


def test_a_row_of_none_is_left_empty_and_the_others_hold_their_own(context: Context) -> None:
    nothing = PROMPTS[0][:0]
    expected = [alone(context, prompt) for prompt in (PROMPTS[0], nothing, PROMPTS[2])]
    fill(context, PROMPTS)
    fill(context, [PROMPTS[0], None, PROMPTS[2]])
    for got, wanted in zip(held(context, [PROMPTS[0], nothing, PROMPTS[2]]), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_a_shared_beginning_is_decoded_once(context: Context) -> None:
    before = context.n_decoded
    fill(context, PROMPTS, share=False)
    assert context.n_decoded - before == sum(len(prompt) for prompt in PROMPTS)
    before = context.n_decoded
    fill(context, PROMPTS)
    leaders = sum(len(PROMPTS[i]) for i in (0, 3, 5))
    assert context.n_decoded - before == leaders + 3 * 31  # rests of 3, 12 and 31 tokens, padded to one width


def test_a_beginning_shorter_than_a_copy_is_worth_is_decoded_again(context: Context) -> None:
    for n_shared, n_decoded in ((MIN_SHARED - 1, 20 + 20), (MIN_SHARED, 20 + 4)):
        first, second = drawn(20, 1), drawn(20, 2)
        second[:n_shared] = first[:n_shared]
        second[n_shared] = first[n_shared] + 1
        before = context.n_decoded
        fill(context, [first, second])
        assert context.n_decoded - before == n_decoded


@pytest.mark.parametrize("flash", [True, False])
def test_a_prompts_cells_are_bit_equal_whichever_other_prompts_there_are_and_were(
    context: Context, flash: bool
) -> None:
    with Context(context.model, replace(context.options, flash=flash)) as own:
        for unit in units(PROMPTS, 3):
            fill(own, PROMPTS, unit)
        first = held(own, PROMPTS)
        elsewhere = [*PROMPTS[3:], *PROMPTS[:3]]
        for unit in units(elsewhere, 3):
            fill(own, elsewhere, unit)
        again = held(own, elsewhere)
    assert all(np.array_equal(a, b) for a, b in zip(again, [*first[3:], *first[:3]], strict=True))


def test_filling_one_unit_leaves_the_others_to_the_bit(context: Context) -> None:
    fill(context, PROMPTS)
    first = held(context, PROMPTS)
    changed = [*PROMPTS[:3], drawn(9, 13), drawn(8, 14), PROMPTS[5]]
    before = context.n_decoded
    fill(context, changed, range(3, 5))
    assert context.n_decoded - before == 9 + 8
    now = held(context, changed)
    for i in (0, 1, 2, 5):
        assert np.array_equal(now[i], first[i])
    for i in (3, 4):
        assert np.abs(now[i] - alone(context, changed[i])).max() < NOISE


def test_prompts_that_are_the_same_or_a_beginning_of_another_still_hold_their_own(context: Context) -> None:
    prompts = [PARAGRAPH, PARAGRAPH.copy(), PARAGRAPH[:60], PARAGRAPH[:61]]
    expected = [alone(context, prompt) for prompt in prompts]
    fill(context, prompts)
    for got, wanted in zip(held(context, prompts), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_a_prompt_longer_than_a_decode_is_decoded_in_several(context: Context) -> None:
    prompts = [drawn(250, 9)]
    expected = alone(context, prompts[0])
    fill(context, prompts)
    assert np.abs(held(context, prompts)[0] - expected).max() < NOISE


def test_padding_never_needs_more_cells_than_a_sequence_has(context: Context) -> None:
    """A long prompt with a short rest beside a short prompt with a long rest: both fit, the first padded would not."""
    nearly_full = drawn(250, 10)
    prompts = [nearly_full, nearly_full.copy(), np.concatenate([nearly_full[:20], drawn(60, 11)])]
    prompts[1][-1] = 5
    expected = [alone(context, prompt) for prompt in prompts]
    fill(context, prompts)
    for got, wanted in zip(held(context, prompts), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_filling_again_forgets_what_was_there(context: Context) -> None:
    fill(context, PROMPTS)
    fill(context, PROMPTS[3:])
    again = held(context, PROMPTS[3:])
    context.clear()
    fill(context, PROMPTS[3:])
    assert all(np.array_equal(a, b) for a, b in zip(again, held(context, PROMPTS[3:]), strict=True))


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_the_common_prefix_ends_where_two_prompts_first_differ(a: list[int], b: list[int]) -> None:
    n = common_prefix(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(st.lists(st.tuples(st.integers(16, 60), st.integers(1, 40)), max_size=12), st.integers(40, 200))
def test_rows_are_packed_once_each_into_padded_groups_that_fit_a_decode_and_their_sequences(
    places: list[tuple[int, int]], n_batch: int
) -> None:
    rows = [(i, start, np.zeros(n, np.int32)) for i, (start, n) in enumerate(places)]
    groups = list(packed(rows, n_batch, 100))
    assert sorted(sequence for group in groups for sequence, _, _ in group) == list(range(len(rows)))
    for group in groups:
        width = max(len(tokens) for _, _, tokens in group)
        assert len(group) * width <= n_batch
        assert max(start for _, start, _ in group) + width <= 100
