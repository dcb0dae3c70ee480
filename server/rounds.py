"""A round as a pure state machine: who is given which seeds, which results still count, and when the round ends.

No clock, no HTTP, no database: time is an argument, and a round is a value. A round's seeds are cut into slots of `probes_per_task`; each
slot is leased to `copies` different devices, and handed on when a lease passes without a result. A result that comes after its lease is
still welcome as long as nobody else has delivered the slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fwdllama.federation.spec import RoundConfig

AHEAD = 4  # asynchronous: slots leased at most, times those that the round wants

Decision = Literal["open", "close", "extend", "abandon"]


@dataclass(frozen=True)
class Lease:
    """One slot in one device's hands; `counted` names the round that its result was merged in or waits for."""

    task: str
    round: int  # whose version it is evaluated at
    slot: int
    device: str
    leased_at: float  # seconds since 1970
    until: float
    counted: int | None = None

    @property
    def done(self) -> bool:
        """Whether its result was accepted."""
        return self.counted is not None

    def active(self, now: float) -> bool:
        """Whether its device may still be working on it."""
        return not self.done and now < self.until


@dataclass(frozen=True)
class Round:
    """An open round. `leases` holds its own, and with staleness those of earlier rounds that may still count or do count here."""

    number: int
    wanted: int  # probes
    deadline: float
    extensions: int = 0
    leases: tuple[Lease, ...] = ()

    @cached_property
    def slots(self) -> Mapping[tuple[int, int], tuple[Lease, ...]]:
        """Leases by round and slot, in the order of `leases`."""
        found: dict[tuple[int, int], tuple[Lease, ...]] = {}
        for lease in self.leases:
            place = (lease.round, lease.slot)
            found[place] = (*found.get(place, ()), lease)
        return found

    @cached_property
    def counted(self) -> Mapping[tuple[int, int], int]:
        """How many results count in this round, by round and slot."""
        return Counter((lease.round, lease.slot) for lease in self.leases if lease.counted == self.number)

    @property
    def in_vain(self) -> list[Lease]:
        """What nothing comes of when the round ends without a step: open leases, and results that count in it."""
        return [lease for lease in self.leases if not lease.done or lease.counted == self.number]

    def with_lease(self, lease: Lease) -> Round:
        """The round with one more lease."""
        place = (lease.round, lease.slot)
        return self._changed((*self.leases, lease), {**self.slots, place: (*self.slots.get(place, ()), lease)}, self.counted)

    def with_result(self, task: str) -> Round:
        """The round after the result of `task` was accepted."""
        at, before = next((i, x) for i, x in enumerate(self.leases) if x.task == task)
        after = replace(before, counted=self.number)
        place = (before.round, before.slot)
        changed = tuple(after if x.task == task else x for x in self.slots[place])
        counted = {**self.counted, place: self.counted.get(place, 0) + 1}
        return self._changed((*self.leases[:at], after, *self.leases[at + 1 :]), {**self.slots, place: changed}, counted)

    def released(self, tasks: Collection[str], now: float) -> Round:
        """The round after the leases of `tasks` ended; a result that comes all the same is as welcome as after any lease."""
        return replace(self, leases=tuple(replace(x, until=now) if x.task in tasks else x for x in self.leases))

    def under(self, wanted: int, deadline: float, extensions: int) -> Round:
        """The round with these terms."""
        found = replace(self, wanted=wanted, deadline=deadline, extensions=extensions)
        found.__dict__.update(slots=self.slots, counted=self.counted)
        return found

    def _changed(
        self, leases: tuple[Lease, ...], slots: Mapping[tuple[int, int], tuple[Lease, ...]], counted: Mapping[tuple[int, int], int]
    ) -> Round:
        """With other leases, and what follows from them not computed anew: a round may have hundreds, and changes with each request."""
        found = replace(self, leases=leases)
        found.__dict__.update(slots=slots, counted=counted)
        return found


def n_slots(config: RoundConfig, wanted: int) -> int:
    """How many slots hold `wanted` probes."""
    return -(-wanted // config.probes_per_task)


def free_slot(current: Round, config: RoundConfig, device: str, now: float) -> int | None:
    """The slot that `device` should be given, None when there is nothing for it."""
    limit = n_slots(config, int(-(-current.wanted * config.over_selection // 1)))
    if config.staleness:
        limit *= AHEAD
    for slot in range(limit):
        given = current.slots.get((current.number, slot), ())
        taken = 0
        for lease in given:
            taken += lease.counted is not None or now < lease.until  # done or active; this loop is the hottest of the server
        if taken >= config.copies:
            continue
        if not any(lease.device == device and (lease.done or now < lease.until) for lease in given):
            return slot
    return None


def n_counted(current: Round, config: RoundConfig) -> int:
    """Probes whose results count in this round: slots that all their copies have answered."""
    return config.probes_per_task * sum(1 for copies in current.counted.values() if copies >= config.copies)


def n_leased(current: Round, config: RoundConfig, now: float) -> int:
    """Probes that devices are working on."""
    return config.probes_per_task * sum(1 for lease in current.leases if lease.active(now))


@dataclass(frozen=True)
class Refusal:
    """Why a result does not count: the HTTP status and a sentence."""

    status: int
    sentence: str


def judge(current: Round, config: RoundConfig, lease: Lease) -> Refusal | None:
    """Whether the result of `lease`, which was not accepted before, may count in `current`."""
    late = current.number - lease.round
    if late > config.staleness:
        return Refusal(409, f"stale: the task was for version {lease.round}, and the run is at version {current.number}.")
    rivals = [x for x in current.slots.get((lease.round, lease.slot), ()) if x.done and x.task != lease.task]
    if any(x.device == lease.device for x in rivals):  # it had the slot twice, one lease after the other: copies are of different devices
        return Refusal(410, f"late: the lease ended and this device has delivered slot {lease.slot} of round {lease.round} already.")
    if len(rivals) >= config.copies:
        return Refusal(410, f"late: the lease ended and another device has delivered slot {lease.slot} of round {lease.round}.")
    return None


def decide(current: Round, config: RoundConfig, now: float) -> Decision:
    """What happens to the round now; never a step with less than the minimum."""
    counted = n_counted(current, config)
    if counted >= current.wanted:
        return "close"
    if now < current.deadline:
        return "open"
    if counted and counted >= config.minimum * current.wanted:
        return "close"
    return "extend" if current.extensions < config.extensions else "abandon"


def wait_s(current: Round, now: float) -> float:
    """How long a device without a task should wait at least: a part of what a task takes, or until the first lease passes."""
    at_work = [lease for lease in current.leases if lease.active(now)]
    if not at_work:
        return 0.2
    running = now - min(lease.leased_at for lease in at_work)  # seconds that the oldest open task has taken so far
    ends = min(lease.until for lease in at_work) - now
    return float(min(max(0.2, running / 4), max(0.2, ends), 30.0))
