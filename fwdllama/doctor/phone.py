"""What a phone needs besides: Termux, its API, a battery and temperatures that can be read, a wake lock."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fwdllama import sensor, wakelock
from fwdllama.doctor.check import Check, answered
from fwdllama.guard import MIN_BATTERY

API = "pkg install termux-api, and the app Termux:API from where Termux is from"


def is_termux(environ: Mapping[str, str]) -> bool:
    """Whether this is Termux, whose builds and background rules are its own."""
    return "TERMUX_VERSION" in environ or "com.termux" in environ.get("PREFIX", "")


def check_phone(environ: Mapping[str, str], root: Path = Path("/")) -> list[Check]:
    """Every check of a phone; on other machines they find little and ask for nothing."""
    checks = [check_termux(environ)]
    if is_termux(environ):
        checks += [check_api(environ), check_wake_lock(environ)]
    return [*checks, check_battery(environ, root), check_temperature(root)]


def check_termux(environ: Mapping[str, str]) -> Check:
    """Whether this is Termux."""
    if not is_termux(environ):
        return Check("termux", True, "no")
    advice = "Android's settings, Apps, Termux, Battery: unrestricted; else it is ended in the background (docs/phone.md)"
    return Check("termux", True, environ.get("TERMUX_VERSION", "yes"), advice)


def check_api(environ: Mapping[str, str]) -> Check:
    """Termux:API, an app and a package: without the app its commands never end."""
    command = shutil.which(sensor.TERMUX, path=environ.get("PATH"))
    if command is None:
        return Check("termux:api", False, "no package", f"{API}: without it Android does not tell how the battery is")
    if not answered([command], sensor.ANSWER_S):
        return Check("termux:api", False, "does not answer", f"{API}; then start that app once")
    return Check("termux:api", True, "answers")


def check_wake_lock(environ: Mapping[str, str]) -> Check:
    """The wake lock, which training and joining take by themselves."""
    if shutil.which(wakelock.LOCK, path=environ.get("PATH")) is None:
        return Check("wake lock", False, f"no {wakelock.LOCK}", "pkg install termux-tools: without it training stops when the screen is dark")
    return Check("wake lock", True, "taken while training")


def check_battery(environ: Mapping[str, str], root: Path = Path("/")) -> Check:
    """Whether charge and outside power can be read, on which the guards depend."""
    at = sensor.read_supplies(root)
    if at.battery is None:
        if is_termux(environ):
            return Check("battery", False, "cannot be read", f"{API}; until then no limit protects the battery")
        return Check("battery", True, "none that can be read")
    power = {True: "on outside power", False: "on battery", None: "outside power unknown"}[at.charging]
    low = at.charging is not True and at.battery < MIN_BATTERY
    advice = f"charge it: below {MIN_BATTERY:.0%} training rests, unless --min-battery says otherwise" if low else ""
    return Check("battery", True, f"{at.battery:.0%}, {power}", advice)


def check_temperature(root: Path = Path("/")) -> Check:
    """Whether any temperature can be read."""
    at = sensor.read(root)
    if at.hottest_c is None:
        return Check("temperature", True, "none that can be read", "--max-temperature limits nothing here")
    return Check("temperature", True, f"{at.hottest_c:.0f} °C ({at.hottest or 'a sensor without a name'})")
