from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from fwdllama.checkpoint import State
from fwdllama.cli.live import INTERVAL_S, SHARE, Display, sparkline
from fwdllama.config import BudgetConfig
from fwdllama.progress import Progress

ROW: dict[str, Any] = {
    "step": 0,
    "loss": 2.5,
    "held_out_loss": 2.25,
    "accepted": True,
    "n_probes": 320,
    "tokens_per_s": 1234.0,
    "decode_fraction": 0.97,
    "peak_memory_bytes": 400 << 20,
}


class Clock:
    """Seconds that pass only when told, and `tick` at each look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 100.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def display(clock: Clock, budget: BudgetConfig, *, terminal: bool) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(budget, Console(file=stream, force_terminal=terminal, width=100), clock), stream


def probe(n: int, state: State | None = None) -> Progress:
    return Progress(state or State(), None, n, 320, 0.0)


def step(state: State, **changes: Any) -> Progress:
    return Progress(state, ROW | changes, 320, 320, 0.5)


def test_without_a_terminal_there_is_one_line_a_step_and_none_a_probe() -> None:
    clock = Clock()
    shown, stream = display(clock, BudgetConfig(seconds=300), terminal=False)
    with shown:
        shown.event("eps 0.01")
        for n in range(320):
            shown.progress(probe(n))
        shown.progress(step(State(step=1, n_probes=320, elapsed_s=72.0)))
        shown.progress(step(State(step=2, elapsed_s=80.0), held_out_loss=None, accepted=False))
    assert stream.getvalue().splitlines() == [
        "eps 0.01",
        "step 1: loss 2.500, held-out 2.250, 320 probes, 1,234 tokens/s, 1:12, 3:48 left",
        "step 2: loss 2.500, rejected, 320 probes, 1,234 tokens/s, 1:20, 3:40 left",
    ]


def test_a_terminal_shows_everything_there_is_to_know() -> None:
    clock = Clock()
    shown, stream = display(clock, BudgetConfig(seconds=300), terminal=True)
    state = State(step=1, n_probes=320, elapsed_s=72.0, best_loss=2.25, best_step=1)
    with shown:
        shown.progress(step(state))
        shown.progress(step(state, loss=2.0))
        clock.now += 1
        shown.progress(probe(80, state))
    text = stream.getvalue()
    for piece in ("step 2", "80 of 320 probes", "2.000", "█▁", "2.250 (best 2.250 at step 1)", "1,234 tokens/s"):
        assert piece in text
    for piece in ("97% of the time in the model", "400 MiB at most", "1:13, 3:47 left"):
        assert piece in text


def test_what_is_left_is_of_the_budget_that_ends_first() -> None:
    clock = Clock()
    shown, _ = display(clock, BudgetConfig(seconds=300, steps=4, probes=2000), terminal=False)
    state = State(step=1, n_probes=320, elapsed_s=50.0)
    shown.progress(step(state))
    assert shown.left_s(step(state)) == 150.0
    clock.now += 25
    half = probe(160, state)
    assert shown.left_s(half) == 75.0 * (4 - 1.5) / 1.5
    assert display(clock, BudgetConfig(steps=4), terminal=False)[0].left_s(probe(0)) is None


def test_redraws_are_at_most_four_a_second_however_many_probes_there_are() -> None:
    clock = Clock()
    shown, _ = display(clock, BudgetConfig(seconds=300), terminal=True)
    with shown:
        for n in range(1000):
            clock.now += 0.01
            shown.progress(probe(n % 320))
            shown.progress(step(State(step=n)))
    assert shown.n_redraws <= 10 / INTERVAL_S + 1


def test_slow_redraws_are_rarer_so_that_they_cost_well_under_a_hundredth() -> None:
    clock = Clock(tick=0.05)  # a machine on which looking at the clock, and so a redraw, takes 50 ms
    shown, _ = display(clock, BudgetConfig(seconds=300), terminal=True)
    with shown:
        began = clock.now
        while clock.now < began + 400:
            clock.now += 0.1
            shown.progress(probe(1))
        assert shown.n_redraws > 5
        assert shown.redraw_s / (clock.now - began) < 0.01
    assert SHARE >= 200


def test_a_resumed_run_counts_from_where_it_was() -> None:
    clock = Clock()
    shown, _ = display(clock, BudgetConfig(seconds=300), terminal=False)
    shown.progress(probe(1, replace(State(), step=5, elapsed_s=200.0)))
    clock.now += 10
    assert shown.elapsed_s() == 210.0
    assert shown.left_s(probe(2)) == 90.0


def test_sparkline_spans_smallest_to_largest_and_leaves_gaps() -> None:
    assert sparkline([1.0, float("nan"), 8.0]) == "▁ █"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
