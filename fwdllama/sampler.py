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


def seeds_at(run_seed: int, step: int, first: int, n: int) -> list[int]:
    """`seed_at` of n indices in a row, at a tenth of its cost: a generator is dear to make, because each asks the system for entropy.

    >>> seeds_at(7, 0, 3, 2) == [seed_at(7, 0, 3), seed_at(7, 0, 4)]
    True
    """
    generator = np.random.Philox(key=run_seed, counter=[0, 0, first, step])
    state = generator.state
    seeds = []
    for index in range(first, first + n):
        state["state"]["counter"][2] = index
        generator.state = state
        seeds.append(int(generator.random_raw()))
    return seeds


@dataclass(frozen=True)
class Sampler:
    """candidates = 1 is uniform sampling."""

    run_seed: int
    candidates: int = 1

    def seed(self, step: int, index: int, previous_update: NDArray[np.float32] | None) -> int:
        """Seed of probe `index` of `step`; previous_update is the last change of theta (n_params,), None at first."""
        return self.seeds(step, index, 1, previous_update)[0]

    def seeds(self, step: int, first: int, n: int, previous_update: NDArray[np.float32] | None) -> list[int]:
        """Seeds of probes `first` to `first` + n - 1 of `step`."""
        tried = seeds_at(self.run_seed, step, first * self.candidates, n * self.candidates)
        if self.candidates == 1 or previous_update is None:
            return tried[:: self.candidates]
        # Either sign of z probes the same line, so it is the size of the agreement that counts.
        found = [(agreement(seed, previous_update), seed) for seed in tried]
        groups = (found[i : i + self.candidates] for i in range(0, len(found), self.candidates))
        return [max(group, key=lambda pair: pair[0])[1] for group in groups]


def agreement(seed: int, update: NDArray[np.float32]) -> float:
    """|z . update| of the direction of `seed`, the same on every machine.

    A linear algebra library adds in an order of its own on each processor, and two workers of an aggregator must not see another seed as the
    best; numpy's sum has one order. Sign changes are exact, so only float64 additions round.

    >>> agreement(7, np.array([1.0, 1.0, 0.5], np.float32))
    1.5
    """
    return abs(float((direction(seed, update.size) * update).sum(dtype=np.float64)))
