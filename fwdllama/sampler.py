"""Which seeds a step tries.

`uniform` takes the run's own sequence. `aligned` is FwdLLM's discriminative sampling without its forward passes: of `candidates`
seeds for each probe it keeps the one whose direction agrees most with the previous update. Probes that were evaluated are never
dropped: averaging all of them carries more than the best one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import direction


def seed_at(run_seed: int, step: int, index: int) -> int:
    """The seed of candidate `index` of `step`: one word of a counter-based stream, so that any seed is reached at once."""
    generator = np.random.Philox(key=run_seed, counter=[0, 0, index, step])
    return int(generator.random_raw())


@dataclass(frozen=True)
class Sampler:
    """candidates = 1 is uniform sampling."""

    run_seed: int
    candidates: int = 1

    def seed(self, step: int, index: int, previous_update: NDArray[np.float32] | None) -> int:
        """Seed of probe `index` of `step`; previous_update is the last change of theta (n_params,), None at first."""
        first = index * self.candidates
        seeds = [seed_at(self.run_seed, step, first + c) for c in range(self.candidates)]
        if self.candidates == 1 or previous_update is None:
            return seeds[0]
        # Either sign of z probes the same line, so it is the size of the agreement that counts.
        return max(seeds, key=lambda seed: abs(float(direction(seed, previous_update.size) @ previous_update)))
