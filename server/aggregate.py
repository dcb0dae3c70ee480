"""From a round's results to its ledger entry: the same algebra as single-process training, over what devices sent.

Pure: results in, entry out. The order of the seeds in the entry is that of round, slot and seed, whoever delivered first, so that the same
results always make the same entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.estimator import slopes_of
from fwdllama.federation.message import TrainResult
from fwdllama.federation.spec import RunSpec
from fwdllama.ledger import Entry
from fwdllama.pacing import Fixed, Pacing, VarianceGate
from fwdllama.step import StepState, clipped, coefficients, rate_of

ROUNDING = 1e-7  # of losses, relative, as they travel
LEAST_LOSS = 1e-6  # nats; of a smaller one float32 logits say nothing
TINY = 0.05  # of the middle result's slopes


@dataclass(frozen=True)
class Contribution:
    """One accepted result. `lag`: by how many rounds it is late."""

    device: str
    seeds: NDArray[np.uint64]  # (n,)
    result: TrainResult
    lag: int = 0


@dataclass(frozen=True)
class Learner:
    """What one round leaves to the next, beside theta."""

    mean_square: float | None = None
    n_probes: int = 0


@dataclass(frozen=True)
class Merged:
    """A closed round: its entry, what the next one begins with, and what is worth showing."""

    entry: Entry
    learner: Learner
    loss: float  # mean over examples at the round's version, nats
    gradient_rms: float
    lr: float


def problem(result: TrainResult, spec: RunSpec, n_seeds: int) -> str | None:
    """What is wrong with a result, in a sentence; None: nothing."""
    sided, groups = spec.train.estimator.sided, len(result.examples)
    if len(result.plus) != n_seeds:
        return f"plus holds {len(result.plus)} losses, but the task has {n_seeds} seeds."
    if not 1 <= groups <= n_seeds or min(result.examples) < 1:
        return f"examples must count the examples of 1 to {n_seeds} groups, each at least 1; it holds {groups} counts."
    expected = n_seeds if sided == "two" else groups
    if len(result.minus) != expected:
        return f"minus holds {len(result.minus)} losses, but must hold {expected} ({sided}-sided)."
    most = spec.aggregation.max_loss
    for name, values in (("plus", result.plus), ("minus", result.minus), ("loss", (result.loss,))):
        for i, value in enumerate(values):
            if not 0.0 <= value <= most:  # NaN is neither
                return f"{name}[{i}] is {value!r}, but a loss must be between 0 and {most:g} nats."
    return None


def slopes(contribution: Contribution, spec: RunSpec) -> NDArray[np.float64]:
    """Projected gradients (n,) of one result's seeds."""
    result, sided = contribution.result, spec.train.estimator.sided
    group = np.arange(len(contribution.seeds)) % len(result.examples)
    minus = np.array(result.minus, np.float64)
    return slopes_of(np.array(result.plus, np.float64), minus if sided == "two" else minus[group], group, spec.eps, sided)


def bounded_slopes(contributions: Sequence[Contribution], spec: RunSpec) -> list[NDArray[np.float64]]:
    """Projected gradients of every result, none of which outweighs the others; the plain mean takes them as they are.

    Slopes far larger than those of the middle result are scaled down. Those far smaller, or below the rounding of losses, are dropped: a
    step divides by the slopes' mean square, so that a first round of losses which hardly differ would lead anywhere (losses that do not
    differ at all, of half the devices, took the toy's theta to 1e8).
    """
    found = [slopes(contribution, spec) for contribution in contributions]
    if spec.aggregation.rule == "mean":
        return found
    sizes = [float(np.sqrt(np.mean(np.square(x[np.isfinite(x)])))) if np.isfinite(x).any() else 0.0 for x in found]
    least = [ROUNDING * max(LEAST_LOSS, c.result.loss, *c.result.plus) / spec.eps for c in contributions]
    told = sorted(size for size, rounding in zip(sizes, least, strict=True) if size > rounding)
    if not told:
        return [np.full_like(x, np.nan) for x in found]
    middle = told[len(told) // 2]
    most = spec.aggregation.scale * middle
    return [
        np.full_like(x, np.nan) if size <= rounding or size < TINY * middle else x * min(1.0, most / size)
        for x, size, rounding in zip(found, sizes, least, strict=True)
    ]


def pooled(contributions: Sequence[Contribution], spec: RunSpec) -> tuple[NDArray[np.uint64], NDArray[np.float64], NDArray[np.float64]]:
    """(seeds, slopes, weights), each (n,), one for every different seed, in the order of `contributions`."""
    seeds = np.concatenate([c.seeds for c in contributions])
    measured = np.concatenate(bounded_slopes(contributions, spec))
    trusted = np.concatenate([_weights(c, spec) for c in contributions])
    if len(np.unique(seeds)) == len(seeds):
        return seeds, np.where(np.isfinite(measured), measured, np.nan), trusted
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for seed, slope, weight in zip(seeds.tolist(), measured.tolist(), trusted.tolist(), strict=True):
        by_seed.setdefault(seed, []).append((slope, weight))
    chosen = [_one([s for s, _ in found], spec) for found in by_seed.values()]
    weights = [float(np.mean(sorted(w for _, w in found))) for found in by_seed.values()]
    return np.array(list(by_seed), np.uint64), np.array(chosen, np.float64), np.array(weights, np.float64)


def _weights(contribution: Contribution, spec: RunSpec) -> NDArray[np.float64]:
    """How much each seed of a result counts (n,): less when late, and when fewer examples were asked than the run wants."""
    late = (1.0 + contribution.lag) ** -spec.aggregation.staleness_power
    counts = np.array(contribution.result.examples, np.float64)[np.arange(len(contribution.seeds)) % len(contribution.result.examples)]
    weights: NDArray[np.float64] = late * np.minimum(1.0, counts / spec.train.estimator.examples_per_probe)
    return weights


def _one(values: list[float], spec: RunSpec) -> float:
    """The slope of a seed that several devices measured."""
    usable = np.sort(np.array([v for v in values if np.isfinite(v)], np.float64))
    if not len(usable):
        return float("nan")
    if spec.aggregation.rule == "median":
        return float(np.median(usable))
    if spec.aggregation.rule == "trimmed":
        cut = int(spec.aggregation.trim * len(usable))
        usable = usable[cut : len(usable) - cut]
    return float(usable.mean())


def merge(contributions: Sequence[Contribution], spec: RunSpec, learner: Learner, number: int, fraction: float) -> Merged:
    """The step of round `number`, after `fraction` of the budget.

    contributions: at least one, in the order of round and slot.
    """
    seeds, measured, weights = pooled(contributions, spec)
    limited = np.nan_to_num(measured) if spec.aggregation.rule == "mean" else clipped(measured, spec.aggregation.width)
    usable = limited[np.isfinite(measured)]
    running = StepState(learner.mean_square).updated(usable)
    lr = rate_of(spec.train.step, fraction=fraction, n_probes=learner.n_probes)
    with np.errstate(over="ignore", invalid="ignore"):
        values = coefficients(limited * weights, lr, running.mean_square or 0.0, spec.train.estimator.examples_per_probe)
    values[~np.isfinite(values)] = 0.0  # slopes so small that dividing by their square overflows, which only the rule `mean` lets through
    per_probe = spec.train.estimator.examples_per_probe
    n_examples = [sum(min(n, per_probe) for n in c.result.examples) for c in contributions]
    return Merged(
        Entry(number, seeds, values),
        Learner(running.mean_square, learner.n_probes + len(seeds)),
        float(np.average([c.result.loss for c in contributions], weights=n_examples)),
        float(np.sqrt(np.mean(np.square(usable)))) if len(usable) else 0.0,
        lr,
    )


def wanted(contributions: Sequence[Contribution], spec: RunSpec) -> int:
    """How many probes the round needs, judging by what came so far."""
    pacing: Pacing = Fixed(spec.round.probes)
    if spec.train.pacing.kind == "variance":
        pacing = VarianceGate(spec.train.pacing.tau, spec.round.probes, spec.round.most)
    return pacing.wanted(pooled(contributions, spec)[1] if contributions else np.zeros(0))
