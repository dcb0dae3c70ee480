"""Prompts that begin alike are decoded once, and every sequence still holds exactly its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.prompts import MIN_SHARED, common_prefix, decode, fill, plan
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
UNITS = ([0, 1, 2], [3, 4], [5])


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


def same(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_sequence_holds_exactly_its_own_prompt(context: Context) -> None:
    expected = [alone(context, prompt) for prompt in PROMPTS]
    fill(context, PROMPTS)
    for got, wanted in zip(held(context, PROMPTS), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_a_row_of_none_is_left_empty_and_the_others_hold_their_own(context: Context) -> None:
    nothing = PROMPTS[0][:0]
    expected = [alone(context, prompt) for prompt in (PROMPTS[0], nothing, PROMPTS[2])]
    fill(context, PROMPTS)
    fill(context, [PROMPTS[0], None, PROMPTS[2]])
    for got, wanted in zip(held(context, [PROMPTS[0], nothing, PROMPTS[2]]), expected, strict=True):
        assert np.abs(got - wanted).max() < NOISE


def test_a_shared_beginning_is_decoded_once(context: Context) -> None:
    before = context.n_decoded
    fill(context, PROMPTS)
    leaders = sum(len(PROMPTS[i]) for i in (0, 3, 5))
    assert context.n_decoded - before == leaders + 31 + 12 + 3


def test_every_row_follows_the_leader_it_shares_most_with() -> None:
    prompts = [PARAGRAPH, OTHER, PARAGRAPH[:60], None, np.concatenate([OTHER[:30], PARAGRAPH[:9]]), PARAGRAPH[:58]]
    found = plan(prompts, [0, 1, 2, 3, 4, 5])
    assert found == [(0, 0, 0), (1, 1, 0), (2, 0, 59), (4, 1, 30), (5, 0, 57)]  # the last token is always decoded
    assert plan(prompts, [5, 4, 0]) == [(5, 5, 0), (4, 4, 0), (0, 5, 58)]  # rows lead in the order given
    assert plan(prompts, [3]) == []


def test_a_beginning_that_is_short_or_less_than_half_of_the_prompt_is_decoded_again(context: Context) -> None:
    for n, n_shared, n_decoded in ((20, MIN_SHARED - 1, 20), (20, MIN_SHARED, 4), (60, 29, 60), (60, 30, 30)):
        first, second = drawn(n, 1), drawn(n, 2)
        second[:n_shared] = first[:n_shared]
        second[n_shared] = first[n_shared] + 1
        before = context.n_decoded
        fill(context, [first, second])
        assert context.n_decoded - before == n + n_decoded


letters = st.integers(0, 1)
families = st.lists(
    st.none() | st.tuples(letters, st.integers(0, 40), st.lists(letters, min_size=1, max_size=30)), max_size=8
)


@given(families)
def test_a_plan_reaches_every_prompt_by_way_of_an_earlier_row_that_begins_like_it(
    family: list[tuple[int, int, list[int]] | None],
) -> None:
    prompts = [None if f is None else np.array([f[0]] * f[1] + f[2], np.int32) for f in family]
    reached: dict[int, list[int]] = {}
    for row, leader, n in plan(prompts, range(len(prompts))):
        prompt = prompts[row]
        assert prompt is not None
        assert (n == 0) == (leader == row)
        assert n == 0 or n >= max(MIN_SHARED, len(prompt) // 2)
        assert n < len(prompt)
        reached[row] = reached.get(leader, [])[:n] + prompt[n:].tolist()
    assert reached == {row: prompt.tolist() for row, prompt in enumerate(prompts) if prompt is not None}


@pytest.mark.parametrize("flash", [True, False])
def test_a_prompts_cells_are_bit_equal_whichever_other_units_there_are_and_were(context: Context, flash: bool) -> None:
    with Context(context.model, replace(context.options, flash=flash)) as own:
        for unit in UNITS:
            fill(own, PROMPTS, unit)
        first = held(own, PROMPTS)
        elsewhere = [*PROMPTS[3:], *PROMPTS[:3]]
        for unit in ([3, 4, 5], [2], [0, 1]):
            fill(own, elsewhere, unit)
        again = held(own, elsewhere)
    assert same(again, [*first[3:], *first[:3]])


def test_filling_one_unit_leaves_the_others_to_the_bit(context: Context) -> None:
    fill(context, PROMPTS)
    first = held(context, PROMPTS)
    changed = [*PROMPTS[:3], drawn(9, 13), drawn(8, 14), PROMPTS[5]]
    before = context.n_decoded
    fill(context, changed, [3, 4])
    assert context.n_decoded - before == 9 + 8
    now = held(context, changed)
    assert same([now[i] for i in (0, 1, 2, 5)], [first[i] for i in (0, 1, 2, 5)])
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


def test_decoding_a_prompt_from_where_it_was_left_is_decoding_it_at_once(context: Context) -> None:
    prompt = PROMPTS[1]
    expected = alone(context, prompt)
    context.clear()
    decode(context, 2, 0, prompt[:50])
    decode(context, 2, 50, prompt[50:])
    nothing = prompt[:0]
    got = held(context, [nothing, nothing, prompt])[2]
    assert np.abs(got - expected).max() < NOISE


def test_filling_again_forgets_what_was_there(context: Context) -> None:
    fill(context, PROMPTS)
    fill(context, PROMPTS[3:])
    again = held(context, PROMPTS[3:])
    context.clear()
    fill(context, PROMPTS[3:])
    assert same(again, held(context, PROMPTS[3:]))


def test_states_take_the_place_of_tokens_and_may_go_on_behind_the_prompt(context: Context) -> None:
    """What enters the first layer of a whole model is the embeddings of the tokens, which a reader can look up."""
    reader = gguf.GGUFReader(context.model.info.path)
    embeddings = next(np.array(t.data, np.float32) for t in reader.tensors if t.name == "token_embd.weight")
    fill(context, PROMPTS)
    expected = held(context, PROMPTS)
    context.clear()
    states = {row: embeddings[np.append(prompt, drawn(row, 30))] for row, prompt in enumerate(PROMPTS)}
    before = context.n_decoded
    fill(context, PROMPTS, states=states)
    assert context.n_decoded - before == 97 + 70 + 5 + 31 + 12 + 3
    assert same(held(context, PROMPTS), expected)


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_the_common_prefix_ends_where_two_prompts_first_differ(a: list[int], b: list[int]) -> None:
    n = common_prefix(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
