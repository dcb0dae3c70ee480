"""How many examples a probe should see: the variance of what it tells, per second, by a model and by measurement.

A probe of m examples gives a slope c with E[c^2] = |g|^2 + (E|g_i|^2 - |g|^2) / m, which is what its direction adds to the variance of every
coordinate of the mean gradient. In a given time there are the more probes the less each costs, so the best m has the least

    cost(m) (|g|^2 + (E|g_i|^2 - |g|^2) / m)

Slopes of all m are of the same losses: a group's slope is the mean of its examples'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .child import in_child, run
from .measure import Bar, Bench, Item, Measured
from .runs import train_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fwdllama.llama.oracle import LlamaOracle

SIZES = (1, 2, 4, 8)
DIRECTIONS = 48  # for each group of the largest size
STEPS = 12  # of training, before slopes are taken a second time
ROUNDS = 4
RATIOS = (3, 5, 20, 230)  # E|g_i|^2 / |g|^2: untrained, at losses of 2.2, 1.5 and 1.06 (LOG.md)
SEEDS = 1 << 62  # keeps these directions apart from training's


@dataclass(frozen=True)
class State:
    """At one theta: the mean loss in nats, and by size the mean squared slope and a probe's seconds."""

    loss: float
    squares: dict[int, float]
    seconds: dict[int, float]


def expected(squares: dict[int, float], size: int) -> float:
    """The mean squared slope of a size from those of the smallest and the largest.

    >>> expected({1: 9.0, 8: 2.0}, 2)
    5.0
    """
    low, high = min(squares), max(squares)
    spread = (squares[low] - squares[high]) / (1 / low - 1 / high)
    return squares[high] + spread * (1 / size - 1 / high)


def best(squares: dict[int, float], seconds: dict[int, float]) -> int:
    """The size with the least variance a second.

    >>> best({1: 9.0, 2: 5.0, 4: 3.0}, {1: 1.0, 2: 1.5, 4: 3.0})
    2
    """
    return min(squares, key=lambda size: squares[size] * seconds[size])


def recommended(ratio: float, seconds: dict[int, float]) -> int:
    """The best size where E|g_i|^2 is `ratio` times |g|^2.

    >>> recommended(20, {1: 1.0, 2: 1.2, 4: 2.0}), recommended(3, {1: 1.0, 2: 2.0})
    (4, 1)
    """
    return best({size: 1 + (ratio - 1) / size for size in seconds}, seconds)


def states(model: str, data: Path, run_path: Path) -> list[State]:
    """Before the first step of a finished run and after its last, on the run's first batch."""
    from fwdllama.checkpoint import RunDirectory
    from fwdllama.config import read_config
    from fwdllama.hooks import Hooks
    from fwdllama.material import Source
    from fwdllama.models import resolve
    from fwdllama.session import opened
    from gguf_tools.adapter import read_adapter

    config = read_config(run_path / "config.json")
    config = config.model_copy(update={"estimator": config.estimator.model_copy(update={"examples_per_probe": 1})})
    a = {name: pair[0] for name, pair in read_adapter(run_path / "initial.gguf").tensors.items()}
    with RunDirectory.open(run_path) as finished, opened(config, resolve(model), Source(data), Hooks(), a=a) as session:
        batch = session.batches.batch(0)[0]
        session.oracle.load(batch)
        rows = [row for row, example in enumerate(batch) if example is not None]
        initial = session.space.initial_theta()
        eps, limit = finished.state.eps, config.estimator.outlier
        return [_state(session.oracle, theta, rows, eps, limit) for theta in (initial, finished.theta(initial))]


def _state(oracle: LlamaOracle, theta: NDArray[np.float32], rows: Sequence[int], eps: float, outlier: float) -> State:
    from fwdllama.estimator import evaluate

    oracle.write(theta)
    loss = float(oracle.losses(rows).mean())
    seconds: dict[int, float] = {}
    n_places = oracle.n_places
    for size in SIZES:
        groups = grouped(rows, size)
        oracle.n_places = max(1, n_places // size)
        times = []
        for turn in range(ROUNDS):
            begun = time.perf_counter()
            list(evaluate(oracle, theta, [(SEEDS + turn, group) for group in range(len(groups))], groups, None, eps))
            times.append((time.perf_counter() - begun) / (2 * len(groups)))
        seconds[size] = median(times)
    oracle.n_places = n_places
    return State(loss, _squares(oracle, theta, grouped(rows, max(SIZES)), eps, outlier * loss), seconds)


def grouped(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Whole groups of neighbours only.

    >>> grouped([0, 1, 2, 4, 5, 6, 7], 2)
    [(0, 1), (4, 5), (6, 7)]
    """
    held = set(rows)
    starts = range(0, max(rows) + 1, size)
    return [tuple(range(start, start + size)) for start in starts if held.issuperset(range(start, start + size))]


def _squares(
    oracle: LlamaOracle, theta: NDArray[np.float32], groups: Sequence[Sequence[int]], eps: float, limit: float
) -> dict[int, float]:
    """Mean squared slope by size; slopes are taken from both sides, so that curvature is none of them."""
    import numpy as np

    from fwdllama.direction import moved, packed_bits
    from fwdllama.loss import bounded

    found = []
    for index in range(DIRECTIONS):
        for number, rows in enumerate(groups):
            bits = packed_bits(SEEDS + 1000 + index * len(groups) + number, theta.size)
            sides = []
            for distance in (eps, -eps):
                oracle.write(moved(theta, bits, distance))
                sides.append(bounded(oracle.losses(rows), limit))
            found.append((sides[0] - sides[1]) / (2 * eps))
    slopes = np.array(found)  # (directions x groups, largest size)
    return {size: float(np.square(slopes.reshape(len(slopes), -1, size).mean(axis=2)).mean()) for size in SIZES}


def probe_examples(bench: Bench) -> Measured:
    """Train a little, then look at both ends of it."""
    from fwdllama.config import read_config

    folder = bench.fresh("probe-examples")
    ran = run(bench, *train_words(bench, folder, "--steps", STEPS))
    found = in_child(states, bench.model, bench.train_data, folder / "run")
    default = read_config(folder / "run" / "config.json").estimator.examples_per_probe
    return Measured(figures_of(found, default), ran.command)


def figures_of(found: Sequence[State], default: int) -> dict[str, Any]:
    """What follows from the two states."""
    figures: dict[str, Any] = {}
    errors, above = [], []
    for name, state in zip(("untrained", "trained"), found, strict=True):
        products = {size: state.squares[size] * state.seconds[size] for size in SIZES}
        modelled = {size: expected(state.squares, size) for size in SIZES}
        errors += [abs(modelled[size] / state.squares[size] - 1) for size in SIZES]
        above.append(products[default] / min(products.values()))
        figures |= {
            f"{name}_best": best(state.squares, state.seconds),
            f"{name}_recommended": best(modelled, state.seconds),
            f"{name}_loss": state.loss,
            f"{name}_variance_per_s": {str(size): products[size] / products[1] for size in SIZES},
            f"{name}_ms": {str(size): 1000 * seconds for size, seconds in state.seconds.items()},
        }
    return figures | {
        "model_error": max(errors),
        "default": default,
        "default_above_best": max(above),
        "recommended_at_ratio": {str(ratio): recommended(ratio, found[1].seconds) for ratio in RATIOS},
    }


ITEMS = (
    Item(
        "probe-examples",
        "examples a probe should see: variance of the estimate per second, modelled and measured",
        (Bar("model_error", "<=", 0.25), Bar("default_above_best", "<=", 1.5)),
        ("model_error", "default_above_best", "untrained_best", "untrained_recommended", "trained_best", "trained_recommended"),
        ("data",),
        4,
        probe_examples,
    ),
)
