"""How a federated run goes, on stderr: a display that lives on a terminal, a line a round anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fwdllama.cli.live import N_LOSSES, sparkline
from fwdllama.formats import clock, number


class Watch:
    """Shows one run; use as a context manager."""

    def __init__(self, n_rounds: int, console: Console | None = None) -> None:
        self.n_rounds = n_rounds
        self.console = console or Console(stderr=True, highlight=False)
        self.losses: list[float] = []
        self.last: dict[str, Any] = {}
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """A line about something that happened once."""
        self.console.print(Text(text), soft_wrap=True)

    def closed(self, row: dict[str, Any]) -> None:
        """A round closed."""
        self.last = row
        self.losses = [*self.losses, row["loss"]][-N_LOSSES:]
        if not self.console.is_terminal:
            self.event(
                f"round {row['round'] + 1} of {self.n_rounds}: loss {number(row['loss'])}, {row['n_probes']} probes "
                f"by {row['n_devices']} devices, {row['duration_s']:.1f} s"
            )

    def progress(self, at: dict[str, Any], elapsed_s: float) -> None:
        """Where the open round stands, and the time since the devices joined."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        bar = Table.grid(padding=(0, 1))
        round_ = min(at["version"] + 1, self.n_rounds)
        bar.add_row(
            Text(f"round {round_} of {self.n_rounds}", style="bold"),
            ProgressBar(total=max(1, at["wanted"]), completed=at["probes"], width=24),
            f"{at['probes']} of {at['wanted']} probes, {at['leased']} given out",
        )
        facts = Table.grid(padding=(0, 1))
        facts.add_column(style="dim")
        wide = not self.console.options.ascii_only and len(self.losses) > 1
        facts.add_row("loss", f"{number(self.last.get('loss'))}" + (f"  {sparkline(self.losses)}" if wide else ""))
        best = "" if at["best_version"] is None else f"{number(at['best_loss'])} (version {at['best_version']})"
        facts.add_row("held out", best or "not scored yet")
        facts.add_row("results", f"{at['n_results']} accepted, {at['n_refused']} refused, {at['n_wasted']} probes wasted")
        left = elapsed_s * (self.n_rounds - at["version"]) / at["version"] if at["version"] else None
        facts.add_row("time", clock(elapsed_s) + ("" if left is None else f", {clock(left)} left"))
        self._live.update(Group(bar, facts), refresh=True)
