"""The plots of the benchmarks' document, each from the figures of one item; an item that was not measured has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fwdllama.drawing import Figure, Point, Role, Series, bar_figure, line_figure

Figures = Mapping[str, Any]
PAPER_ROLES: Mapping[str, Role] = {"forward-only, answer": "main", "forward-only, all": "quiet", "torch, answer": "limit"}
GIB, MIB = 1 << 30, 1 << 20


def drawn(results: Mapping[str, Figures]) -> dict[str, Figure]:
    """Every plot that there are figures for, by the name of its file."""
    found: dict[str, Figure | None] = {}
    for base in ("fp16", "int8", "int4"):
        if figures := results.get(f"paper-{base}"):
            found[f"loss-{base}"] = losses(base, figures)
            found[f"memory-{base}"] = memory(base, figures)
    if figures := results.get("scaling"):
        found |= {f"scaling-{name}": draw(figures["curves"]) for name, draw in SCALING.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def losses(base: str, figures: Figures) -> Figure | None:
    """Loss over time of the rows that a plot has colours for."""
    series = [
        Series(name, tuple((point[0], point[1]) for point in figures["rows"][name]["curve"]), role, dots=len(figures["rows"][name]["curve"]) < 20)
        for name, role in PAPER_ROLES.items()
        if "curve" in figures["rows"].get(name, {})
    ]
    return line_figure(
        f"loss-{base}", f"Loss of unseen questions, {base.upper()} base", series, x_title="Training (s)", y_title="Nats per answer token"
    )


def memory(base: str, figures: Figures) -> Figure | None:
    """Peak memory of each row with eight examples."""
    rows = {name: row["memory_bytes"] / MIB for name, row in figures["rows"].items() if "memory_bytes" in row}
    return bar_figure(
        f"memory-{base}", f"Peak memory, {base.upper()} base", list(rows), [("eight examples", "main", list(rows.values()))], axis_title="MiB"
    )


def _points(values: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in values)


def _lines(name: str, title: str, x_title: str, y_title: str, *series: tuple[str, str, Role]) -> Callable[[Figures], Figure | None]:
    def draw(curves: Figures) -> Figure | None:
        found = [Series(label, _points(curves[key]), role, dots=True) for label, key, role in series]
        return line_figure(f"scaling-{name}", title, found, x_title=x_title, y_title=y_title, from_zero=True)

    return draw


PROBE = "ms a probe"
SCALING: Mapping[str, Callable[[Figures], Figure | None]] = {
    "tokens": _lines(
        "tokens",
        "Tokens of an example",
        "Tokens of the prompt",
        PROBE,
        ("scope answer", "tokens_answer", "main"),
        ("scope all", "tokens_all", "quiet"),
    ),
    "examples": _lines(
        "examples", "Examples of a probe", "Examples", "ms", ("a probe", "sizes", "quiet"), ("each example's share", "sizes_each", "main")
    ),
    "layers": _lines(
        "layers",
        "First trained layer",
        "Layer",
        PROBE,
        ("the layers above alone", "firsts_top", "main"),
        ("whole model", "firsts_whole", "quiet"),
    ),
    "rank": _lines("rank", "Rank", "Rank of each matrix", PROBE, ("a probe", "ranks", "main")),
    "probes": _lines("probes", "Probes of a batch", "Probes for each example", "ms a probe, loading shared", ("a probe", "probes", "main")),
}
