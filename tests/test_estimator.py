"""On a quadratic every finite difference is known exactly, so these are equalities, not statistics.

All numbers are small multiples of powers of two: float32 and float64 hold their sums and products without rounding.
"""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama import estimator as module
from fwdllama.direction import direction, packed_bits
from fwdllama.estimator import Probe, centred_slopes, evaluate, projected_gradient
from fwdllama.loss import bounded
from fwdllama.oracle import QuadraticOracle
from fwdllama.types import Encoded

N_PARAMS, N_EXAMPLES, EPS = 6, 5, 0.25
CURVATURE = np.array([0.5, 1.0, 2.0, 4.0, 1.0, 0.25])
THETA = np.array([0.5, -1.0, 0.25, 2.0, 0.0, -0.75], np.float32)


def dyadic(*shape: int) -> NDArray[np.float64]:
    """Random multiples of 1/8 between -4 and 4."""
    return np.random.default_rng(3).integers(-32, 33, shape) / 8


def loaded() -> QuadraticOracle:
    oracle = QuadraticOracle(dyadic(N_EXAMPLES, N_PARAMS), CURVATURE)
    oracle.load([Encoded(str(i), (i,), (), (0,)) for i in range(N_EXAMPLES)])
    oracle.write(THETA)
    return oracle


def gradient(rows: Sequence[int]) -> NDArray[np.float64]:
    oracle = loaded()
    return np.asarray(np.mean([oracle.gradient(row) for row in rows], axis=0))


def complete_seeds(n_params: int) -> list[int]:
    """One seed for each of the 2^n_params sign vectors."""
    found: dict[int, int] = {}
    seed = 0
    while len(found) < 1 << n_params:
        found.setdefault(int(packed_bits(seed, n_params)[0]) & ((1 << n_params) - 1), seed)
        seed += 1
    return list(found.values())


def hadamard_seeds(order: int) -> list[int]:
    """Seeds whose directions are the rows of Sylvester's Hadamard matrix."""
    wanted = {tuple((-1.0) ** bin(i & j).count("1") for j in range(order)): i for i in range(order)}
    seed, found = 0, {}
    while wanted:
        row = wanted.pop(tuple(direction(seed, order).tolist()), None)
        if row is not None:
            found[row] = seed
        seed += 1
    return [found[i] for i in range(order)]


def test_a_two_sided_slope_is_exactly_the_gradient_along_its_direction() -> None:
    rows = [[0, 2], [1], [3, 4]]
    plan = [(11, 0), (12, 1), (13, 2), (14, 1)]
    probes = list(evaluate(loaded(), THETA, plan, rows, None, EPS))
    expected = [float(gradient(rows[group]) @ direction(seed, N_PARAMS)) for seed, group in plan]
    assert centred_slopes(probes, EPS, "two").tolist() == expected


@pytest.mark.parametrize("sided", ["one", "two"])
def test_probes_side_by_side_are_those_evaluated_one_after_the_other(sided: str) -> None:
    plan = [(seed, seed % 3) for seed in range(7)]
    found = []
    for n_places in (1, 3):
        oracle = QuadraticOracle(dyadic(N_EXAMPLES, N_PARAMS), CURVATURE, n_places=n_places)
        oracle.load([Encoded(str(i), (i,), (), (0,)) for i in range(N_EXAMPLES)])
        oracle.write(THETA)
        base = oracle.losses() if sided == "one" else None
        probes = evaluate(oracle, THETA, plan, [[0, 2], [1], [3, 4]], base, EPS, limit=3.0)
        found.append([(probe.seed, probe.group, probe.loss_plus, probe.loss_minus, probe.bits.tolist()) for probe in probes])
    assert found[0] == found[1]
    assert len(found[0]) == len(plan)


def test_a_one_sided_slope_less_its_curvature_is_exactly_the_gradient_along_its_direction() -> None:
    rows = [[0], [1, 3]]
    plan = [(21, 0), (22, 1), (23, 0)]
    oracle = loaded()
    for probe in evaluate(oracle, THETA, plan, rows, oracle.losses(), EPS):
        slope = projected_gradient(probe.loss_plus, probe.loss_minus, EPS)
        bend = EPS / 2 * CURVATURE.sum()  # eps/2 z^T H z, the same for every z of signs where H is diagonal
        assert slope - bend == float(gradient(rows[probe.group]) @ direction(probe.seed, N_PARAMS))


def test_averaging_slope_times_direction_over_all_sign_vectors_gives_exactly_the_gradient() -> None:
    seeds = complete_seeds(N_PARAMS)
    for sided in ("one", "two"):
        oracle = loaded()
        base = oracle.losses() if sided == "one" else None
        probes = list(evaluate(oracle, THETA, [(s, 0) for s in seeds], [[0, 1, 3, 4]], base, EPS))
        slopes = centred_slopes(probes, EPS, sided)
        mean = sum(c * direction(s, N_PARAMS).astype(np.float64) for c, s in zip(slopes, seeds, strict=True)) / len(
            seeds
        )
        assert np.array_equal(mean, gradient([0, 1, 3, 4]))


def test_averaging_over_the_rows_of_a_hadamard_matrix_gives_exactly_the_gradient() -> None:
    oracle = QuadraticOracle(dyadic(1, 8), np.linspace(0.25, 2, 8))
    oracle.load([Encoded("a", (0,), (), (0,))])
    theta, seeds = np.full(8, 0.5, np.float32), hadamard_seeds(8)
    probes = list(evaluate(oracle, theta, [(s, 0) for s in seeds], [[0]], None, EPS))
    slopes = centred_slopes(probes, EPS, "two")
    mean = sum(c * direction(s, 8).astype(np.float64) for c, s in zip(slopes, seeds, strict=True)) / 8
    oracle.write(theta)
    assert np.array_equal(mean, oracle.gradient(0))


def test_a_direction_for_each_example_gives_the_gradient_of_the_batch() -> None:
    seeds, rows = complete_seeds(N_PARAMS), [[i] for i in range(N_EXAMPLES)]
    plan = [(seed, group) for seed in seeds for group in range(N_EXAMPLES)]
    oracle = loaded()
    slopes = centred_slopes(list(evaluate(oracle, THETA, plan, rows, oracle.losses(), EPS)), EPS, "one")
    mean = sum(c * direction(s, N_PARAMS).astype(np.float64) for c, (s, _) in zip(slopes, plan, strict=True)) / len(
        plan
    )
    assert np.allclose(mean, gradient(range(N_EXAMPLES)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n_places", [1, 3])
@pytest.mark.parametrize("sided", ["one", "two"])
def test_probes_of_first_tokens_compare_their_losses_alone(sided: str, n_places: int) -> None:
    oracle = QuadraticOracle(dyadic(N_EXAMPLES, N_PARAMS), CURVATURE, n_places=n_places)
    oracle.load([Encoded(str(i), (i,), (), (0,)) for i in range(N_EXAMPLES)])
    oracle.write(THETA)
    base = oracle.losses(n_targets=2) if sided == "one" else None
    for probe in evaluate(oracle, THETA, [(7, 0), (8, 1)], [[0, 2], [1]], base, EPS, n_targets=2):
        rows, z = [[0, 2], [1]][probe.group], EPS * direction(probe.seed, N_PARAMS)
        for value, theta in ((probe.loss_plus, THETA + z), (probe.loss_minus, THETA if base is not None else THETA - z)):
            oracle.write(theta)
            assert value == oracle.losses(rows, n_targets=2).mean() != oracle.losses(rows).mean()


@pytest.mark.parametrize("sided", ["one", "two"])
def test_probes_with_a_limit_compare_bounded_losses(sided: str) -> None:
    oracle, rows = loaded(), [0, 2]
    base = oracle.losses() if sided == "one" else None
    limit = float(oracle.losses(rows).min()) / 2
    (probe,) = evaluate(oracle, THETA, [(7, 0)], [rows], base, EPS, limit)
    z = EPS * direction(7, N_PARAMS)
    for value, theta in ((probe.loss_plus, THETA + z), (probe.loss_minus, THETA if base is not None else THETA - z)):
        oracle.write(theta)
        assert value == bounded(oracle.losses(rows), limit).mean() != oracle.losses(rows).mean()


def test_probes_come_in_the_order_of_the_plan_with_their_packed_directions() -> None:
    plan = [(5, 1), (3, 0), (5, 0)]
    probes = list(evaluate(loaded(), THETA, plan, [[0], [1]], None, EPS))
    assert [(p.seed, p.group) for p in probes] == plan
    assert [p.bits.tolist() for p in probes] == [packed_bits(seed, N_PARAMS).tolist() for seed, _ in plan]


def test_probes_are_evaluated_one_at_a_time_as_they_are_asked_for() -> None:
    oracle = loaded()
    probes = evaluate(oracle, THETA, [(1, 0), (2, 0)], [[0, 1]], None, EPS)
    assert oracle.n_evaluations == 0
    next(probes)
    assert oracle.n_evaluations == 4


def test_a_one_sided_probe_evaluates_its_own_group_once() -> None:
    oracle = loaded()
    base = oracle.losses()
    already = oracle.n_evaluations
    list(evaluate(oracle, THETA, [(1, 0), (2, 1)], [[0, 1], [2]], base, EPS))
    assert oracle.n_evaluations - already == 3


@pytest.mark.parametrize("sided", ["one", "two"])
def test_theta_is_never_changed_by_probing(sided: str) -> None:
    oracle, theta = loaded(), THETA.copy()
    base = oracle.losses() if sided == "one" else None
    for _ in evaluate(oracle, theta, [(seed, 0) for seed in range(50)], [[0, 1]], base, 0.1):
        assert theta.tobytes() == THETA.tobytes()


def made(*slopes: float, group: int = 0) -> list[Probe]:
    """Probes whose uncentred one-sided slopes are `slopes` at eps = 1."""
    return [Probe(i, group, slope, 0.0, packed_bits(i, 8)) for i, slope in enumerate(slopes)]


def test_each_group_of_four_or_more_probes_is_centred_on_its_own_mean() -> None:
    probes = [*made(1, 2, 3, 6, group=0), *made(101, 102, 103, 106, group=7)]
    assert centred_slopes(probes, 1.0, "one").tolist() == [-2, -1, 0, 3, -2, -1, 0, 3]


def test_a_group_of_fewer_than_four_probes_is_centred_on_the_mean_of_all() -> None:
    probes = [*made(1, 2, 3, 6, group=0), *made(12, 12, group=1)]
    assert centred_slopes(probes, 1.0, "one").tolist() == [-2, -1, 0, 3, 6, 6]


def test_two_sided_slopes_are_not_centred() -> None:
    assert centred_slopes(made(2, 4, 6, 8), 1.0, "two").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sided", ["one", "two"])
def test_a_loss_that_is_not_finite_gives_nan_and_leaves_the_others_as_they_would_be_without_it(
    sided: str, bad: float
) -> None:
    probes = made(1, 2, 3, 6)
    with_bad = [*probes[:2], Probe(9, 0, bad, 0.0, packed_bits(9, 8)), *probes[2:]]
    slopes = centred_slopes(with_bad, 1.0, sided)  # type: ignore[arg-type]
    assert math.isnan(slopes[2])
    assert np.delete(slopes, 2).tolist() == centred_slopes(probes, 1.0, sided).tolist()  # type: ignore[arg-type]


def test_a_not_finite_probe_does_not_count_towards_the_four_of_a_group() -> None:
    probes = [*made(1, 2, 3, math.nan, group=0), *made(10, 10, 10, 10, 10, group=1)]
    mean_of_all = (1 + 2 + 3 + 50) / 8
    assert centred_slopes(probes, 1.0, "one")[:3].tolist() == [1 - mean_of_all, 2 - mean_of_all, 3 - mean_of_all]


def test_probes_that_all_failed_are_all_nan_and_no_probes_are_no_slopes() -> None:
    assert np.isnan(centred_slopes(made(math.nan, math.nan), 1.0, "one")).all()
    assert len(centred_slopes([], 1.0, "one")) == 0


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
