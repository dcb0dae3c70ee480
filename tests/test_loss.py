"""Losses are those of an exactly summed softmax."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fwdllama import loss as module
from fwdllama.loss import VALUES_AT_ONCE, bounded, choice_nll, token_nll
from tests.reference import nll

LOGITS = st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=12)


@given(LOGITS, st.data())
def test_a_tokens_loss_is_minus_the_log_of_its_softmax(logits: list[float], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(logits) - 1))
    losses = token_nll(np.array([logits], np.float32), np.array([target], np.int32))
    assert losses.dtype == np.float64
    assert losses.tolist() == pytest.approx([nll(logits, target)], rel=1e-6, abs=2e-6)


def test_every_row_has_its_own_target() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    targets = np.array([3, 0, 39, 3, 17], np.int32)
    expected = [nll(row.tolist(), int(target)) for row, target in zip(logits, targets, strict=True)]
    assert token_nll(logits, targets).tolist() == pytest.approx(expected, rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    assert token_nll(logits, np.array([0, 2], np.int32)).tolist() == pytest.approx([math.log(2), math.log(3)])
    assert choice_nll(logits[0], np.array([0, 1]), 1) == pytest.approx(math.log(2))


def test_a_large_vocabulary_keeps_six_digits() -> None:
    logits = np.random.default_rng(1).standard_normal((1, 150_000)).astype(np.float32)
    assert token_nll(logits, np.array([7], np.int32))[0] == pytest.approx(nll(logits[0].tolist(), 7), rel=1e-6)


def test_logits_are_not_changed() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    before = logits.tobytes()
    token_nll(logits, np.array([1, 2], np.int32))
    choice_nll(logits[0], np.array([1, 2]), 1)
    assert logits.tobytes() == before


@given(LOGITS, st.data())
def test_a_choices_loss_is_minus_the_log_of_its_share_among_the_choices_only(
    logits: list[float], data: st.DataObject
) -> None:
    choices = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, unique=True))
    row: NDArray[np.float32] = np.array(logits, np.float32)
    among = [logits[choice] for choice in choices]
    losses = [choice_nll(row, np.array(choices, np.int32), choice) for choice in choices]
    assert losses == pytest.approx([nll(among, i) for i in range(len(choices))], rel=1e-9, abs=1e-9)
    assert math.fsum(math.exp(-one) for one in losses) == pytest.approx(1.0)


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


@given(st.floats(0, 50), st.floats(0.01, 20))
def test_a_bounded_loss_has_the_slope_of_its_example_times_its_weight(loss: float, limit: float) -> None:
    low, high = bounded(np.array([loss - 1e-4, loss + 1e-4]), limit)
    assert (high - low) / 2e-4 == pytest.approx(min(1.0, math.exp(limit - loss)), abs=2e-4)


def test_losses_up_to_the_limit_are_what_they_are() -> None:
    losses = np.array([0.0, 1.5, 30.0])
    assert bounded(losses, math.inf).tolist() == losses.tolist()
    assert bounded(losses, 1.5)[:2].tolist() == [0.0, 1.5]


def test_rows_that_are_taken_a_few_at_a_time_give_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    n_vocab = VALUES_AT_ONCE // 3  # three rows at a time, and one is left over
    logits, targets = rng.standard_normal((7, n_vocab), np.float32), rng.integers(0, n_vocab, 7).astype(np.int32)
    alone = [token_nll(logits[i : i + 1], targets[i : i + 1])[0] for i in range(7)]
    assert token_nll(logits, targets).tolist() == alone
