"""eps is put where a slope stands SNR times above the noise, and is refused where it does not stand above it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.calibration import SNR, Calibration, calibrate, checked, measure, rms
from fwdllama.errors import NoiseError
from fwdllama.oracle import Losses, QuadraticOracle
from fwdllama.types import Encoded

N_PARAMS = 200
GUESS = 0.008
GROUPS = [(0,), (1,), (2,), (3,)]


class RoundingOracle:
    """A loss of known slope and curvature that jitters as a quantised model's does.

    Each of several parts of its noise is drawn anew where theta changes by more than its resolution.
    """

    def __init__(
        self,
        slope: float,
        curvature: float,
        noise: float,
        *,
        resolutions: Sequence[float] = (1e-8,),
        reach: float = np.inf,
    ) -> None:
        direction = np.random.default_rng(1).standard_normal((4, N_PARAMS))
        self.gradients = slope * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        self.curvature, self.noise, self.resolutions, self.reach = curvature, noise, resolutions, reach
        self.theta = np.zeros(N_PARAMS)

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """The four examples are always the same."""

    def write(self, theta: NDArray[np.float32]) -> None:
        self.theta = theta.astype(np.float64)

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        chosen = list(range(4)) if rows is None else list(rows)
        if np.abs(self.theta).max() > self.reach:
            return np.full(len(chosen), np.nan)
        jitter = np.zeros(4)
        for resolution in self.resolutions:
            place = np.round(self.theta / resolution).astype(np.int64)
            rng = np.random.default_rng(int.from_bytes(sha256(place.tobytes()).digest()))
            jitter += rng.standard_normal(4) / np.sqrt(len(self.resolutions))
        smooth = self.gradients @ self.theta + self.curvature / (2 * N_PARAMS) * (self.theta**2).sum()
        return np.asarray((3.0 + smooth + self.noise * jitter)[chosen], np.float64)


def calibrated(oracle: RoundingOracle | QuadraticOracle, eps: float | None = None, n_params: int = N_PARAMS) -> Calibration:
    theta = np.zeros(n_params, np.float32)
    return calibrate(oracle, theta, GROUPS, seed=7, first_guess=GUESS, eps=eps, n_probes=24)


@pytest.mark.parametrize("wanted", [GUESS / 40, GUESS / 3, GUESS, 3 * GUESS, 60 * GUESS])
def test_eps_is_where_the_slope_is_snr_times_the_noise(wanted: float) -> None:
    noise = 1e-3
    slope = SNR * noise / wanted
    found = calibrated(RoundingOracle(slope, 2e-3 / wanted**2, noise * np.sqrt(2)))  # of two jitters half the difference
    assert found.eps == pytest.approx(wanted, rel=0.4)
    assert found.noise == pytest.approx(noise, rel=0.4)
    assert found.slope_rms == pytest.approx(slope, rel=0.4)
    assert found.snr == pytest.approx(SNR)


def test_curvature_is_the_trace_of_the_second_derivatives() -> None:
    found = calibrated(RoundingOracle(slope=0.5, curvature=4e3, noise=1e-4))
    assert found.curvature == pytest.approx(4e3, rel=0.2)


def test_a_model_that_hardly_rounds_can_be_trained_too() -> None:
    found = calibrated(RoundingOracle(slope=1.0, curvature=1.0, noise=1e-9))
    assert GUESS / 1000 < found.eps <= GUESS
    assert found.snr >= SNR


def test_a_model_without_rounding_can_be_trained_too() -> None:
    rng = np.random.default_rng(2)
    exact = QuadraticOracle(rng.standard_normal((4, 30)), np.ones(30))
    exact.load([Encoded(str(i), (i,), (1,), (2,)) for i in range(4)])
    found = calibrated(exact, n_params=30)
    assert GUESS / 1000 < found.eps <= GUESS
    assert found.snr >= SNR


def test_an_eps_that_is_given_is_kept_where_it_stands_above_the_noise() -> None:
    for eps in (0.004, 0.02, 0.1):
        found = calibrated(RoundingOracle(slope=0.5, curvature=1.0, noise=1e-4), eps)
        assert found.eps == eps
        assert found.snr == pytest.approx(0.5 * eps / (1e-4 / np.sqrt(2)), rel=0.5)


@pytest.mark.parametrize("eps", [1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("resolutions", [[1e-12], [1e-8], [1e-8, 3e-7, 1e-5]])
def test_an_eps_below_the_noise_is_refused_with_the_numbers(eps: float, resolutions: list[float]) -> None:
    """Also where little changes round little differently, so that more noise looks like a slope."""
    oracle = RoundingOracle(slope=0.5, curvature=1.0, noise=1e-3, resolutions=resolutions)
    sentence = (
        rf"^eps {eps:.3g} is below the noise floor: a probe changes the loss by [\d.e-]+ nats, the model's rounding by "
        r"0\.000\d+\. Leave --eps out to have it chosen, or use a larger --alpha or a less coarsely quantised base\.$"
    )
    with pytest.raises(NoiseError, match=sentence):
        calibrated(oracle, eps)


def test_an_eps_at_which_there_is_no_loss_is_refused_rather_than_replaced() -> None:
    with pytest.raises(NoiseError, match=r"^eps 0\.1 is too large: .* not a number"):
        calibrated(RoundingOracle(slope=0.5, curvature=1.0, noise=1e-4, reach=0.05), 0.1)


def test_a_first_guess_at_which_there_is_no_loss_is_made_smaller() -> None:
    found = calibrated(RoundingOracle(slope=1.0, curvature=1.0, noise=5e-5, reach=GUESS / 2))
    assert found.eps < GUESS / 2
    assert found.snr == pytest.approx(SNR)


def test_a_flat_loss_is_refused_with_its_noise() -> None:
    sentence = r"^no eps was found at which a probe's slope stands above the model's rounding of 0\.00\d+ nats; use a larger"
    with pytest.raises(NoiseError, match=sentence):
        calibrated(RoundingOracle(slope=0.0, curvature=0.0, noise=2e-3))


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(NoiseError, match=r"^no eps was found "):
        calibrated(RoundingOracle(slope=1.0, curvature=1.0, noise=1e-4, reach=-1.0))


def test_slope_and_curvature_are_told_apart_exactly_where_the_loss_is_quadratic() -> None:
    rng = np.random.default_rng(3)
    oracle = QuadraticOracle(rng.standard_normal((4, 30)), rng.uniform(0.5, 2, 30))
    oracle.load([Encoded(str(i), (i,), (1,), (2,)) for i in range(4)])
    odd, even = measure(oracle, np.zeros(30, np.float32), GROUPS, 0.25, 1, 6)
    assert even.tolist() == pytest.approx([0.25**2 / 2 * oracle.curvature.sum()] * 6)
    doubled, _ = measure(oracle, np.zeros(30, np.float32), GROUPS, 0.5, 1, 6)
    assert doubled.tolist() == pytest.approx((2 * odd).tolist())
    of_gradients = [np.linalg.norm(oracle.centres[i] * oracle.curvature) for i in range(4)]
    assert rms(odd) / 0.25 == pytest.approx(float(np.sqrt(np.mean(np.square(of_gradients)))), rel=0.5)


def test_the_same_seed_measures_the_same() -> None:
    oracle = RoundingOracle(slope=0.5, curvature=1.0, noise=1e-4)
    assert calibrated(oracle) == calibrated(oracle)


def test_a_signal_to_noise_ratio_of_one_is_the_least() -> None:
    least = Calibration(eps=0.01, noise=0.002, slope_rms=0.2, curvature=1.0, snr=1.0)
    assert checked(least) is least
    with pytest.raises(NoiseError, match=r"changes the loss by 0\.002 nats, the model's rounding by 0\.002\. "):
        checked(Calibration(eps=0.01, noise=0.002, slope_rms=0.2, curvature=1.0, snr=0.999))
