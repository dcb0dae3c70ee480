"""Choosing eps by measurement: large enough to stand above the model's arithmetic noise, small enough that a slope is a slope.

A quantised model rounds its activations, so a loss jitters however small a change of theta is. Along a random direction

    L(theta + eps z) - L(theta) = eps g + eps^2/2 z^T H z + noise

the first term's spread over directions grows with eps, the noise does not. eps is put where the spread is `SNR` times the noise:
then the noise adds less than a hundredth to a slope's variance, and training is insensitive to eps by a factor of three either way (LOG.md).
A slope is measured from both sides, so that curvature does not count as slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import direction
from fwdllama.errors import NoiseError
from fwdllama.oracle import LossOracle
from fwdllama.sampler import seed_at

SNR = 12.0
NOISE_EPS = 1e-4  # a thousandth of a useful eps: what such a step changes is rounding
_SEEDS = 1 << 61  # keeps calibration's directions apart from training's


@dataclass(frozen=True)
class Calibration:
    """What was measured, in nats; `eps` is what follows from it, `snr` the spread at eps over the noise.

    `curvature` estimates tr(H) from above: the even part's root mean square stands in for its mean, which few probes cannot tell.
    """

    eps: float
    noise: float
    slope_rms: float
    curvature: float
    snr: float
    probes_per_s: float | None = None  # where it was measured too


def measure(
    oracle: LossOracle, theta: NDArray[np.float32], groups: Sequence[Sequence[int]], eps: float, seed: int, n_probes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(odd, even) parts, each (n_probes,), of the loss's change along random directions, one group of the batch each, in nats.

    odd = (L(theta + eps z) - L(theta - eps z)) / 2 is slope, even = (L(theta + eps z) + L(theta - eps z)) / 2 - L(theta) curvature.
    """
    odd, even = [], []
    for i in range(n_probes):
        group = groups[i % len(groups)]
        offset = np.float32(eps) * direction(seed_at(seed, _SEEDS, i), theta.size)
        values = []
        for point in (theta, theta + offset, theta - offset):
            oracle.write(point)
            values.append(float(oracle.losses(group).mean()))
        odd.append((values[1] - values[2]) / 2)
        even.append((values[1] + values[2]) / 2 - values[0])
    return np.array(odd), np.array(even)


def rms(values: NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def calibrate(
    oracle: LossOracle,
    theta: NDArray[np.float32],
    groups: Sequence[Sequence[int]],  # rows of the loaded batch
    *,
    seed: int,
    first_guess: float,
    eps: float | None = None,
    n_probes: int = 12,
) -> Calibration:
    """Measure noise, slope and curvature, and choose eps, or judge the one that is given.

    Raises:
        NoiseError: the slope is below the noise.
    """
    guess = first_guess
    noise = rms(measure(oracle, theta, groups, NOISE_EPS * first_guess, seed, n_probes)[0])
    for _ in range(4):
        odd, even = measure(oracle, theta, groups, guess, seed, n_probes)
        if not np.isfinite(odd).all() or not np.isfinite(even).all():
            guess /= 8
            continue
        slope = np.sqrt(max(rms(odd) ** 2 - noise**2, 0.0)) / guess
        # Where hardly anything is rounded, an eps below that gains nothing, and the search would not end.
        wanted = max(SNR * noise / slope, first_guess / 64) if slope > 0 else 8 * guess
        if guess / 2 <= wanted <= guess * 2:
            break
        guess = float(np.clip(wanted, guess / 8, guess * 8))
    else:
        raise NoiseError(
            f"no eps was found at which a probe's slope stands above the model's rounding of {noise:.2g} nats; "
            "use a larger alpha or a less coarsely quantised base."
        )
    chosen = wanted if eps is None else eps
    if eps is not None and not np.isfinite(measure(oracle, theta, groups, eps, seed, n_probes)[0]).all():
        raise NoiseError(f"eps {eps:.3g} is too large: the loss at such a distance is not a number. Leave --eps out to have it chosen.")
    # A given eps is judged by the slope where it could be told from noise: measured far below, more noise looks like a slope.
    return checked(Calibration(float(chosen), noise, float(slope), max(2 * rms(even) / guess**2, 1e-12), float(slope * chosen / max(noise, 1e-12))))


def checked(calibration: Calibration) -> Calibration:
    """The calibration, if its slope stands above the noise.

    Raises:
        NoiseError: it does not.
    """
    if calibration.snr < 1.0:
        raise NoiseError(
            f"eps {calibration.eps:.3g} is below the noise floor: a probe changes the loss by {calibration.slope_rms * calibration.eps:.2g} "
            f"nats, the model's rounding by {calibration.noise:.2g}. Leave --eps out to have it chosen, or use a larger --alpha "
            "or a less coarsely quantised base."
        )
    return calibration
