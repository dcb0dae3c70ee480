"""From slopes to coefficients: clip, divide by the curvature, and stay linear in the directions.

    theta <- theta - sum_i a_i z_i,    a_i = lr c_i / tr(H),    tr(H) ~ m E[c^2]

A single probe that moves theta by a z lowers the loss by a c and raises it by a^2/2 z^T H z, whose mean over random signs is a^2/2 tr(H), so
c / tr(H) is the best length that one probe can know. For a log-likelihood the trace of the Gauss-Newton matrix is the mean squared
gradient of single examples (Fisher's identity; measured within 10 % from a loss of 2.2 on), and random signs give E[c^2] = |g|^2; a probe
of m examples whose gradients agree little has an m-th of it. So `lr` has no unit and needs no tuning to a model's scale, and a step
stays linear in its directions, which makes a run its ledger of (seed, a_i).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.config import HALF_LIFE, LR, USUAL_PROBES, StepConfig
from fwdllama.direction import Bits, each_packed, unpack
from fwdllama.estimator import Probe

WARMUP_LENGTH, WARMUP_EXPONENT = 0.7, 0.75  # chosen by losses within 20 s (LOG.md); an exponent of 1 would make all steps equally long


@dataclass(frozen=True)
class StepState:
    """Running mean of squared slopes, in squared nats per squared unit of theta; None before the first step."""

    mean_square: float | None = None

    def updated(self, slopes: NDArray[np.float64], decay: float = 0.8) -> StepState:
        """The state after a step whose usable slopes are `slopes`; unchanged where there are none.

        >>> StepState(4.0).updated(np.array([3.0, -3.0])).mean_square
        5.0
        """
        if not len(slopes):
            return self
        now = float(np.mean(np.square(slopes)))
        return StepState(now if self.mean_square is None else decay * self.mean_square + (1 - decay) * now)


def evened(
    slopes: NDArray[np.float64],  # (n_probes,) not-finite ones as NaN
    group: NDArray[np.int64],  # (n_probes,) which examples each was evaluated on
    width: float = 1.0,  # in medians of the groups' root mean squares
) -> NDArray[np.float64]:
    """Slopes of which no group's root mean square exceeds `width` times the median group's.

    A tenth of the examples has most of the slopes' variance and little of their mean (LOG.md), so a step that divides by the variance goes
    further when no example outweighs the others.

    >>> evened(np.array([1.0, -1.0, 8.0, -8.0, 2.0, -2.0]), np.array([0, 0, 1, 1, 2, 2]))
    array([ 1., -1.,  2., -2.,  2., -2.])
    """
    groups, place = np.unique(group, return_inverse=True)
    usable = np.isfinite(slopes)
    n = np.bincount(place[usable], minlength=len(groups))
    sums = np.bincount(place[usable], weights=np.square(slopes[usable]), minlength=len(groups))
    sizes = np.sqrt(sums / np.maximum(n, 1))
    if not (sizes > 0).any():
        return slopes
    limit = width * float(np.median(sizes[sizes > 0]))
    weights: NDArray[np.float64] = np.minimum(1.0, limit / np.maximum(sizes, limit))
    return slopes * weights[place]


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
    lr: float,
    mean_square: float,
    examples_per_probe: int,
) -> NDArray[np.float32]:
    """a_i of every probe, float32 because that is what a ledger entry holds; all zero where every slope was.

    >>> coefficients(np.array([1.0, -2.0]), lr=0.5, mean_square=2.0, examples_per_probe=2)
    array([ 0.125, -0.25 ], dtype=float32)
    """
    if mean_square <= 0.0:
        return np.zeros(len(slopes), np.float32)
    return np.asarray(slopes * (lr / (examples_per_probe * mean_square)), np.float32)


@dataclass(frozen=True)
class Measured:
    """The slopes of one kind of probes in a step: of whole answers, or of their first tokens alone, each divided by its own curvature."""

    probes: Sequence[Probe]
    wanted: int  # probes, by the pacing
    limited: NDArray[np.float64]  # (n_probes,)
    usable: NDArray[np.float64]  # those of `limited` that were finite
    mean_square: float | None

    @classmethod
    def of(cls, probes: Sequence[Probe], slopes: NDArray[np.float64], wanted: int, mean_square: float | None, example_clip: float) -> Measured:
        """`slopes` clipped example by example, then all; `mean_square` is the running one of the steps before."""
        limited = clipped(evened(slopes, np.array([probe.group for probe in probes]), example_clip))
        usable = limited[np.isfinite(slopes)]
        return cls(probes, wanted, limited, usable, StepState(mean_square).updated(usable).mean_square)

    def coefficients(self, lr: float, examples_per_probe: int) -> NDArray[np.float32]:
        """a_i of every probe, (n_probes,)."""
        return coefficients(self.limited, lr, self.mean_square or 0.0, examples_per_probe)


def learning_rate(lr: float, *, fraction: float, final: float, n_probes: int, half_life: float) -> float:
    """The rate after `n_probes` probes and a `fraction` of the budget: linear to `final` of itself, and 1 / (1 + n_probes / half_life).

    >>> learning_rate(0.5, fraction=0.5, final=0.0, n_probes=800, half_life=800)
    0.125
    """
    return lr * ((1 - (1 - final) * fraction) / (1 + n_probes / half_life))


def rate_of(step: StepConfig, *, fraction: float, n_probes: int) -> float:
    """The rate of a run after `n_probes` probes, which were a `fraction` of its budget.

    Where the configuration leaves lr and half_life open, a run of up to USUAL_PROBES has LR and HALF_LIFE. One that has room for s times as many
    begins with LR / sqrt(s), which halves s times later: it goes further by sqrt(s) with the noise of the shorter one, since that adds up in squares.

    >>> long = {"fraction": 0.5, "n_probes": 2 * USUAL_PROBES}
    >>> [round(rate_of(StepConfig(final_lr=1.0), **usual), 5) for usual in ({"fraction": 0.5, "n_probes": HALF_LIFE}, long)]
    [0.00375, 0.00167]
    """
    stretch = max(1.0, n_probes / fraction / USUAL_PROBES) if fraction > 0 else 1.0
    return learning_rate(
        LR / math.sqrt(stretch) if step.lr is None else step.lr,
        fraction=fraction,
        final=step.final_lr,
        n_probes=n_probes,
        half_life=HALF_LIFE * stretch if step.half_life is None else step.half_life,
    )


def warmup_factor(share: float) -> float:
    """What the rate is multiplied with in one of the first steps, which has a `share` of the usual probes.

    >>> round(warmup_factor(1 / 8), 2)
    3.33
    """
    return float(WARMUP_LENGTH * share**-WARMUP_EXPONENT)


def combined(bits: Iterable[Bits], coefficients: Sequence[float] | NDArray[np.float32], n_params: int) -> NDArray[np.float32]:
    """sum_i a_i z_i in float32, added in the order given: the order is part of the contract that makes replay bit-identical."""
    total = np.zeros(n_params, np.float32)
    for packed, coefficient in zip(bits, coefficients, strict=True):
        if coefficient != 0.0:
            total += unpack(packed, n_params, coefficient)
    return total


def replayed(theta: NDArray[np.float32], seeds: Sequence[int], coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
    """Theta after one step that is known by its seeds and coefficients."""
    return theta - combined(each_packed(map(int, seeds), theta.size), coefficients, theta.size)
