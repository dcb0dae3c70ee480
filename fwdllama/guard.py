"""When a device must not work: battery low or not charging, too hot, memory short. Read anew while it works, between probes.

A limit on what cannot be read forbids nothing, except `only_charging`, which was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fwdllama.errors import UsageError
from fwdllama.formats import size
from fwdllama.sensor import PLAUSIBLE_C, Reading, read

MIN_BATTERY = 0.3
BATTERY_HOT_C = 45.0  # above it a lithium cell ages fast; phones themselves slow down or stop charging there
MIN_MEMORY_BYTES = 64 << 20  # below it Android begins to kill
BACK_BY = 0.05  # of charge, above the least, before work goes on: else a device at the border starts and stops
SLOW_S, SHARE = 0.1, 50  # asking Termux:API starts a process and may take most of a second; what is slow takes at most 1/50 of the time


@dataclass(frozen=True)
class Guard:
    """The limits of a device. `root` is where /sys is looked for; `now` in seconds.

    Raises:
        UsageError: a limit that cannot be.
    """

    min_battery: float = MIN_BATTERY
    only_charging: bool = False
    max_temperature_c: float | None = None
    root: Path = Path("/")
    every_s: float = 5.0  # between two readings while it works
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if not 0 <= self.min_battery <= 1:
            raise UsageError(f"--min-battery is {self.min_battery:g}, but must be between 0 and 1.")
        if self.max_temperature_c is not None and not PLAUSIBLE_C[0] < self.max_temperature_c < PLAUSIBLE_C[1]:
            raise UsageError(f"--max-temperature is {self.max_temperature_c:g}, but must be degrees Celsius between 0 and 150.")

    def reading(self) -> Reading:
        """How the machine is now."""
        return read(self.root)

    def power(self, at: Reading, *, resting: bool = False) -> str | None:
        """Why its power forbids work; None where it does not. `resting`: it was refused before, and must have recovered a little."""
        on_power = at.charging is True
        least = min(1.0, self.min_battery + BACK_BY) if resting else self.min_battery
        if self.only_charging and not on_power:
            return "it is not charging" if at.charging is False else "whether it is charging cannot be told, and --only-charging was given"
        if at.battery is not None and not on_power and at.battery < least:
            return f"the battery is at {at.battery:.0%}, below {least:.0%}"
        return None

    def excess_c(self, at: Reading) -> float | None:
        """Degrees by which it is too hot, negative where it is not; None where no temperature has a limit."""
        over = []
        if at.battery_c is not None:
            over.append(at.battery_c - BATTERY_HOT_C)
        if self.max_temperature_c is not None and at.hottest_c is not None:
            over.append(at.hottest_c - self.max_temperature_c)
        return max(over, default=None)

    def heat(self, at: Reading) -> str | None:
        """Why its temperature forbids work; None where it does not."""
        if at.battery_c is not None and at.battery_c > BATTERY_HOT_C:
            return f"the battery has {at.battery_c:.0f} °C, above {BATTERY_HOT_C:.0f} °C"
        if self.max_temperature_c is not None and at.hottest_c is not None and at.hottest_c > self.max_temperature_c:
            return f"{at.hottest or 'it'} has {at.hottest_c:.0f} °C, above {self.max_temperature_c:.0f} °C"
        return None

    def memory(self, at: Reading) -> str | None:
        """Why its memory forbids work; None where it does not."""
        if at.memory_bytes is not None and at.memory_bytes < MIN_MEMORY_BYTES:
            return f"only {size(at.memory_bytes)} of memory are free"
        return None

    def refusal(self, at: Reading, *, resting: bool = False) -> str | None:
        """Why the device must not work at all; None where it may."""
        return self.power(at, resting=resting) or self.heat(at) or self.memory(at)

    def looked(self) -> tuple[Reading, float]:
        """How the machine is now, and when to look again: after `every_s`, and later where looking itself takes long."""
        began = self.now()
        at = self.reading()
        ended = self.now()
        took = ended - began
        return at, ended + max(self.every_s, SHARE * took if took > SLOW_S else 0.0)

    def watch(self) -> Callable[[], str | None]:
        """A function to ask often: the refusal by the last reading."""
        due, last = self.now() + self.every_s, None

        def ask() -> str | None:
            nonlocal due, last
            if self.now() >= due:
                at, due = self.looked()
                last = self.refusal(at)
            return last

        return ask
