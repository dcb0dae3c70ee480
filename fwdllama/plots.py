"""The plots of reports: which figures of a run or an evaluation are drawn against what, in which units.

`metrics.jsonl` holds None where nothing was measured and NaN where a loss was dropped; such points are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from fwdllama.drawing import Figure, Point, Series, bar_figure, line_figure, thinned
from fwdllama.formats import is_number

Row = Mapping[str, Any]

METRIC_NAMES = {
    "exact_match": "Exact match",
    "exact": "Exact match",
    "f1": "F1",
    "accuracy": "Accuracy",
    "HasAns_exact": "Exact, answerable",
    "HasAns_f1": "F1, answerable",
    "NoAns_exact": "Exact, unanswerable",
    "NoAns_f1": "F1, unanswerable",
    "HasAns_total": "Answerable questions",
    "NoAns_total": "Unanswerable questions",
    "total": "Questions",
}


def metric_name(metric: str) -> str:
    """How a score is called on paper: `exact_match` is "Exact match"."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def column(rows: Iterable[Row], x_of: Callable[[Row], float | None], key: str) -> tuple[Point, ...]:
    """The points (x, row[key]) of the rows where both are finite numbers."""
    pairs = ((x_of(row), row.get(key)) for row in rows)
    return tuple((float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y))


def loss_figure(rows: Sequence[Row], *, over: Literal["time", "probes"]) -> Figure | None:
    """Training and held-out loss (nats per answer token) over wall clock or over all probes so far."""
    if over == "time":
        seconds, unit = _time_unit(rows)
        x_of, x_title = (lambda row: _scaled(row.get("elapsed_s"), seconds)), f"Training time ({unit})"
    else:
        totals = _running_totals(rows)
        x_of, x_title = (lambda row: totals.get(id(row))), "Probes so far"
    rejected = [row for row in rows if row.get("accepted") is False]
    return line_figure(
        f"loss-over-{over}",
        f"Loss over {over}",
        [
            Series("training batch", thinned(column(rows, x_of, "loss")), "quiet"),
            Series("held out", thinned(column(rows, x_of, "held_out_loss")), "main", dots=True),
            Series("step rejected", column(rejected, x_of, "loss"), "limit", dots=True, line=False),
        ],
        x_title=x_title,
        y_title="Loss (nats per token)",
        caption="Held-out questions are never trained on; each training point is another batch, hence the scatter.",
    )


def pacing_figure(rows: Sequence[Row]) -> Figure | None:
    """Probes taken for each step against the number the variance gate asked for."""
    return line_figure(
        "pacing",
        "Pacing",
        [
            Series("asked by the gate", thinned(column(rows, _step, "n_probes_gate")), "limit"),
            Series("probes taken", thinned(column(rows, _step, "n_probes")), "main"),
        ],
        x_title="Step",
        y_title="Probes per step",
        caption="A step is taken once enough probes make the variance of their mean small; flatter ground needs more.",
        from_zero=True,
    )


def slope_figure(rows: Sequence[Row]) -> Figure | None:
    """RMS of the projected gradients of each step: how steep the loss still is along random directions."""
    return line_figure(
        "slope",
        "Slope",
        [Series("projected gradient, RMS", thinned(column(rows, _step, "projected_gradient_rms")), "main")],
        x_title="Step",
        y_title="RMS slope (nats per unit)",
        caption="How steep the loss still is along random directions.",
        from_zero=True,
    )


def speed_figure(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second of each step: a dip is another program, a thermal limit or a battery saver."""
    return line_figure(
        "speed",
        "Speed",
        [Series("tokens decoded", thinned(column(rows, _step, "tokens_per_s")), "main")],
        x_title="Step",
        y_title="Tokens per second",
        caption="All tokens of prompts and probes over all of the step's time.",
        from_zero=True,
    )


def score_figure(before: Mapping[str, float], after: Mapping[str, float], *, caption: str = "") -> Figure | None:
    """Scores in percent as pairs of bars; metrics keep the order of `after`, those that only `before` has follow."""
    metrics = list(dict.fromkeys([*after, *before]))
    return bar_figure(
        "scores",
        "Scores",
        [metric_name(m) for m in metrics],
        [("base", "quiet", [before.get(m) for m in metrics]), ("tuned", "main", [after.get(m) for m in metrics])],
        axis_title="Score (%)",
        high=100.0,
        caption=caption,
    )


def _step(row: Row) -> float | None:
    return row.get("step")


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _time_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Seconds in the unit that suits the longest time, and its symbol."""
    longest = max((row["elapsed_s"] for row in rows if is_number(row.get("elapsed_s"))), default=0.0)
    return (1.0, "s") if longest < 120 else (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


def _running_totals(rows: Sequence[Row]) -> dict[int, float]:
    """Probes up to and with each row, by the row's identity."""
    totals, total = {}, 0.0
    for row in rows:
        total += row.get("n_probes") or 0
        totals[id(row)] = total
    return totals
