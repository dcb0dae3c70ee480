"""How a run goes, on stderr: a display that lives on a terminal, a line a step anywhere else.

It is called for every probe, so most calls end after one comparison. A redraw costs some milliseconds, more on a phone;
the next one waits at least `SHARE` times as long as the last one took, which bounds the cost where it cannot be known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fwdllama.formats import clock, number, percent, size
from fwdllama.pause import Pause, paced

if TYPE_CHECKING:
    from fwdllama.config import BudgetConfig
    from fwdllama.progress import Progress
    from fwdllama.types import Staged

INTERVAL_S = 0.25
SHARE = 250  # a redraw takes at most 1/250 of the time
N_LOSSES = 40  # of the sparkline
BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Shows the progress of one run; use as a context manager. `event` and `progress` are what a run calls."""

    def __init__(
        self, budget: BudgetConfig, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget, self.now = budget, now
        self.console = console or Console(stderr=True)
        self.losses: list[float] = []
        self.row: dict[str, Any] = {}  # metrics of the last step
        self.held_out: float | None = None
        self.n_redraws, self.redraw_s = 0, 0.0
        self._next_s = -1.0
        self.pause = Pause(None, 1.0, 0.0)
        self._begun_s: float | None = None
        self._live: Live | None = None
        self._last: Progress | None = None
        self._slice = -1  # the last layer of the slice that was last spoken of

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if self._last is not None:
                self._redraw(self._last)  # what it ended with, which may have come too soon after the last redraw
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """A line about something that happened once."""
        self.console.print(Text(text), soft_wrap=True)

    def staged(self, staged: Staged) -> None:
        """Called for every unit that a slice of the lower layers is through with."""
        now = self.now()
        text = first_pass(staged)
        if not self.console.is_terminal:
            if staged.last != self._slice:
                self._slice = staged.last
                self.console.print(Text(text), soft_wrap=True)
        elif now >= self._next_s or staged.done == 1:
            self._next_s = now + INTERVAL_S
            self.console.print(Text(text), end="\n" if staged.done == 1 else "\r", soft_wrap=True)

    def rest(self, pause: Pause) -> None:
        """Called while the run rests, and for every probe after it; seconds of rest are none of training."""
        before, self.pause = self.pause, pause
        if self._last is not None and pause != before:
            self._redraw_when_due(self._last)

    def progress(self, progress: Progress) -> None:
        """Called for every probe, and with metrics for every step."""
        now = self._working_s()
        row = progress.metrics
        if self._begun_s is None or row is not None:
            self._begun_s = now - progress.state.elapsed_s
        if row is not None:
            self.row = row
            self.losses = [*self.losses, row["loss"]][-N_LOSSES:]
            if row["held_out_loss"] is not None:
                self.held_out = row["held_out_loss"]
        if not self.console.is_terminal:
            if row is not None:
                self.console.print(Text(self.line(progress)), soft_wrap=True)
            return
        self._last = progress
        self._redraw_when_due(progress)

    def _redraw_when_due(self, progress: Progress) -> None:
        now = self.now()
        if now < self._next_s:
            return
        self._redraw(progress)
        spent = self.now() - now
        self.n_redraws += 1
        self.redraw_s += spent
        self._next_s = now + max(INTERVAL_S, SHARE * spent)

    def _redraw(self, progress: Progress) -> None:
        if self._live is None:
            # Not its own thread, which would compete with the model; and stdout stays for data.
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        self._live.update(self.panel(progress), refresh=True)

    def elapsed_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._working_s() - self._begun_s if self._begun_s is not None else 0.0

    def _working_s(self) -> float:
        """A clock that stands still during rests, as the run's own does."""
        return self.now() - self.pause.rested_s

    def left_s(self, progress: Progress) -> float | None:
        """Seconds until the first budget is used up; None before that can be told."""
        elapsed, state, budget = self.elapsed_s(), progress.state, self.budget
        within = 0.0 if progress.metrics is not None else progress.step_probes / max(1, progress.step_wanted)
        left = []
        if budget.seconds is not None:
            left.append(max(0.0, budget.seconds - elapsed))
        n_probes = state.n_probes + (0 if progress.metrics is not None else progress.step_probes)
        for limit, done in ((budget.steps, state.step + within), (budget.probes, n_probes)):
            if limit is not None and done > 0:
                left.append(max(0.0, elapsed * (limit - done) / done))
        return min(left, default=None)

    def line(self, progress: Progress) -> str:
        """One step as one line of text."""
        state, row = progress.state, self.row
        parts = [
            f"step {state.step}: loss {number(row['loss'])}",
            f"held-out {number(row['held_out_loss'])}" if row["held_out_loss"] is not None else "",
            "" if row["accepted"] else "rejected",
            f"{row['n_probes']:,} probes",
            f"{row['tokens_per_s']:,.0f} tokens/s",
            self._clocks(progress),
            paced(self.pause),
        ]
        return ", ".join(part for part in parts if part)

    def panel(self, progress: Progress) -> Group:
        """The display at this moment."""
        state, row = progress.state, self.row
        n_steps = state.step if progress.metrics is not None else state.step + 1
        wide = not self.console.options.ascii_only
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {n_steps}", style="bold"),
            ProgressBar(total=max(1, progress.step_wanted), completed=progress.step_probes, width=24),
            f"{progress.step_probes:,} of {progress.step_wanted:,} probes",
        )
        facts = Table.grid(padding=(0, 1))
        facts.add_column(style="dim")
        best = "" if state.best_loss is None else f" (best {number(state.best_loss)} at step {state.best_step})"
        curve = f"  {sparkline(self.losses)}" if wide and len(self.losses) > 1 else ""
        rejected = "" if row.get("accepted", True) else "  last step rejected"
        facts.add_row("loss", f"{number(row.get('loss'))}{curve}{rejected}")
        facts.add_row("held out", f"{number(self.held_out)}{best}")
        share = f"{percent(row.get('decode_fraction'))} of the time in the model"
        facts.add_row("speed", f"{number(row.get('tokens_per_s'), 0)} tokens/s, {share}")
        facts.add_row("memory", f"{size(row.get('peak_memory_bytes'))} at most")
        facts.add_row("time", self._clocks(progress))
        if self.pause.why is not None:
            facts.add_row("now", Text(paced(self.pause), style="yellow"))
        return Group(bar, facts)

    def _clocks(self, progress: Progress) -> str:
        left = self.left_s(progress)
        rested = f", {clock(self.pause.rested_s)} of rest" if self.pause.rested_s >= 1 else ""
        return clock(self.elapsed_s()) + ("" if left is None else f", {clock(left)} left") + rested


def first_pass(staged: Staged) -> str:
    """How far the first pass of a staged run is.

    >>> from fwdllama.types import Staged
    >>> first_pass(Staged(8, 16, 24, 0.5, 30.0))
    'layers 8 to 15 of 24: 50% of the first pass, 0:30 left'
    """
    left = staged.elapsed_s * (1 - staged.done) / staged.done
    return f"layers {staged.first} to {staged.last - 1} of {staged.of}: {percent(staged.done)} of the first pass, {clock(left)} left"


def sparkline(values: list[float]) -> str:
    """Numbers as bars from the smallest to the largest; what is not finite is a gap.

    >>> sparkline([3.0, 2.0, float("nan"), 1.0])
    '█▄ ▁'
    """
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[int((value - low) / step)] if abs(value) < float("inf") else " " for value in values)
