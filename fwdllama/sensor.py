"""How a machine is: battery, outside power, temperatures and free memory.

Linux tells all of it in /sys; Android hides much of that from apps, and Termux:API's `termux-battery-status` tells it instead. What
cannot be read is not guessed: it is None.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from fwdllama.machine import available_bytes, told

TERMUX = "termux-battery-status"
ANSWER_S = 5.0  # without the app Termux:API, its command waits for ever
PLAUSIBLE_C = (0.0, 150.0)  # some zones say 0 or -274 for "no sensor"


@dataclass(frozen=True)
class Reading:
    """How the machine is; None for what cannot be told. Charge 0..1, degrees Celsius, free bytes."""

    battery: float | None = None
    charging: bool | None = None  # on external power
    battery_c: float | None = None
    hottest_c: float | None = None
    hottest: str | None = None  # which sensor that is, as the kernel calls it
    memory_bytes: int | None = None


def read(root: Path = Path("/")) -> Reading:
    """How the machine is now, by what lies below `root`; a call of Termux:API may take a second."""
    supplies = read_supplies(root)
    zones = [(_degrees(path, 1000), told(path.with_name("type"))) for path in root.glob("sys/class/thermal/thermal_zone*/temp")]
    places = [(value, name) for value, name in (*zones, (supplies.battery_c, "the battery")) if value is not None]
    hottest_c, hottest = max(places, key=lambda place: place[0], default=(None, None))
    return Reading(supplies.battery, supplies.charging, supplies.battery_c, hottest_c, hottest, available_bytes(root / "proc", root / "sys"))


def read_supplies(root: Path = Path("/")) -> Reading:
    """Battery and outside power alone, from whatever tells of them."""
    supplies = _supplies(root / "sys/class/power_supply")
    if supplies.battery is None:
        return _termux() or (_psutil() if root == Path("/") else supplies)
    return supplies


def _supplies(folder: Path) -> Reading:
    """Batteries and chargers of Linux: the least charged battery that powers the machine, and whether power comes from outside."""
    charge: list[float] = []
    hot: list[float] = []
    outside: list[bool] = []
    for supply in sorted(folder.glob("*")):
        kind = told(supply / "type")
        if kind == "Battery" and told(supply / "scope") != "Device":  # "Device": a mouse or a pen
            capacity, temperature = told(supply / "capacity"), _degrees(supply / "temp", 10)
            if capacity is not None and capacity.isdigit():
                charge.append(min(1.0, int(capacity) / 100))
            if temperature is not None:
                hot.append(temperature)
            status = told(supply / "status")
            if status in ("Charging", "Full", "Discharging", "Not charging"):
                outside.append(status in ("Charging", "Full"))
        elif kind is not None and kind != "Battery" and told(supply / "online") == "1":
            outside.append(True)
    return Reading(min(charge, default=None), any(outside) if outside else None, max(hot, default=None))


def _termux() -> Reading | None:
    """What Termux:API tells; None where it is not installed or does not answer."""
    command = shutil.which(TERMUX)
    if command is None:
        return None
    try:
        said = json.loads(subprocess.run([command], capture_output=True, timeout=ANSWER_S, check=True, env=dict(os.environ)).stdout)
        return Reading(float(said["percentage"]) / 100, said.get("plugged") != "UNPLUGGED", float(said["temperature"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None


def _psutil() -> Reading:
    """What macOS, Windows and the BSDs tell."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # not on this platform, or not readable
        return Reading()
    return Reading() if battery is None else Reading(battery.percent / 100, battery.power_plugged)


def _degrees(path: Path, parts: int) -> float | None:
    """A temperature that is written in so many parts of a degree; None where there is none that can be."""
    try:
        value = int(told(path) or "") / parts
    except ValueError:
        return None
    return value if PLAUSIBLE_C[0] < value < PLAUSIBLE_C[1] else None
