"""Rounds under everything that devices, time and several workers can do to them, in any order."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from fwdllama_server.assignment import check_in
from fwdllama_server.delivery import deliver, tick
from fwdllama_server.errors import Refused
from fwdllama_server.registry import Registry, add_version, ledger_entries, store_blob
from fwdllama_server.rollback import rolled_back
from fwdllama_server.rounds import Lease, Round, decide, free_slot, judge, n_counted, n_leased, wait_s
from fwdllama_server.schema import devices, entries, metadata, runs, tasks, tokens
from fwdllama_server.state import run_named
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy.pool import StaticPool

from fwdllama.federation.message import CheckIn, EvaluateResult, Receipt, Task, TrainResult, theta_digest
from fwdllama.federation.spec import RoundConfig
from fwdllama.federation.toy import BASE, toy_run
from fwdllama.sampler import seeds_at

N = 4  # probes of a task
DEVICES = 5
BEGIN = 1_800_000_000.0


class Machine(RuleBasedStateMachine):
    """One run, two workers that share its database, and devices that do as they like."""

    shape: ClassVar[dict[str, Any]] = {}
    rule_: str = "clip"
    rounds: int = 1000

    def __init__(self) -> None:
        super().__init__()
        self.engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        metadata.create_all(self.engine)
        self.connection = self.engine.connect()
        self.workers = [Registry(), Registry()]
        self.now = BEGIN
        self.given: list[tuple[str, Task]] = []
        self.accepted: dict[str, tuple[str, int]] = {}  # task -> result, the round that it counts in
        self.closed: dict[int, bytes] = {}
        self._begin()

    def _begin(self) -> None:
        shape = {"probes": 4 * N, "most": 4 * N, "probes_per_task": N, "lease_s": 10.0, "deadline_s": 40.0, "extensions": 1000, **self.shape}
        more = {"aggregation": {"rule": self.rule_}, "evaluation": {"every": 3, "devices": 1}}
        self.spec, initial = toy_run("toy", 8, rounds=self.rounds, round=shape, **more)
        c = self.connection
        store_blob(c, initial, public=False)
        digest = theta_digest(self.workers[0].origin(c, "r1").theta) if self._row_made() else ""
        c.execute(runs.update().values(theta_digest=digest))
        add_version(c, "r1", 0, parent=None, theta_digest=digest, created_at=self.now, n_probes=0, n_devices=0)
        c.execute(tokens.insert().values(id="k", hash="h", name="t", created_at=self.now))
        for i in range(DEVICES):
            c.execute(devices.insert().values(id=f"d{i}", name="phone", token="k", enrolled_at=self.now, last_seen=self.now))
        c.commit()

    def _row_made(self) -> bool:
        spec = self.spec
        row = {"id": "r1", "name": "toy", "spec": spec.model_dump_json(), "status": "open", "created_at": self.now, "wanted": spec.round.probes}
        row |= {"opened_at": self.now, "deadline": self.now + spec.round.deadline_s, "head": spec.genesis(), "theta_digest": ""}
        self.connection.execute(runs.insert().values(**row))
        return True

    def teardown(self) -> None:
        self.connection.close()
        self.engine.dispose()

    def _checked_in(self, device: int, worker: int) -> Task | None:
        run = run_named(self.connection, self.workers[worker], "toy")
        return check_in(self.connection, self.workers[worker], run, f"d{device}", CheckIn(base=BASE), 3, self.now).task

    @rule(device=st.integers(0, DEVICES - 1), worker=st.integers(0, 1), kept=st.sampled_from([True, True, True, False]))
    def a_device_asks_for_work(self, device: int, worker: int, kept: bool) -> None:
        """Not kept: what followed failed, and the transaction was rolled back."""
        task = self._checked_in(device, worker)
        if not kept:
            self.connection.rollback()
            return
        self.connection.commit()
        if task is not None:
            assert task.kind == "evaluate" or len(task.seeds) == N
            self.given.append((f"d{device}", task))

    @precondition(lambda self: self.given)
    @rule(
        which=st.integers(0, 10_000),
        worker=st.integers(0, 1),
        wrong=st.sampled_from([None, None, None, None, "nan", "count", "digest"]),
        kept=st.sampled_from([True, True, True, False]),
    )
    def a_result_arrives(self, which: int, worker: int, wrong: str | None, kept: bool) -> None:
        """Any result of any task ever given: in time, late, stale, again, or wrong."""
        device, task = self.given[-1 - which % min(len(self.given), 12)]
        losses = [1.0 + seed % 97 / 1000 for seed in task.seeds]
        result: TrainResult | EvaluateResult
        if task.kind == "evaluate":
            result = EvaluateResult(theta_digest=task.theta_digest, loss=1.0, n_examples=4, n_tokens=9)
        else:
            losses = {"nan": [float("nan"), *losses[1:]], "count": losses[1:]}.get(wrong or "", losses)
            digest = "0" * 64 if wrong == "digest" else task.theta_digest
            result = TrainResult(theta_digest=digest, plus=losses, minus=(1.0,), examples=(4,), loss=1.0, n_tokens=9)
        answer, _ = deliver(self.connection, self.workers[worker], task.task, device, result, self.now)
        if not kept:
            self.connection.rollback()
            return
        self.connection.commit()
        before = self.accepted.get(task.task)
        if isinstance(answer, Refused):
            assert answer.status in (409, 410, 422)
            assert wrong is not None or before is None
            return
        assert isinstance(answer, Receipt)
        assert answer.duplicate == (before is not None)
        if before is None:
            row = self.connection.execute(sa.select(tasks).where(tasks.c.id == task.task)).one()
            self.connection.rollback()
            self.accepted[task.task] = (result.model_dump_json(), row.counted)

    @rule(seconds=st.floats(0.1, 15.0), worker=st.integers(0, 1))
    def time_passes(self, seconds: float, worker: int) -> None:
        self.now += seconds
        tick(self.connection, self.workers[worker], self.now)
        self.connection.commit()

    @rule(worker=st.integers(0, 1), back=st.integers(1, 3), kept=st.sampled_from([True, True, False]))
    def an_administrator_goes_back(self, worker: int, back: int, kept: bool) -> None:
        run = run_named(self.connection, self.workers[worker], "toy")
        if run.row.version and run.row.status == "open":
            rolled_back(self.connection, self.workers[worker], run, max(0, run.row.version - back), self.now)
        if kept:
            self.connection.commit()
        else:
            self.connection.rollback()

    @rule(worker=st.integers(0, 1), paused=st.booleans())
    def an_administrator_pauses_or_resumes(self, worker: int, paused: bool) -> None:
        self.connection.execute(runs.update().where(runs.c.status != "finished").values(status="paused" if paused else "open"))
        self.connection.commit()

    @invariant()
    def theta_is_what_the_ledger_leads_to_and_steps_are_within_the_budget(self) -> None:
        run = run_named(self.connection, self.workers[0], "toy")
        held = [x.held(self.connection, "r1", run.row.version) for x in self.workers]
        self.connection.rollback()
        assert [theta_digest(x.theta) for x in held] == [run.row.theta_digest] * 2
        restored = sum(entry.restores is not None for entry in ledger_entries(self.connection, "r1", 0, run.row.version))
        self.connection.rollback()
        assert run.row.version - restored <= self.rounds

    @invariant()
    def an_accepted_result_stays_as_it_was(self) -> None:
        found = {row.id: (row.result, row.counted) for row in self.connection.execute(sa.select(tasks).where(tasks.c.counted.is_not(None)))}
        self.connection.rollback()
        assert found == self.accepted

    @invariant()
    def the_ledger_holds_what_was_counted_and_nothing_twice(self) -> None:
        run = self.connection.execute(sa.select(runs)).one()
        ledger = ledger_entries(self.connection, "r1", 0, run.version)
        rows = self.connection.execute(sa.select(tasks).where(tasks.c.kind == "train", tasks.c.counted.is_not(None), tasks.c.version >= 0)).all()
        numbers = self.connection.execute(sa.select(entries.c.number).order_by(entries.c.number)).scalars().all()
        self.connection.rollback()
        assert numbers == list(range(run.version)) == [entry.step for entry in ledger]
        assert run.n_probes == sum(len(entry.seeds) for entry in ledger)
        slots: dict[int, Counter[tuple[int, int]]] = {}
        for row in rows:
            slots.setdefault(row.counted, Counter())[(row.version, row.slot)] += 1
        copies = self.spec.round.copies
        assert all(n <= copies for counts in slots.values() for n in counts.values())
        for entry in ledger:
            complete = sorted(place for place, n in slots.get(entry.step, Counter()).items() if n >= copies)
            assert entry.seeds.tolist() == [s for version, slot in complete for s in seeds_at(self.spec.train.seed, version, slot * N, N)]
            assert self.closed.setdefault(entry.step, entry.payload()) == entry.payload()
        everything = [seed for entry in ledger for seed in entry.seeds.tolist()]
        assert len(set(everything)) == len(everything)

    @invariant()
    def waste_is_every_lost_task_once(self) -> None:
        run = self.connection.execute(sa.select(runs)).one()
        n_marked = self.connection.execute(sa.select(sa.func.count()).select_from(tasks).where(tasks.c.wasted == 1)).scalar_one()
        by_device = self.connection.execute(sa.select(devices.c.n_wasted)).scalars().all()
        self.connection.rollback()
        assert run.n_wasted == N * n_marked == sum(by_device)
        assert min(by_device) >= 0
        assert run.n_results == len(self.accepted)

    @invariant()
    def both_workers_see_the_round_that_is_in_the_database(self) -> None:
        from fwdllama_server.state import open_round

        seen = [open_round(self.connection, x, run_named(self.connection, x, "toy")) for x in (*self.workers, Registry())]
        self.connection.rollback()
        for current in seen[:2]:
            assert sorted(current.leases, key=lambda x: x.task) == sorted(seen[2].leases, key=lambda x: x.task)
            assert replace(current, leases=()) == replace(seen[2], leases=())
            assert dict(current.counted) == dict(seen[2].counted)


class Asynchronous(Machine):
    shape: ClassVar[dict[str, Any]] = {"staleness": 2}


class Copied(Machine):
    shape: ClassVar[dict[str, Any]] = {"copies": 3}
    rule_ = "median"


class Ending(Machine):
    """Short enough to end, with results that may be late when it does."""

    shape: ClassVar[dict[str, Any]] = {"staleness": 2, "probes": N, "most": N}
    rounds = 3


@pytest.mark.parametrize("machine", [Machine, Asynchronous, Copied, Ending])
def test_rounds_count_every_result_once_whatever_happens(machine: type[Machine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=5, stateful_step_count=40, deadline=None))


# -- the state machine alone -------------------------------------------------------------------------------------------

CONFIG = RoundConfig(probes=40, most=40, probes_per_task=10, lease_s=10.0, minimum=0.5, extensions=1)


def lease(slot: int, device: str = "a", *, round_: int = 3, until: float = 10.0, counted: int | None = None) -> Lease:
    name = hashlib.sha256(f"{slot}{device}{round_}{until}".encode()).hexdigest()[:8]
    return Lease(name, round_, slot, device, 0.0, until, counted)


def test_a_slot_is_handed_on_when_its_lease_passes_and_not_before() -> None:
    current = Round(3, 40, 100.0).with_lease(lease(0))
    assert free_slot(current, CONFIG, "b", 9.9) == 1
    assert free_slot(current, CONFIG, "b", 10.0) == 0


def test_copies_of_a_slot_go_to_different_devices() -> None:
    config = CONFIG.model_copy(update={"copies": 2})
    current = Round(3, 40, 100.0).with_lease(lease(0))
    assert free_slot(current, config, "a", 1.0) == 1
    assert free_slot(current, config, "b", 1.0) == 0
    assert free_slot(current.with_lease(lease(0, "b")), config, "c", 1.0) == 1


def test_over_selection_leases_more_slots_than_the_round_wants() -> None:
    full = Round(3, 40, 100.0, leases=tuple(lease(slot, str(slot)) for slot in range(4)))
    assert free_slot(full, CONFIG, "z", 1.0) is None
    assert free_slot(full, CONFIG.model_copy(update={"over_selection": 1.5}), "z", 1.0) == 4


def test_a_released_lease_frees_its_slot_but_its_result_is_still_welcome() -> None:
    held = lease(0)
    current = Round(3, 40, 100.0).with_lease(held).released([held.task], 2.0)
    assert free_slot(current, CONFIG, "b", 2.0) == 0
    assert judge(current, CONFIG, held) is None
    other = lease(0, "b")
    taken = current.with_lease(other).with_result(other.task)
    verdict = judge(taken, CONFIG, held)
    assert verdict is not None
    assert (verdict.status, verdict.sentence) == (410, "late: the lease ended and another device has delivered slot 0 of round 3.")


def test_a_result_is_stale_when_its_round_is_further_back_than_allowed() -> None:
    current = Round(5, 40, 100.0)
    verdict = judge(current, CONFIG, lease(0))
    assert verdict is not None
    assert (verdict.status, verdict.sentence) == (409, "stale: the task was for version 3, and the run is at version 5.")
    assert judge(current, CONFIG.model_copy(update={"staleness": 2}), lease(0)) is None


@pytest.mark.parametrize(
    ("n_done", "extensions", "now", "expected"),
    [(4, 0, 0.0, "close"), (2, 0, 99.0, "open"), (2, 0, 100.0, "close"), (1, 0, 100.0, "extend"), (1, 1, 100.0, "abandon"), (0, 0, 100.0, "extend")],
)
def test_a_round_ends_when_it_is_full_or_late_with_its_minimum(n_done: int, extensions: int, now: float, expected: str) -> None:
    leases = tuple(lease(slot, counted=3 if slot < n_done else None) for slot in range(4))
    current = Round(3, 40, 100.0, extensions, leases)
    assert n_counted(current, CONFIG) == 10 * n_done
    assert decide(current, CONFIG, now) == expected


def test_what_is_derived_from_leases_follows_every_change() -> None:
    current = Round(3, 40, 100.0)
    for slot in range(4):
        current = current.with_lease(lease(slot, str(slot)))
    current = current.with_result(current.leases[2].task).under(80, 200.0, 1)
    assert (current.wanted, current.deadline, current.extensions) == (80, 200.0, 1)
    again = replace(current)  # derives them anew
    assert dict(current.slots) == dict(again.slots)
    assert dict(current.counted) == dict(again.counted) == {(3, 2): 1}
    assert n_leased(current, CONFIG, 1.0) == 30
    assert wait_s(current, 4.0) == 1.0
