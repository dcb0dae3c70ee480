"""The seam between the method and whatever computes losses, with the fakes that tests and simulations use.

Everything above this line of the tree (estimator, step, trainer) knows `LossOracle` only. `QuadraticOracle` is exact, so that tests
of the estimator need no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError
from fwdllama.types import Encoded

Losses = NDArray[np.float64]


class LossOracle(Protocol):
    """Losses of a loaded batch of examples at whatever theta was written last."""

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """Make `examples` the batch, None leaving a row empty; whatever does not depend on theta is computed here, once."""

    def write(self, theta: NDArray[np.float32]) -> None:
        """Evaluate at theta, float32 (n_params,), from now on."""

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        """Mean negative log-likelihood per target token, in nats, of the batch's `rows` in that order (default: all examples).

        With `n_targets` of each example's first so many target tokens alone, for which no others need be computed.
        """


@runtime_checkable
class SideBySide(LossOracle, Protocol):
    """An oracle that can hold several thetas at once and evaluate groups of rows at one each, for less than one after the other."""

    n_places: int

    def place(self, index: int, theta: NDArray[np.float32]) -> None:
        """Have theta at place `index`, beside those of other places; what `write` wrote may be lost."""

    def losses_beside(self, groups: Sequence[Sequence[int]], *, n_targets: int | None = None) -> list[Losses]:
        """As `losses` of each group's rows, with the theta of place i for groups[i]."""


class QuadraticOracle:
    """L_i(theta) = 1/2 (theta - centre_i)^T diag(curvature) (theta - centre_i): a central difference along any z is exact.

    Example i of the batch is the one whose `prompt[0]` picks the row of `centres`, so that data order matters as in real life. The loss of its
    first n target tokens is that of the first n parameters.
    """

    def __init__(self, centres: NDArray[np.float64], curvature: NDArray[np.float64], *, n_places: int = 1) -> None:
        self.centres = centres  # (n_examples, n_params)
        self.curvature = curvature  # (n_params,)
        self.theta = np.zeros(centres.shape[1], np.float64)
        self.n_places = n_places
        self._places: dict[int, NDArray[np.float32]] = {}
        self.n_evaluations = 0
        self._batch: list[int] = []

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """Remember which centres the batch uses."""
        self._batch = [-1 if example is None else example.prompt[0] % len(self.centres) for example in examples]

    def write(self, theta: NDArray[np.float32]) -> None:
        """Set theta."""
        self.theta = theta.astype(np.float64)

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        """The quadratic losses, shifted by nothing."""
        chosen = [c for c in self._batch if c >= 0] if rows is None else [self._batch[row] for row in rows]
        if -1 in chosen and rows is not None:
            raise DataError(f"row {rows[chosen.index(-1)]} of the batch is empty.")
        self.n_evaluations += len(chosen)
        away = self.theta - self.centres[chosen]
        return np.asarray(0.5 * (away**2 * self.curvature)[:, :n_targets].sum(axis=1), np.float64)

    def place(self, index: int, theta: NDArray[np.float32]) -> None:
        """Keep theta for place `index`."""
        self._places[index] = theta.copy()

    def losses_beside(self, groups: Sequence[Sequence[int]], *, n_targets: int | None = None) -> list[Losses]:
        """The losses of each group at its own place's theta."""
        found = []
        for index, rows in enumerate(groups):
            self.write(self._places[index])
            found.append(self.losses(rows, n_targets=n_targets))
        return found

    def gradient(self, row: int) -> NDArray[np.float64]:
        """Exact gradient of example `row` of the batch at theta, (n_params,)."""
        gradient: NDArray[np.float64] = (self.theta - self.centres[self._batch[row]]) * self.curvature
        return gradient
