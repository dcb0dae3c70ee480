"""How a command treats the device that it runs on: presets, limits of battery, heat and memory, priority. Shared by what works for long."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fwdllama.cli.options import ENGINE, option

if TYPE_CHECKING:
    from fwdllama.guard import Guard

LIMITS = "When it must not work"
KEPT = ("min_battery", "only_charging", "max_temperature", "nice")  # with a run, for those who resume it

Preset = Annotated[
    Literal["phone-8gb", "phone-6gb", "laptop"] | None,
    option(
        ENGINE,
        "A set of options for a kind of device: threads, --mmap, --repack, --kv-type, --n-batch, --nice and limits. It says which; those given win.",
        "none",
    ),
]
Nice = Annotated[
    int | None, option(ENGINE, "Give way to other programs, from 0, not at all, to 19, always.", "0", metavar="N", min=0, max=19)
]
MinBattery = Annotated[float | None, option(LIMITS, "Least charge on battery, 0 to 1.", "0.3", metavar="X")]
OnlyCharging = Annotated[
    bool | None, option(LIMITS, "Work on external power only.", "no-only-charging", "--only-charging/--no-only-charging")
]
MaxTemperature = Annotated[
    float | None, option(LIMITS, "Degrees Celsius of the hottest sensor.", "45 for the battery, none else", metavar="C")
]


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """A command's parameters with those of its `--preset`, which is told on stderr."""
    name = given.get("preset")
    if name is None:
        return dict(given)
    from fwdllama import preset

    typer.echo(preset.described(name, given), err=True)
    return preset.completed(name, given)


def kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the parameters is about the device itself."""
    return {key: given[key] for key in KEPT if given.get(key) is not None}


def guard_of(given: Mapping[str, Any]) -> Guard:
    """The limits that the parameters set; what is not among them is as usual.

    Raises:
        UsageError: a limit that cannot be.
    """
    from fwdllama.guard import Guard

    names = {"min_battery": "min_battery", "only_charging": "only_charging", "max_temperature": "max_temperature_c"}
    return Guard(**{names[key]: value for key, value in kept(given).items() if key in names})


@contextmanager
def considerate(given: Mapping[str, Any], tell: Callable[[str], None]) -> Iterator[None]:
    """Give way to other programs as `--nice` says, from here on; keep a phone awake, until the end."""
    from fwdllama.wakelock import awake

    nice = given.get("nice") or 0
    # Of this thread alone, as Linux has it; threads that it starts, llama.cpp's among them, inherit it. Nobody may take it back.
    if nice > os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    with awake(tell):
        yield
