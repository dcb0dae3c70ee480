"""A run rests on a low battery, works less in heat, and ends when memory is short; a simulated phone is described by its files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fwdllama.checkpoint import read_metrics
from fwdllama.guard import MIN_MEMORY_BYTES, SHARE, Guard
from fwdllama.pause import Pause, paced
from fwdllama.progress import Clock, Progress
from fwdllama.rest import TICK_S, Rest
from fwdllama.throttle import COOL_BY_C, LEAST, Throttle
from tests.test_trainer import config, trained

PROBE_S = 0.5


@dataclass
class Phone:
    """A phone in a folder: its clock moves when it works or sleeps, its battery when told, its heat by what it does."""

    root: Path
    now: float = 0.0
    heat_c: float = 30.0  # of the processor
    gain_c: float = 0.0  # by which it would be hotter after long work without a rest
    lag_s: float = 60.0
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write("power_supply/battery/type", "Battery")
        self.power(80, "Discharging")
        self.write("thermal/thermal_zone0/type", "cpu-0")
        self.pass_(0.0, working=False)

    def write(self, name: str, text: str) -> None:
        path = self.root / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def power(self, percent: int, status: str) -> None:
        self.write("power_supply/battery/capacity", str(percent))
        self.write("power_supply/battery/status", status)

    def memory(self, free_bytes: int) -> None:
        (self.root / "proc").mkdir(exist_ok=True)
        (self.root / "proc/meminfo").write_text(f"MemTotal: 7700000 kB\nMemAvailable: {free_bytes >> 10} kB\n")

    def pass_(self, seconds: float, *, working: bool) -> None:
        self.now += seconds
        self.heat_c += (30.0 + self.gain_c * working - self.heat_c) * min(1.0, seconds / self.lag_s)
        self.write("thermal/thermal_zone0/temp", str(round(1000 * self.heat_c)))
        while self.later and self.now >= self.later[0][0]:
            self.later.pop(0)[1]()


@dataclass
class Run:
    """Probes on a phone, and what was said and shown."""

    phone: Phone
    rest: Rest
    said: list[str]
    shown: list[Pause]

    def probes(self, n: int) -> float:
        """Seconds that so many take, rests included."""
        began = self.phone.now
        for _ in range(n):
            self.phone.pass_(PROBE_S, working=True)
            self.rest()
        return self.phone.now - began


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    def make(*, stop: Callable[[], bool] = lambda: False, gain_c: float = 0.0, **limits: float) -> Run:
        phone = Phone(tmp_path, gain_c=gain_c)
        said: list[str] = []
        shown: list[Pause] = []
        guard = Guard(root=tmp_path, now=lambda: phone.now, **limits)  # type: ignore[arg-type]
        rest = Rest(guard, stop, said.append, shown.append, lambda seconds: phone.pass_(seconds, working=False))
        return Run(phone, rest, said, shown)

    return make


def test_with_charge_and_cool_it_never_rests(made: Callable[..., Run]) -> None:
    run = made(max_temperature_c=80)
    assert run.probes(40) == 40 * PROBE_S
    assert (run.said, run.rest.rested_s, {pause.why for pause in run.shown}) == ([], 0.0, {None})


def test_on_a_low_battery_it_rests_until_it_has_recovered_a_little_and_says_both(made: Callable[..., Run]) -> None:
    run = made()
    run.phone.power(29, "Discharging")
    run.phone.later = [(100.0, lambda: run.phone.power(32, "Discharging")), (200.0, lambda: run.phone.power(35, "Discharging"))]
    took = run.probes(1)
    assert 200 <= took <= 206
    assert run.said == ["resting: the battery is at 29%, below 30%; training goes on by itself when that has changed", "going on"]
    assert run.rest.rested_s == pytest.approx(took - PROBE_S)
    shown = list(dict.fromkeys(paced(pause) for pause in run.shown))
    assert shown == [f"resting: the battery is at {at}" for at in ("29%, below 30%", "29%, below 35%", "32%, below 35%")] + [""]


def test_a_charger_ends_a_rest_at_once(made: Callable[..., Run]) -> None:
    run = made(only_charging=True)
    run.phone.later = [(50.0, lambda: run.phone.power(10, "Charging"))]
    assert 50 <= run.probes(1) <= 56
    assert run.said[0].startswith("resting: it is not charging;")


def test_ctrl_c_ends_a_rest_within_a_tick(made: Callable[..., Run]) -> None:
    stop = [False]
    run = made(stop=lambda: stop[0])
    run.phone.power(5, "Discharging")
    run.phone.later = [(33.0, lambda: stop.__setitem__(0, True))]
    assert run.probes(1) <= 33.0 + 2 * TICK_S


def test_a_hot_phone_settles_below_its_limit_and_still_does_most_of_what_it_could(made: Callable[..., Run]) -> None:
    run = made(max_temperature_c=70, gain_c=60.0)  # 90 degrees without a rest; two thirds of the time are 70
    hottest, n = [], 400
    took = 0.0
    for _ in range(n):
        took += run.probes(1)
        hottest.append(run.phone.heat_c)
    assert max(hottest) < 70 + COOL_BY_C
    share = n * PROBE_S / took
    assert 0.55 < share < 0.9
    later = hottest[n // 2 :]
    assert min(later) > 70 - 3 * COOL_BY_C
    assert max(later) < 71
    assert re.fullmatch("working less until it is cooler: cpu-0 has 7[0-2] °C, above 70 °C", run.said[0])
    assert re.fullmatch(r"working \d\d% of the time: cpu-0 has 7[0-2] °C, above 70 °C", paced(run.shown[-1]))


def test_a_phone_that_cools_works_all_the_time_again(made: Callable[..., Run]) -> None:
    run = made(max_temperature_c=70, gain_c=60.0)
    run.probes(200)
    run.phone.gain_c = 5.0
    run.probes(300)
    assert run.said[-1].startswith("cool again: working all the time, after ")
    assert run.probes(20) == pytest.approx(20 * PROBE_S)


def test_a_sensor_that_is_always_hot_slows_a_run_and_does_not_end_it(made: Callable[..., Run]) -> None:
    run = made(max_temperature_c=20)  # it is never below 30
    run.probes(100)
    assert run.probes(10) == pytest.approx(10 * PROBE_S / LEAST, rel=0.01)


def test_short_memory_ends_a_run_and_a_rest(made: Callable[..., Run]) -> None:
    run = made()
    run.phone.power(10, "Discharging")
    run.phone.memory(100 << 20)
    run.phone.later = [(60.0, lambda: run.phone.memory(MIN_MEMORY_BYTES - 1024))]
    assert 60 <= run.probes(1) <= 66
    assert run.rest.ended == "only 64.0 MiB of memory are free"
    assert run.probes(5) == 5 * PROBE_S, "it never waits again"


def test_a_run_that_rests_and_runs_short_of_memory_is_resumed_to_the_ledger_of_the_unbroken_one(made: Callable[..., Run], tmp_path: Path) -> None:
    run = made()
    phone, rest = run.phone, run.rest

    def happen(progress: Progress) -> None:
        phone.pass_(10.0, working=True)  # longer than between two looks
        if progress.metrics is not None and progress.state.step == 1:
            phone.power(20, "Discharging")
            phone.later = [(phone.now + 30, lambda: phone.power(90, "Discharging"))]
        if progress.state.step == 2:
            phone.memory(40 << 20)

    unbroken = trained(tmp_path / "unbroken", config())
    clock = Clock(now=lambda: phone.now)
    state = trained(tmp_path / "run", config(), on_progress=happen, rest=rest, stop=lambda: rest.ended is not None, clock=clock)
    assert (state.step, state.finished, rest.ended) == (2, None, "only 40.0 MiB of memory are free")
    assert run.said[1] == "going on"
    assert rest.rested_s >= 30
    n_probes = sum(row["n_probes"] for row in read_metrics(tmp_path / "run"))
    assert state.elapsed_s == 10.0 * (n_probes + 1), "of the first step's metrics; rests are not among them"
    assert trained(tmp_path / "run", config()).ledger == unbroken.ledger


def test_a_slow_look_is_a_rare_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Termux:API takes up to a second to answer."""
    command = tmp_path / "termux-battery-status"
    command.write_text("#!/bin/sh\nsleep 0.12\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    began = time.monotonic()
    _, due = Guard(root=tmp_path, every_s=0.0).looked()
    took = time.monotonic() - began
    assert 0.12 * SHARE <= due - began <= (took + 1e-3) * (SHARE + 1)
    monkeypatch.setenv("PATH", "")
    _, due = Guard(root=tmp_path, every_s=0.0).looked()
    assert due <= time.monotonic()


def test_the_share_falls_fast_rises_slowly_and_rests_in_between() -> None:
    at = Throttle()
    for _ in range(100):
        at = at.after(1.0)
    assert at.share == LEAST
    assert at.after(-COOL_BY_C / 2) == at
    n = 0
    while at.share < 1:
        at, n = at.after(-COOL_BY_C - 0.1), n + 1
    assert n == 19
    assert Throttle(0.3).after(None) == Throttle(1.0)
