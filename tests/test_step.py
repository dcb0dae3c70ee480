"""Steps are clipped, free of the unit of theta, and linear in the directions bit for bit."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama import step as module
from fwdllama.config import HALF_LIFE, LR, USUAL_PROBES, StepConfig
from fwdllama.direction import packed_bits
from fwdllama.step import StepState, clipped, coefficients, combined, evened, rate_of, replayed
from tests.reference import limited, stepped

SLOPES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=30)
ENTRIES = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.floats(-10, 10, width=32)), max_size=6)


@given(SLOPES)
def test_slopes_are_limited_to_the_median_and_three_deviations(slopes: list[float]) -> None:
    result = clipped(np.array(slopes, np.float64))
    assert np.allclose(result, limited(slopes), rtol=1e-12, atol=1e-9)


def test_an_outlier_is_pulled_in_and_the_others_stay_as_they_are() -> None:
    slopes = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -900.0])
    result = clipped(slopes)
    assert result[:6].tolist() == slopes[:6].tolist()
    assert result[6] == pytest.approx(2.0 - 3 * 1.4826 * 2.0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-999, 999) | st.just(math.nan)), max_size=40), st.sampled_from([0.5, 1.0, 3.0]))
def test_no_examples_slopes_are_larger_than_the_median_examples_and_smaller_ones_stay(pairs: list[tuple[int, float]], width: float) -> None:
    group, slopes = np.array([g for g, _ in pairs], np.int64), np.array([s for _, s in pairs], np.float64)
    result = evened(slopes, group, width)

    def sizes(values: np.ndarray) -> dict[int, float]:
        usable = {int(g): [v for h, v in zip(group, values, strict=True) if h == g and math.isfinite(v)] for g in set(group.tolist())}
        return {g: math.sqrt(sum(v * v for v in found) / len(found)) for g, found in usable.items() if found and any(found)}

    before, after = sizes(slopes), sizes(result)
    assert np.array_equal(np.isnan(result), np.isnan(slopes))
    if before:
        limit = width * float(np.median(list(before.values())))
        for g, size in before.items():
            assert after.get(g, 0.0) == pytest.approx(min(size, limit), rel=1e-9, abs=1e-300)
            mine = (group == g) & np.isfinite(slopes)
            assert np.allclose(result[mine] * size, slopes[mine] * min(size, limit), rtol=1e-9)


def test_an_example_with_large_slopes_counts_no_more_than_the_others() -> None:
    slopes, group = np.array([1.0, -1.0, 100.0, -100.0, 0.5, 0.5]), np.array([0, 0, 1, 1, 2, 2])
    assert evened(slopes, group).tolist() == [1.0, -1.0, 1.0, -1.0, 0.5, 0.5]


def test_a_slope_that_is_nan_drops_out_of_the_step() -> None:
    slopes = clipped(np.array([1.0, math.nan, 2.0, 3.0]))
    assert slopes.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert coefficients(slopes, 0.1, 1.0, 1)[1] == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_a_slope_that_is_infinite_drops_out_of_the_step(bad: float) -> None:
    assert clipped(np.array([1.0, bad, 2.0, 3.0])).tolist() == [1.0, 0.0, 2.0, 3.0]


def test_slopes_that_are_all_nan_give_a_step_of_nothing() -> None:
    slopes = clipped(np.full(3, math.nan))
    assert slopes.tolist() == [0.0, 0.0, 0.0]
    assert coefficients(slopes, 0.1, 1.0, 1).tolist() == [0.0, 0.0, 0.0]


def test_coefficients_are_lr_times_slope_over_the_trace_that_squared_slopes_and_group_size_tell() -> None:
    result = coefficients(np.array([4.0, -2.0, 0.0]), lr=0.5, mean_square=4.0, examples_per_probe=2)
    assert result.dtype == np.float32
    assert result.tolist() == [0.25, -0.125, 0.0]


@given(st.lists(st.integers(-99, 99), min_size=1, max_size=9), st.sampled_from([2.0**-20, 2.0**13]))
def test_theta_in_other_units_takes_the_same_step(slopes: list[int], unit: float) -> None:
    """If theta is measured in units `unit` times as large, slopes are `unit` times as large and steps that many times smaller."""
    plain = np.array(slopes, np.float64)
    scaled = plain * unit
    a = coefficients(plain, 0.1, StepState().updated(plain).mean_square or 0.0, 1)
    b = coefficients(scaled, 0.1, StepState().updated(scaled).mean_square or 0.0, 1)
    assert np.array_equal(a, b * np.float32(unit))


def test_slopes_that_are_all_zero_give_a_step_of_nothing() -> None:
    assert coefficients(np.zeros(3), 0.1, 0.0, 1).tolist() == [0.0, 0.0, 0.0]


def test_the_first_step_is_normalised_by_its_own_slopes_and_later_ones_by_a_running_mean() -> None:
    first = StepState().updated(np.array([1.0, 3.0]))
    assert first.mean_square == 5.0
    assert first.updated(np.array([2.0]), decay=0.75).mean_square == 0.75 * 5.0 + 0.25 * 4.0
    assert first.updated(np.array([0.0])).mean_square == pytest.approx(4.0)


@pytest.mark.parametrize("state", [StepState(), StepState(5.0)])
def test_a_step_without_a_usable_slope_leaves_the_running_mean_as_it_was(state: StepState) -> None:
    assert state.updated(np.array([])) == state


@given(ENTRIES, st.integers(1, 150))
def test_combined_is_the_sum_of_scaled_directions_in_the_order_given_bit_for_bit(
    entries: list[tuple[int, float]], n_params: int
) -> None:
    seeds, values = [seed for seed, _ in entries], [value for _, value in entries]
    total = combined([packed_bits(seed, n_params) for seed in seeds], values, n_params)
    expected = [-x for x in stepped([0.0] * n_params, seeds, values)]
    assert total.dtype == np.float32
    assert np.array_equal(total, np.array(expected, np.float32))


def test_combined_refuses_directions_and_coefficients_of_different_numbers() -> None:
    with pytest.raises(ValueError, match="shorter"):
        combined([packed_bits(1, 8), packed_bits(2, 8)], [1.0], 8)


@given(ENTRIES, st.integers(1, 150))
def test_a_step_known_by_its_seeds_and_coefficients_is_redone_bit_for_bit(
    entries: list[tuple[int, float]], n_params: int
) -> None:
    theta = np.linspace(-3, 3, n_params, dtype=np.float32)
    before = theta.copy()
    seeds, values = [seed for seed, _ in entries], np.array([value for _, value in entries], np.float32)
    result = replayed(theta, seeds, values)
    assert result.tobytes() == np.array(stepped(theta.tolist(), seeds, values.tolist()), np.float32).tobytes()
    assert theta.tobytes() == before.tobytes()


def test_a_positive_coefficient_moves_against_its_direction() -> None:
    z = np.array([-1.0 if byte else 1.0 for byte in np.unpackbits(packed_bits(3, 8), bitorder="little")])
    assert np.array_equal(replayed(np.zeros(8, np.float32), [3], np.array([0.5], np.float32)), -0.5 * z)


def test_a_run_with_room_for_more_probes_takes_shorter_steps_that_halve_later() -> None:
    fractions = (0.0, 0.1, 0.5)
    few, usual, long = (
        [rate_of(StepConfig(final_lr=1.0), fraction=f, n_probes=int(f * n)) for f in fractions]
        for n in (USUAL_PROBES // 10, USUAL_PROBES, 4 * USUAL_PROBES)
    )
    assert few == pytest.approx([LR / (1 + f * USUAL_PROBES / 10 / HALF_LIFE) for f in fractions])
    assert usual == pytest.approx([LR / (1 + f * USUAL_PROBES / HALF_LIFE) for f in fractions])
    assert long == pytest.approx([LR, usual[1] / 2, usual[2] / 2])  # how long a run is shows when it has begun
    assert rate_of(StepConfig(final_lr=1.0, lr=1.0, half_life=50), fraction=0.001, n_probes=50) == 0.5


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
