"""When a device must not work: battery low or not charging, too hot, memory short. Read anew while it works, between probes.

Linux tells all of it in /sys; Android hides much of that from apps, and Termux:API's `termux-battery-status` tells it instead. What
cannot be read is not guessed: it is None, and forbids nothing unless it was asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fwdllama.errors import UsageError
from fwdllama.formats import size
from fwdllama.machine import available_bytes

TERMUX = "termux-battery-status"
BATTERY_HOT_C = 45.0  # above it a lithium cell ages fast; phones themselves slow down or stop charging there
MIN_MEMORY_BYTES = 64 << 20  # below it Android begins to kill
BACK_BY = 0.05  # of charge, above the least, before work goes on: else a device at the border starts and stops
PLAUSIBLE_C = (0.0, 150.0)  # some zones say 0 or -274 for "no sensor"


@dataclass(frozen=True)
class Reading:
    """How the machine is; None for what cannot be told. Charge 0..1, degrees Celsius, free bytes."""

    battery: float | None = None
    charging: bool | None = None  # on external power
    battery_c: float | None = None
    hottest_c: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Guard:
    """The limits of a device. `root` is where /sys is looked for; `now` in seconds.

    Raises:
        UsageError: a limit that cannot be.
    """

    min_battery: float = 0.3
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
        supplies = _supplies(self.root / "sys/class/power_supply")
        if supplies.battery is None:
            supplies = _termux() or (_psutil() if self.root == Path("/") else supplies)
        zones = [_degrees(path, 1000) for path in self.root.glob("sys/class/thermal/thermal_zone*/temp")]
        hottest = max((value for value in (*zones, supplies.battery_c) if value is not None), default=None)
        return Reading(supplies.battery, supplies.charging, supplies.battery_c, hottest, available_bytes())

    def refusal(self, at: Reading, *, resting: bool = False) -> str | None:
        """Why the device must not work; None where it may. `resting`: it was refused before, and must have recovered a little."""
        on_power = at.charging is True
        least = min(1.0, self.min_battery + BACK_BY) if resting else self.min_battery
        if self.only_charging and not on_power:
            return "it is not charging" if at.charging is False else "whether it is charging cannot be told, and --only-charging was given"
        if at.battery is not None and not on_power and at.battery < least:
            return f"the battery is at {at.battery:.0%}, below {least:.0%}"
        if at.battery_c is not None and at.battery_c > BATTERY_HOT_C:
            return f"the battery has {at.battery_c:.0f} °C, above {BATTERY_HOT_C:.0f} °C"
        if self.max_temperature_c is not None and at.hottest_c is not None and at.hottest_c > self.max_temperature_c:
            return f"it has {at.hottest_c:.0f} °C, above {self.max_temperature_c:.0f} °C"
        if at.memory_bytes is not None and at.memory_bytes < MIN_MEMORY_BYTES:
            return f"only {size(at.memory_bytes)} of memory are free"
        return None

    def watch(self) -> Callable[[], str | None]:
        """A function to ask often: the refusal by the last reading, which is never older than `every_s`."""
        due, last = self.now() + self.every_s, None

        def ask() -> str | None:
            nonlocal due, last
            if self.now() >= due:
                last, due = self.refusal(self.reading()), self.now() + self.every_s
            return last

        return ask


def _supplies(folder: Path) -> Reading:
    """Batteries and chargers of Linux: the least charged battery that powers the machine, and whether power comes from outside."""
    charge: list[float] = []
    hot: list[float] = []
    outside: list[bool] = []
    for supply in sorted(folder.glob("*")):
        kind = _text(supply / "type")
        if kind == "Battery" and _text(supply / "scope") != "Device":  # "Device": a mouse or a pen
            capacity, temperature = _text(supply / "capacity"), _degrees(supply / "temp", 10)
            if capacity is not None and capacity.isdigit():
                charge.append(min(1.0, int(capacity) / 100))
            if temperature is not None:
                hot.append(temperature)
            status = _text(supply / "status")
            if status in ("Charging", "Full", "Discharging", "Not charging"):
                outside.append(status in ("Charging", "Full"))
        elif kind is not None and kind != "Battery" and _text(supply / "online") == "1":
            outside.append(True)
    return Reading(min(charge, default=None), any(outside) if outside else None, max(hot, default=None))


def _termux() -> Reading | None:
    """What Termux:API tells; None where it is not installed or does not answer."""
    command = shutil.which(TERMUX)
    if command is None:
        return None
    try:
        told = json.loads(subprocess.run([command], capture_output=True, timeout=5, check=True, env=dict(os.environ)).stdout)
        return Reading(float(told["percentage"]) / 100, told.get("plugged") != "UNPLUGGED", float(told["temperature"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None


def _psutil() -> Reading:
    """What macOS, Windows and the BSDs tell."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # not on this platform, or not readable
        return Reading()
    return Reading() if battery is None else Reading(battery.percent / 100, battery.power_plugged)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _degrees(path: Path, parts: int) -> float | None:
    """A temperature that is written in so many parts of a degree; None where there is none that can be."""
    text = _text(path)
    try:
        value = int(text or "") / parts
    except ValueError:
        return None
    return value if PLAUSIBLE_C[0] < value < PLAUSIBLE_C[1] else None
