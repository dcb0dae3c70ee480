"""The next token from its logits: the likeliest, or one drawn, from a generator that each answer has for itself."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64
FEW = 1024  # sorting these instead of a vocabulary of 49,000 takes a tenth of the time, and they nearly always suffice


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the likeliest; `top_p` draws from the likeliest that together are as probable.

    The same seed gives the same draws; None gives others every time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self.sampling = sampling
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % MAX_SEED
        self._rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))

    def choose(self, logits: NDArray[np.float32]) -> int:
        """A token id, from logits (n_vocab,)."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # a temperature near 0 makes all but the likeliest -inf, which is what it means
            weights = np.exp((logits.astype(np.float64) - float(logits.max())) / self.sampling.temperature)
        kept = _likeliest(weights, self.sampling.top_p) if self.sampling.top_p < 1 else np.arange(len(weights))
        totals = np.cumsum(weights[kept])
        drawn = int(np.searchsorted(totals, self._rng.random() * totals[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])


def _likeliest(weights: NDArray[np.float64], share: float) -> NDArray[np.intp]:
    """Indices of the largest weights, largest first, up to the first whose sum is at least `share` of all."""
    wanted = share * weights.sum()
    few = np.argpartition(-weights, FEW)[:FEW] if len(weights) > FEW else np.arange(len(weights))
    if weights[few].sum() < wanted:
        few = np.arange(len(weights))
    order: NDArray[np.intp] = few[np.lexsort((few, -weights[few]))]
    sums = np.cumsum(weights[order])
    return order[: int(np.searchsorted(sums, wanted)) + 1]
