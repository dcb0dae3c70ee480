"""What a training run does between two probes for the device that it runs on: go on, rest, work less, or end.

Battery low or no charger: it rests until that has changed. Too hot: it works a share of the time. Memory short: it ends, because resting holds
the memory that is missing. Nothing that is learned depends on it: the trainer's clock stands still meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fwdllama.formats import clock
from fwdllama.guard import Guard
from fwdllama.pause import Pause
from fwdllama.throttle import Throttle

TICK_S = 0.2  # how soon Ctrl-C is noticed, and a display counts on
LEAST_S = 1e-3  # a rest so short is none, and may be less than a clock can tell


@dataclass
class Rest:
    """Call it between probes; it returns when work may go on, or when `stop` says that the user wants to end, or with `ended` set."""

    guard: Guard
    stop: Callable[[], bool] = lambda: False
    tell: Callable[[str], None] = lambda text: None  # what happened once
    show: Callable[[Pause], None] = lambda pause: None  # while it rests
    sleep: Callable[[float], None] = time.sleep
    ended: str | None = None  # why it must not go on
    rested_s: float = 0.0
    _throttle: Throttle = field(default_factory=Throttle)
    _power: str | None = None
    _heat: str | None = None
    _due: float | None = None  # when to look again; None: at once
    _since: float | None = None  # when work went on

    def __call__(self) -> None:
        """Rest as long as must be."""
        began = self.guard.now()
        worked = 0.0 if self._since is None else began - self._since
        while self.ended is None and not self.stop():
            self._look()
            now = self.guard.now()
            left = self._throttle.owed_s(worked) - (now - began)
            if self.ended is not None or (self._power is None and left <= LEAST_S):
                break
            self.show(self._pause(now - began))
            self.sleep(TICK_S if self._power is not None else min(TICK_S, left))
        self._since = self.guard.now()
        self.rested_s += self._since - began
        self.show(self._pause(0.0))

    def _pause(self, resting_s: float) -> Pause:
        why = self._power or (self._heat if self._throttle.share < 1 else None)
        return Pause(why, 0.0 if self._power is not None else self._throttle.share, self.rested_s + resting_s)

    def _look(self) -> None:
        if self._due is not None and self.guard.now() < self._due:
            return
        at, self._due = self.guard.looked()
        self.ended = self.guard.memory(at)
        power, before = self.guard.power(at, resting=self._power is not None), self._power
        if power is not None and before is None:
            self.tell(f"resting: {power}; training goes on by itself when that has changed")
        elif before is not None and power is None:
            self.tell("going on")
        self._power = power
        share, excess_c = self._throttle.share, self.guard.excess_c(at)
        self._throttle = self._throttle.after(excess_c)
        self._heat = self.guard.heat(at) or (self._heat if self._throttle.share < 1 else None)
        if share == 1 and self._throttle.share < 1:
            self.tell(f"working less until it is cooler: {self._heat}")
        elif share < 1 and self._throttle.share == 1:
            self.tell(f"cool again: working all the time, after {clock(self.rested_s)} of rest")
