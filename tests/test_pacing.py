"""A step waits for as many probes as it was told to, or as its variance asks for."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama import pacing as module
from fwdllama.pacing import Fixed, VarianceGate

SLOPES = st.lists(st.floats(-100, 100), max_size=40)


@given(SLOPES)
def test_fixed_pacing_wants_its_number_whatever_was_seen(slopes: list[float]) -> None:
    assert Fixed(12).wanted(np.array(slopes)) == 12


@given(SLOPES, st.floats(1e-3, 1e3), st.integers(1, 20), st.integers(0, 200))
def test_the_variance_gate_wants_two_mean_squares_over_tau_between_its_floor_and_its_cap(
    slopes: list[float], tau: float, floor: int, above: int
) -> None:
    wanted = VarianceGate(tau, floor, floor + above).wanted(np.array(slopes))
    if len(slopes) < floor:
        assert wanted == floor
    else:
        needed = 2 * math.fsum(slope**2 for slope in slopes) / len(slopes) / tau
        assert wanted == pytest.approx(min(max(needed, floor), floor + above), abs=1)
        assert wanted >= min(needed, floor + above) - 1e-6


def test_the_variance_gate_rounds_up() -> None:
    slopes = np.array([1.0, -1.0])
    assert VarianceGate(tau=0.3, floor=1, cap=100).wanted(slopes) == 7  # 6.67


def test_the_variance_gate_judges_nothing_before_its_floor() -> None:
    assert VarianceGate(tau=1e-9, floor=4, cap=100).wanted(np.array([50.0, 50.0, 50.0])) == 4


def test_the_variance_gate_stops_at_its_cap_when_slopes_are_wild() -> None:
    assert VarianceGate(tau=1e-9, floor=2, cap=30).wanted(np.array([50.0, -50.0])) == 30


def test_slopes_that_are_not_finite_neither_count_nor_judge() -> None:
    gate = VarianceGate(tau=0.1, floor=2, cap=100)
    assert gate.wanted(np.array([1.0, math.nan, math.inf, -1.0])) == gate.wanted(np.array([1.0, -1.0])) == 20
    assert gate.wanted(np.array([1.0, math.nan, math.nan])) == 2


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
