"""Losses over training: points of time, loss and work, and who is where first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fwdllama.types import Encoded, Scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from fwdllama.config import EngineConfig
    from fwdllama.llama.model import Model
    from fwdllama.space import Space, Theta


class Point(NamedTuple):
    """Of a curve: seconds of training, the questions' loss, and forward passes of single examples so far (prompts that are kept not counted)."""

    seconds: float
    loss: float
    passes: int = 0


Curve = list[Point]  # from the untrained model's on


def reached(curve: Sequence[Point], loss: float) -> Point | None:
    """Where a curve is first at `loss` or below; None where it never is.

    >>> reached([Point(0, 4.0), Point(5, 1.3), Point(9, 1.5)], 1.32).seconds
    5
    """
    return next((point for point in curve if point.loss <= loss), None)


def reached_s(curve: Sequence[Point], loss: float) -> float | None:
    """When that is."""
    point = reached(curve, loss)
    return None if point is None else point.seconds


def fastest(curves: Sequence[Curve], loss: float) -> float | None:
    """The earliest time at which any of the curves is at `loss`."""
    times = [seconds for curve in curves if (seconds := reached_s(curve, loss)) is not None]
    return min(times, default=None)


@contextmanager
def asking(
    model: Model, space: Space, scope: Scope, questions: Sequence[Encoded], engine: EngineConfig, n_threads: int
) -> Iterator[Callable[[Theta], float]]:
    """A function that gives the questions' mean loss at a theta, by llama.cpp."""
    from fwdllama.llama.context import ContextOptions
    from fwdllama.llama.oracle import LlamaOracle
    from gguf_tools.plan import whole_cells

    n, cells = len(questions), whole_cells(max(e.n_tokens for e in questions))
    options = ContextOptions(cells, n, max(64, n), n_threads=n_threads, kv_type=engine.kv_type, flash=engine.flash)
    with LlamaOracle(model, space, scope, options) as oracle:
        oracle.load(questions)

        def loss(theta: Theta) -> float:
            oracle.write(theta)
            return float(oracle.losses().mean())

        yield loss
