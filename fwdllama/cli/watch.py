"""How a device goes, on stderr: a display that lives on a terminal, lines of what happened anywhere else, or JSON lines on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import TracebackType

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fwdllama.cli.live import INTERVAL_S, N_LOSSES, first_pass, sparkline
from fwdllama.federation.device import Status
from fwdllama.formats import clock, number
from fwdllama.types import Staged


class Watch:
    """Shows one device; use as a context manager. `event` and `status` are what a device calls."""

    def __init__(self, *, as_json: bool = False, console: Console | None = None, now: Callable[[], float] = time.time) -> None:
        self.as_json, self.now = as_json, now
        self.console = console or Console(stderr=True)
        self.losses: list[float] = []
        self._last = Status()
        self._slice = -1
        self._next_s = -1.0
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.update(self.panel(), refresh=True)
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """A line about something that happened once."""
        if self.as_json:
            typer.echo(json.dumps({"at": round(self.now(), 3), "event": text}))
        else:
            self.console.print(Text(text), soft_wrap=True)

    def staged(self, staged: Staged) -> None:
        """Called for every unit that a slice of the lower layers is through with: a line for each slice."""
        if staged.last != self._slice:
            self._slice = staged.last
            self.event(first_pass(staged))

    def status(self, status: Status) -> None:
        """Called whenever something changed, for every probe too."""
        before, self._last = self._last, status
        done = status.n_tasks > before.n_tasks
        if done and status.loss is not None:
            self.losses = [*self.losses, status.loss][-N_LOSSES:]
        if self.as_json:
            if replace(status, task_probes=0, contact_s=None) != replace(before, task_probes=0, contact_s=None):
                typer.echo(json.dumps({"at": round(self.now(), 3), **asdict(status)}))
        elif not self.console.is_terminal:
            if done:
                self.console.print(Text(self.line()), soft_wrap=True)
        elif self.now() >= self._next_s or status.doing != before.doing:
            self._next_s = self.now() + INTERVAL_S
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
                self._live.start()
            self._live.update(self.panel(), refresh=True)

    def tick(self) -> None:
        """Count down while the device waits."""
        if self._live is not None and self.now() >= self._next_s:
            self._next_s = self.now() + 1.0
            self._live.update(self.panel(), refresh=True)

    def line(self) -> str:
        """The last task as one line of text."""
        at = self._last
        version = "" if at.version is None else f" of version {at.version}"
        return f"task {at.n_tasks}{version} delivered: loss {number(at.loss)}, {at.n_probes:,} probes so far"

    def panel(self) -> Table:
        """The display at this moment."""
        at = self._last
        facts = Table.grid(padding=(0, 1))
        facts.add_column(style="dim")
        wide = not self.console.options.ascii_only
        curve = f"  {sparkline(self.losses)}" if wide and len(self.losses) > 1 else ""
        facts.add_row("run", (at.run or number(None)) + ("" if at.version is None else f", version {at.version}"))
        facts.add_row("now", self._doing())
        facts.add_row("done", f"{at.n_tasks:,} tasks, {at.n_probes:,} probes" + (f", {at.n_refused:,} not counted" if at.n_refused else ""))
        facts.add_row("loss", f"{number(at.loss)}{curve}")
        facts.add_row("contact", "never" if at.contact_s is None else f"{clock(max(0.0, self.now() - at.contact_s))} ago")
        return facts

    def _doing(self) -> str:
        at = self._last
        if at.doing == "working" and at.task_wanted:
            return f"working: {at.task_probes:,} of {at.task_wanted:,} probes"
        if at.doing == "waiting":
            left = "" if at.until_s is None else f", {clock(max(0.0, at.until_s - self.now()))} left"
            return f"waiting{left}" + (f": {at.reason}" if at.reason else "")
        return at.doing + (f": {at.reason}" if at.reason else "")
