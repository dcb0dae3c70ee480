"""A device works only where battery, power, temperature and memory allow it, as files of Linux and Android tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdllama.errors import UsageError
from fwdllama.guard import Guard, Reading


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


PHONE = {
    "power_supply/battery/type": "Battery",
    "power_supply/battery/capacity": "64",
    "power_supply/battery/status": "Discharging",
    "power_supply/battery/temp": "312",
    "power_supply/usb/type": "USB",
    "power_supply/usb/online": "0",
    "thermal/thermal_zone0/temp": "41500",
    "thermal/thermal_zone1/temp": "-274000",
    "thermal/thermal_zone2/temp": "not available",
}


def read(root: Path, **changed: str) -> Reading:
    return Guard(root=tree(root, {**PHONE, **{key.replace("__", "/"): value for key, value in changed.items()}})).reading()


def test_a_phones_battery_power_and_temperatures_are_read(tmp_path: Path) -> None:
    at = read(tmp_path)
    assert (at.battery, at.charging, at.battery_c, at.hottest_c) == (0.64, False, 31.2, 41.5)
    assert at.memory_bytes is not None
    assert at.memory_bytes > 0


def test_external_power_is_charging_also_where_the_battery_holds_its_charge(tmp_path: Path) -> None:
    assert read(tmp_path, power_supply__battery__status="Not charging", power_supply__usb__online="1").charging is True


def test_the_battery_of_a_mouse_is_not_the_machines(tmp_path: Path) -> None:
    tree(tmp_path, {"power_supply/hid/type": "Battery", "power_supply/hid/scope": "Device", "power_supply/hid/capacity": "3"})
    assert read(tmp_path).battery == 0.64


def test_a_machine_without_battery_tells_nothing_of_one(tmp_path: Path) -> None:
    at = Guard(root=tmp_path).reading()
    assert (at.battery, at.charging, at.battery_c, at.hottest_c) == (None, None, None, None)
    assert Guard(root=tmp_path).refusal(at) is None


def test_what_android_hides_is_asked_of_termux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "termux-battery-status"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho \'{"health":"GOOD","percentage":21,"plugged":"UNPLUGGED","status":"DISCHARGING","temperature":33.5}\'\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    at = Guard(root=tmp_path).reading()
    assert (at.battery, at.charging, at.battery_c) == (0.21, False, 33.5)
    command.write_text("#!/bin/sh\necho 'the app is not installed'\n")
    assert Guard(root=tmp_path).reading().battery is None


GOOD = Reading(battery=0.8, charging=False, battery_c=30.0, hottest_c=50.0, memory_bytes=1 << 30)


def changed(**values: object) -> Reading:
    return Reading(**{**GOOD.__dict__, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("guard", "at", "reason"),
    [
        (Guard(), GOOD, None),
        (Guard(), Reading(), None),
        (Guard(), changed(battery=0.29), "the battery is at 29%, below 30%"),
        (Guard(), changed(battery=0.29, charging=True), None),
        (Guard(min_battery=0.9), GOOD, "the battery is at 80%, below 90%"),
        (Guard(only_charging=True), GOOD, "it is not charging"),
        (Guard(only_charging=True), Reading(), "whether it is charging cannot be told, and --only-charging was given"),
        (Guard(only_charging=True), changed(charging=True), None),
        (Guard(), changed(battery_c=46.0), "the battery has 46 °C, above 45 °C"),
        (Guard(max_temperature_c=60), GOOD, None),
        (Guard(max_temperature_c=48), GOOD, "it has 50 °C, above 48 °C"),
        (Guard(), changed(memory_bytes=50 << 20), "only 50.0 MiB of memory are free"),
    ],
)
def test_the_reason_not_to_work_is_a_sentence(guard: Guard, at: Reading, reason: str | None) -> None:
    assert guard.refusal(at) == reason


def test_a_device_that_rested_recovers_a_little_first() -> None:
    at = changed(battery=0.32)
    assert Guard().refusal(at) is None
    assert Guard().refusal(at, resting=True) == "the battery is at 32%, below 35%"
    assert Guard().refusal(changed(battery=0.35), resting=True) is None


def test_while_it_works_it_looks_every_few_seconds(tmp_path: Path) -> None:
    moment = [0.0]
    root = tree(tmp_path, PHONE)
    ask = Guard(root=root, now=lambda: moment[0], every_s=5.0).watch()
    tree(root, {"power_supply/battery/capacity": "10"})
    assert ask() is None
    moment[0] = 5.0
    assert ask() == "the battery is at 10%, below 30%"
    tree(root, {"power_supply/battery/capacity": "90"})
    assert ask() is not None
    moment[0] = 10.0
    assert ask() is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_battery": 30}, "--min-battery is 30, but must be between 0 and 1."),
        ({"min_battery": float("nan")}, "--min-battery is nan, but must be between 0 and 1."),
        ({"max_temperature_c": 400}, "--max-temperature is 400, but must be degrees Celsius between 0 and 150."),
    ],
)
def test_limits_that_cannot_be_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        Guard(**options)  # type: ignore[arg-type]
    assert str(caught.value) == sentence
