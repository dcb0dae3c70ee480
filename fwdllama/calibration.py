"""Choosing eps by measurement: large enough to stand above the model's arithmetic noise, small enough that a slope is a slope.

A quantised model rounds its activations, so a loss jitters however small a change of theta is. Along a random direction

    L(theta + eps z) - L(theta) = eps g + eps^2/2 z^T H z + noise

the spread over directions of the first term grows with eps, the mean of the second with eps^2, the noise not at all. eps is
put where the curvature lifts the mean by `LIFT` of the spread. There the noise must be smaller than the spread.
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

LIFT = 0.15
NOISE_EPS = 1e-4  # a thousandth of a useful eps: what such a step changes is rounding
_SEEDS = 1 << 61  # keeps calibration's directions apart from training's


@dataclass(frozen=True)
class Calibration:
    """What was measured, in nats; `eps` is what follows from it, `snr` the spread at eps over the noise."""

    eps: float
    noise: float
    slope_rms: float
    curvature: float
    snr: float


def measure(
    oracle: LossOracle, theta: NDArray[np.float32], groups: Sequence[Sequence[int]], eps: float, seed: int, n_probes: int
) -> tuple[float, float]:
    """(mean, spread) over directions of L(theta + eps z) - L(theta), one group of the batch each, in nats."""
    oracle.write(theta)
    base = [float(oracle.losses(group).mean()) for group in groups]
    changes = []
    for i in range(n_probes):
        oracle.write(theta + np.float32(eps) * direction(seed_at(seed, _SEEDS, i), theta.size))
        k = i % len(groups)
        changes.append(float(oracle.losses(groups[k]).mean()) - base[k])
    return float(np.mean(changes)), float(np.std(changes))


def calibrate(
    oracle: LossOracle,
    theta: NDArray[np.float32],
    groups: Sequence[Sequence[int]],  # rows of the loaded batch
    *,
    seed: int,
    first_guess: float,
    n_probes: int = 16,
) -> Calibration:
    """Measure noise, slope and curvature, and choose eps.

    Raises:
        NoiseError: at every eps that keeps the curvature small, the slope is below the noise.
    """
    _, noise = measure(oracle, theta, groups, NOISE_EPS * first_guess, seed, n_probes)
    eps = first_guess
    for _ in range(6):
        lift, spread = measure(oracle, theta, groups, eps, seed, n_probes)
        if not np.isfinite(lift) or not np.isfinite(spread):
            eps /= 8
            continue
        # Both terms in one unit of eps: spread = eps * slope, lift = eps^2 * curvature.
        slope, curvature = np.sqrt(max(spread**2 - noise**2, 1e-18)) / eps, abs(lift) / eps**2
        ratio = curvature * eps / slope if slope > 0 else np.inf
        if 0.5 * LIFT <= ratio <= 2 * LIFT:
            break
        eps *= float(np.clip(LIFT / max(ratio, 1e-9), 1 / 8, 8))
    return checked(Calibration(eps, noise, slope, curvature, slope * eps / max(noise, 1e-12)))


def checked(calibration: Calibration) -> Calibration:
    """The calibration, if its slope stands above the noise.

    Raises:
        NoiseError: it does not.
    """
    if calibration.snr < 1.0:
        raise NoiseError(
            f"eps {calibration.eps:.3g} is below the noise floor: a probe changes the loss by {calibration.slope_rms * calibration.eps:.2g} "
            f"nats, the model's rounding by {calibration.noise:.2g}. Use an eps above {calibration.noise / max(calibration.slope_rms, 1e-12):.2g}, "
            "a larger alpha, or a less coarsely quantised base."
        )
    return calibration
