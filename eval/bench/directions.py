"""A direction for each example against one for the whole batch: the time until the held-out loss is the same.

All runs have the same seed, so the same examples in the same order, the same held-out examples and as many losses a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .child import in_child
from .measure import Bar, Bench, Item, Measured

SECONDS = 100.0
Curve = list[tuple[float, float]]  # (seconds of training, loss), in the order of time


def watched(values: dict[str, Any], model: str, data: Path, folder: Path) -> tuple[Curve, list[int]]:
    """Train; held-out losses from the untrained model's on, and the probes of each step."""
    from fwdllama.checkpoint import read_metrics
    from fwdllama.config import make_config
    from fwdllama.models import resolve
    from fwdllama.progress import Progress
    from fwdllama.training import Hooks, Source, train

    untrained: list[float] = []

    def progress(at: Progress) -> None:
        if not untrained and at.state.best_loss is not None:
            untrained.append(at.state.best_loss)

    run, out = folder / "run", folder / "adapter.gguf"
    train(make_config(values), resolve(model), Source(data, "squad"), run, out, Hooks(on_progress=progress))
    rows = read_metrics(run)
    curve = [(row["elapsed_s"], row["held_out_loss"]) for row in rows if row["held_out_loss"] is not None]
    return [(0.0, untrained[0]), *curve], [row["n_probes"] for row in rows]


def time_to(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """When a curve first reaches `loss`, on a straight line between its points; None where it never does.

    >>> time_to([(0, 4.0), (10, 2.0), (20, 1.0)], 1.5)
    15.0
    """
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (t0, before), (t1, after) in pairwise(curve):
        if after <= loss:
            return float(t0 + (before - loss) / (before - after) * (t1 - t0))
    return None


def directions(bench: Bench) -> Measured:
    """Three runs, one after the other: too long to alternate, so the load of the machine must not change meanwhile."""
    from fwdllama.config import make_config

    usual = make_config({"budget": {"steps": 1}})
    per_probe = {"one": 1, "four": 4, "batch": usual.batch.units * usual.batch.per_unit}
    folder = bench.fresh("directions")
    curves: dict[str, Curve] = {}
    n_groups: dict[str, float] = {}
    for name, n in per_probe.items():
        values = {
            "budget": {"seconds": bench.seconds(SECONDS)},
            "estimator": {"examples_per_probe": n, "first_rounds": 0},
            "step": {"warmup": False},  # of steps of the same probes
            "batch": {"evaluate_every": 1},
        }
        curves[name], probes = in_child(watched, values, bench.model, bench.train_data, folder / name)
        n_groups[name] = sum(probes) / len(probes) / usual.estimator.rounds
    loss = min(value for _, value in curves["batch"])
    times = {name: time_to(curve, loss) for name, curve in curves.items()}
    figures = {
        "loss": loss,
        **{f"{name}_s": value for name, value in times.items()},
        "ratio": _ratio(times["batch"], times["one"]),
        "ratio_four": _ratio(times["batch"], times["four"]),
        # 1, or it was no single direction for all.
        "directions_of_batch": n_groups["batch"],
        "directions_of_one": n_groups["one"],
        "best_loss_of_one": min(value for _, value in curves["one"]),
        "best_loss_of_four": min(value for _, value in curves["four"]),
        "examples_per_probe": per_probe,
        "curves": curves,
    }
    return Measured(figures, "fwdllama bench directions")


def _ratio(slow_s: float | None, fast_s: float | None) -> float | None:
    return slow_s / fast_s if slow_s and fast_s else None


ITEMS = (
    Item(
        "directions",
        "one direction per batch against one per example (and one for four): time to the same held-out loss",
        (Bar("ratio", ">=", 4), Bar("directions_of_batch", "<=", 1)),
        ("ratio", "ratio_four", "loss", "batch_s", "one_s", "four_s", "directions_of_batch"),
        ("data",),
        6,
        directions,
    ),
)
