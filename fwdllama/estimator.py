"""Projected gradients from loss differences along random directions.

The default gives every direction to one small group of examples, not to the whole batch: with B examples sharing one direction the
perturbation noise of N directions is d |g_batch|^2 / N, with directions of their own it is d E|g_i|^2 / (N B), and decoding a
group's few answer tokens costs far less than decoding all. Spall 1992 (two-sided), Malladi et al. 2023 (language models), Xu et
al. 2024 (FwdLLM, forward gradients in federation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import Bits, moved, packed_bits
from fwdllama.loss import bounded
from fwdllama.oracle import Losses, LossOracle, SideBySide

Sided = Literal["one", "two"]
Nats = TypeVar("Nats", float, NDArray[np.float64])


@dataclass(frozen=True)
class Probe:
    """One direction evaluated on one group of the batch's examples.

    loss_plus, loss_minus: mean (bounded) loss of the group at theta + eps z and at theta - eps z (one-sided: at theta), in nats.
    bits: the direction itself, packed; kept so that the step need not draw it again.
    """

    seed: int
    group: int
    loss_plus: float
    loss_minus: float
    bits: Bits


def projected_gradient(loss_plus: Nats, loss_minus: Nats, distance: float) -> Nats:
    """Finite difference of the loss along one direction z, in nats per unit of eps.

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)     two-sided, distance = 2 eps
        g = (L(theta + eps z) - L(theta)) / eps                 one-sided, distance = eps

    >>> projected_gradient(2.5, 2.0, 0.5)
    1.0
    """
    return (loss_plus - loss_minus) / distance


def evaluate(
    oracle: LossOracle,
    theta: NDArray[np.float32],  # (n_params,)
    plan: Sequence[tuple[int, int]],  # (seed, group)
    groups: Sequence[Sequence[int]],  # rows of the batch that each group holds
    base: Losses | None,  # losses at theta of the batch's rows; None for two-sided probes
    eps: float,
    limit: float = math.inf,  # nats, above which a loss counts ever less
    n_targets: int | None = None,  # the first target tokens of each example, whose losses count alone
) -> Iterator[Probe]:
    """Evaluate the probes of `plan`, in its order and as many at once as the oracle can; theta itself is never changed, so nothing drifts.

    Slopes are those of `bounded` losses.
    """
    at_once = oracle.n_places if isinstance(oracle, SideBySide) else 1
    for begin in range(0, len(plan), at_once):
        block = plan[begin : begin + at_once]
        drawn = [packed_bits(seed, theta.size) for seed, _ in block]
        chosen = [groups[group] for _, group in block]
        plus = _losses(oracle, theta, drawn, np.float32(eps), chosen, n_targets)
        if base is None:
            minus = _losses(oracle, theta, drawn, -np.float32(eps), chosen, n_targets)
        else:
            minus = [base[list(rows)] for rows in chosen]
        for (seed, group), bits, up, down in zip(block, drawn, plus, minus, strict=True):
            yield Probe(seed, group, float(bounded(up, limit).mean()), float(bounded(down, limit).mean()), bits)


def _losses(
    oracle: LossOracle,
    theta: NDArray[np.float32],
    drawn: Sequence[Bits],
    distance: np.float32,
    groups: Sequence[Sequence[int]],
    n_targets: int | None,
) -> list[Losses]:
    """Losses of each group at theta + distance z, with a z of its own."""
    if len(drawn) > 1 and isinstance(oracle, SideBySide):
        for index, bits in enumerate(drawn):
            oracle.place(index, moved(theta, bits, distance))
        return oracle.losses_beside(groups, n_targets=n_targets)
    found = []
    for bits, rows in zip(drawn, groups, strict=True):
        oracle.write(moved(theta, bits, distance))
        found.append(oracle.losses(rows, n_targets=n_targets))
    return found


def centred_slopes(probes: Sequence[Probe], eps: float, sided: Sided) -> NDArray[np.float64]:
    """Projected gradients (n_probes,), not-finite ones as NaN; one-sided ones with their group's mean removed."""
    plus, minus = np.array([p.loss_plus for p in probes], np.float64), np.array([p.loss_minus for p in probes], np.float64)
    return slopes_of(plus, minus, np.array([p.group for p in probes]), eps, sided)


def slopes_of(
    plus: NDArray[np.float64],  # (n_probes,) nats
    minus: NDArray[np.float64],  # (n_probes,) nats; one-sided: at theta
    group: NDArray[np.int64],  # (n_probes,) which group of examples each was evaluated on
    eps: float,
    sided: Sided,
) -> NDArray[np.float64]:
    """`centred_slopes` of plain numbers.

    Curvature adds eps/2 z^T H_i z to a one-sided slope, which for random signs z is nearly the same number for every direction of
    one group, and differs between groups; the group's mean takes it away. Groups with fewer than four probes use the mean of all.
    """
    slopes = np.asarray(projected_gradient(plus, minus, eps if sided == "one" else 2 * eps))
    slopes[~np.isfinite(slopes)] = np.nan
    if sided == "two" or not len(slopes):
        return slopes
    everything = np.nanmean(slopes) if np.isfinite(slopes).any() else 0.0
    centred: NDArray[np.float64] = slopes - everything
    for g in np.unique(group):
        mine = np.flatnonzero((group == g) & np.isfinite(slopes))
        if len(mine) >= 4:
            centred[mine] = slopes[mine] - slopes[mine].mean()
    return centred
