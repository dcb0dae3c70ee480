"""From slopes to coefficients: clip, normalise, and stay linear in the directions.

    theta <- theta - sum_i a_i z_i,    a_i = lr c_i / (N rms)

The normalised step needs no tuning to the scale of the loss, and because it is linear a run is its ledger of (seed, a_i).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import Bits, packed_bits, unpack


@dataclass(frozen=True)
class StepState:
    """Running mean of squared slopes; None before the first step."""

    mean_square: float | None = None

    def updated(self, slopes: NDArray[np.float64], decay: float = 0.9) -> StepState:
        """The state after a step whose usable slopes are `slopes`."""
        if not len(slopes):
            return self
        now = float(np.mean(np.square(slopes)))
        if self.mean_square is None:
            return StepState(now)
        return StepState(decay * self.mean_square + (1 - decay) * now)


def clipped(slopes: NDArray[np.float64], width: float = 3.0) -> NDArray[np.float64]:
    """Slopes limited to median +- width x 1.4826 MAD; NaN becomes 0, which drops the probe from the step.

    >>> clipped(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 1000.0, np.nan])).round(2)
    array([0.  , 1.  , 2.  , 3.  , 4.  , 9.17, 0.  ])
    """
    usable = slopes[np.isfinite(slopes)]
    if not len(usable):
        return np.zeros_like(slopes)
    middle = float(np.median(usable))
    spread = 1.4826 * float(np.median(np.abs(usable - middle)))
    limited: NDArray[np.float64] = np.clip(slopes, middle - width * spread, middle + width * spread)
    limited[~np.isfinite(slopes)] = 0.0
    return limited


def coefficients(
    slopes: NDArray[np.float64],  # (n_probes,) clipped
    n_usable: int,
    lr: float,
    mean_square: float,
) -> NDArray[np.float32]:
    """a_i of every probe, float32 because that is what a ledger entry holds; all zero where every slope was."""
    if n_usable == 0 or mean_square <= 0.0:
        return np.zeros(len(slopes), np.float32)
    return (slopes * (lr / (n_usable * np.sqrt(mean_square)))).astype(np.float32)


def combined(bits: Iterable[Bits], coefficients: Sequence[float] | NDArray[np.float32], n_params: int) -> NDArray[np.float32]:
    """sum_i a_i z_i in float32, added in the order given: the order is part of the contract that makes replay bit-identical."""
    total = np.zeros(n_params, np.float32)
    for packed, coefficient in zip(bits, coefficients, strict=True):
        if coefficient != 0.0:
            z = unpack(packed, n_params)
            z *= np.float32(coefficient)
            total += z
    return total


def replayed(theta: NDArray[np.float32], seeds: Sequence[int], coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
    """theta after one step that is known by its seeds and coefficients."""
    bits = (packed_bits(int(seed), theta.size) for seed in seeds)
    return theta - combined(bits, coefficients, theta.size)
