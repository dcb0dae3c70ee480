"""Seeds are reached by counting, and `aligned` picks among candidates without a forward pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.sampler import Sampler, agreement, seed_at
from tests.reference import philox_words, signs


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 32), st.integers(0, 1 << 40))
def test_a_seed_is_one_word_of_the_runs_stream_at_its_step_and_index(run_seed: int, step: int, index: int) -> None:
    assert seed_at(run_seed, step, index) == next(philox_words((run_seed, 0), (0, 0, index, step)))


def test_the_seeds_of_a_run_have_their_golden_values() -> None:
    assert [seed_at(0, 0, 0), seed_at(0, 0, 1), seed_at(0, 1, 0), seed_at(7, 2, 3)] == [
        0x02F4BA6408E4D89B,
        0xA4C5607FB1206F77,
        0x57994A7DB8F816C6,
        0xCD2159A0BBE61919,
    ]


def test_no_two_probes_of_a_run_share_a_seed() -> None:
    seeds = {seed_at(1, step, index) for step in range(50) for index in range(50)}
    assert len(seeds) == 2500


@given(st.integers(0, 99), st.integers(0, 99))
def test_uniform_sampling_takes_the_runs_own_sequence(step: int, index: int) -> None:
    update = np.ones(16, np.float32)
    assert Sampler(4).seed(step, index, update) == Sampler(4).seed(step, index, None) == seed_at(4, step, index)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("index", range(6))
def test_aligned_sampling_takes_the_candidate_that_agrees_most_with_the_last_update_on_either_side(
    index: int, sign: int
) -> None:
    update = np.random.default_rng(2).integers(-8, 9, 50).astype(np.float32)
    candidates = [seed_at(4, 3, 5 * index + c) for c in range(5)]
    agreement = [abs(sum(s * int(u) for s, u in zip(signs(seed, 50), update, strict=True))) for seed in candidates]
    assert Sampler(4, candidates=5).seed(3, index, sign * update) == candidates[agreement.index(max(agreement))]


def test_aligned_sampling_draws_candidates_of_their_own_for_each_probe() -> None:
    update = np.ones(32, np.float32)
    chosen = [Sampler(9, candidates=4).seed(0, index, update) for index in range(20)]
    assert len(set(chosen)) == 20


def test_aligned_sampling_takes_its_first_candidate_before_there_was_an_update() -> None:
    assert Sampler(4, candidates=5).seed(0, 2, None) == seed_at(4, 0, 10)


def test_agreement_loses_nothing_that_float32_sums_would() -> None:
    update = np.array([3e7, *[1.0] * 15, -3e7], np.float32)  # float32 holds 3e7 but not 3e7 + 1
    expected = abs(sum(s * int(u) for s, u in zip(signs(7, 17), update, strict=True)))
    assert agreement(7, update) == expected
