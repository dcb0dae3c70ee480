"""How many probes a step waits for.

`Fixed` takes a number. `VarianceGate` is the gate of FwdLLM (Xu et al. 2024) in scalar form: for directions of unit variance the
variance of the mean gradient, per coordinate, is about 2 mean(c^2) / n, so the gate opens at n >= 2 mean(c^2) / tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Pacing(Protocol):
    """Decides after every block of probes whether the step may be taken."""

    def wanted(self, slopes: NDArray[np.float64]) -> int:
        """How many probes this step needs in all, judging by the slopes so far; the step is taken once that many are there."""


@dataclass(frozen=True)
class Fixed:
    """Always n_probes."""

    n_probes: int

    def wanted(self, slopes: NDArray[np.float64]) -> int:
        """n_probes, whatever was seen."""
        return self.n_probes


@dataclass(frozen=True)
class VarianceGate:
    """Between `floor` and `cap` probes, as many as bring the gradient's variance per coordinate under `tau` (nats^2 per eps^2)."""

    tau: float
    floor: int
    cap: int

    def wanted(self, slopes: NDArray[np.float64]) -> int:
        """The gate for what was seen so far.

        >>> VarianceGate(tau=0.1, floor=4, cap=100).wanted(np.array([1.0, -1.0, 1.0, -1.0]))
        20
        """
        usable = slopes[np.isfinite(slopes)]
        if len(usable) < self.floor:
            return self.floor
        return int(min(self.cap, max(self.floor, np.ceil(2 * np.mean(np.square(usable)) / self.tau))))
