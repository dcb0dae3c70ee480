"""The device's loop against a real aggregator over a real socket: whatever is lost on the way, no result is lost or counted twice."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fwdllama.errors import FederationError, Refused, Stopped
from fwdllama.federation.device import Device, Listener
from fwdllama.federation.message import theta_digest
from fwdllama.federation.run import chosen_run
from fwdllama.federation.spool import Pending
from fwdllama.federation.store import MemoryStore
from fwdllama.federation.worker import OracleWorker, quadratic_worker
from fwdllama.guard import Guard
from tests.federation.conftest import Made, Serving
from tests.federation.made import Archive


def work(*devices: Device, until: Any = lambda: False, most_s: float = 30.0) -> None:
    """Step devices, one thread each, until each is over or `until` holds; waits are cut short."""

    def one(device: Device) -> None:
        end = time.monotonic() + most_s
        while device.over is None and not until():
            assert time.monotonic() < end, (device.status, "took too long")
            time.sleep(min(0.02, device.step()))

    threads = [threading.Thread(target=one, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def progress(serving: Serving, run: str) -> Any:
    return serving.admin("GET", f"/v1/runs/{run}/progress")


def test_devices_with_different_data_finish_a_run_and_its_loss_falls(serving: Serving, simulated: Made) -> None:
    spec = serving.create("whole", rounds=12, train={"step": {"lr": 0.2}})
    devices = [simulated("whole", seed=seed) for seed in range(4)]
    work(*devices)
    assert {device.over for device in devices} == {"the run is finished: run whole is finished: the budget is used up"}
    run = serving.admin("GET", "/v1/runs/whole")
    versions = serving.admin("GET", "/v1/runs/whole/versions")
    losses = [version["loss"] for version in versions if version["loss"] is not None]
    assert run["version"] == 12
    assert losses[-1] < 0.7 * losses[0]
    assert sum(device.status.n_tasks for device in devices) == progress(serving, "whole")["n_results"]
    assert sum(device.status.n_probes for device in devices) == 12 * spec.round.probes
    held = [device._follower.held for device in devices if device._follower and device._follower.held]
    for position in held:
        assert theta_digest(position.theta) == versions[position.version]["theta_digest"]


def test_an_aggregator_that_goes_away_and_comes_back_costs_nothing(simulated: Made, serving: Serving) -> None:
    serving.create("away", rounds=10)
    said: list[str] = []
    devices = [simulated("away", seed=seed, tell=said) for seed in range(2)]
    work(*devices, until=lambda: devices[0].status.n_tasks >= 4)
    serving.stop()
    for device in devices:
        for _ in range(3):
            assert device.step() > 0
    serving.start()
    work(*devices)
    assert all(device.over for device in devices)
    assert sum(device.status.n_tasks for device in devices) == progress(serving, "away")["n_results"]
    assert sum(device.status.n_probes for device in devices) == 400
    assert sum("cannot be reached" in text and text.endswith("Trying again until it answers.") for text in said) == 2
    assert said.count(f"{serving.url} answers again") == 2


def undelivered(device: Device) -> Pending:
    """Step until a result waits for delivery."""
    while (pending := device.spool.pending()) is None:
        device.step()
    return pending


def test_a_restarted_device_delivers_what_it_had_computed_first(serving: Serving, simulated: Made) -> None:
    serving.create("restarted")
    store = MemoryStore()
    undelivered(simulated("restarted", store))  # killed here
    again = simulated("restarted", store)
    again.step()
    assert again.status.n_tasks == 1
    assert progress(serving, "restarted")["n_results"] == 1


def test_a_result_whose_receipt_was_lost_is_counted_once(serving: Serving, simulated: Made) -> None:
    serving.create("twice")
    store = MemoryStore()
    device = simulated("twice", store)
    pending = undelivered(device)
    device.client.deliver(pending, None)  # the receipt never arrives
    device.step()
    assert device.status.n_tasks == 1
    assert progress(serving, "twice")["n_results"] == 1


def test_a_task_left_by_a_killed_device_goes_to_another(serving: Serving, simulated: Made) -> None:
    serving.create("handed", rounds=1, round={"probes": 10, "most": 10, "probes_per_task": 10, "lease_s": 5.0})
    killed = simulated("handed")
    work(killed, until=lambda: killed.status.n_tasks == 1)  # the score of version 0
    killed.client.check_in("handed", killed._check_in()[1])
    other = simulated("handed", seed=2)
    assert other.step() > 0
    assert other.status.reason == "all probes of round 0 are given out"
    serving.later_s = 6.0
    work(other, until=lambda: other.status.n_probes == 10)


def test_a_result_that_comes_too_late_is_dropped_and_the_device_goes_on(serving: Serving, simulated: Made) -> None:
    serving.create("late")
    said: list[str] = []
    device = simulated("late", tell=said)
    undelivered(device)
    serving.admin("POST", "/v1/runs/late/finish")
    work(device)
    assert "a result came too late and does not count: late: run late is finished." in said
    assert device.status.n_refused == 1
    assert device.over is not None
    assert device.over.startswith("the run is finished")


def test_a_paused_run_is_waited_for(serving: Serving, simulated: Made) -> None:
    serving.create("paused")
    said: list[str] = []
    device = simulated("paused", tell=said)
    serving.admin("POST", "/v1/runs/paused/pause")
    assert device.step() >= 30.0
    assert device.step() >= 30.0
    assert sum("paused" in text for text in said) == 1  # not said again
    serving.admin("POST", "/v1/runs/paused/resume")
    undelivered(device)


def test_a_rollback_is_followed(serving: Serving, simulated: Made) -> None:
    serving.create("back", rounds=8)
    device = simulated("back")
    work(device, until=lambda: (device.status.version or 0) >= 4)
    device.step()
    serving.admin("POST", "/v1/runs/back/rollback", {"version": 1})
    work(device)
    assert device.over is not None
    assert device._follower is not None
    assert device._follower.held is not None


def test_a_revoked_device_stops_with_a_sentence(serving: Serving, simulated: Made) -> None:
    serving.create("revoked")
    device = simulated("revoked")
    undelivered(device)
    assert device.client.identity is not None
    serving.admin("DELETE", f"/v1/devices/{device.client.identity.device}")
    with pytest.raises(FederationError, match=f"{serving.url} does not accept this device any more: .*revoked"):
        device.step()
    assert device.spool.pending() is not None


def test_results_that_are_found_wrong_again_and_again_end_the_device(serving: Serving, simulated: Made) -> None:
    class Wrong(OracleWorker):
        def work(self, task: Any, theta: Any, proceed: Any) -> Any:
            result = super().work(task, theta, proceed)
            return result and result.model_copy(update={"loss": float("nan")})

    def hire(spec: Any, initial: bytes) -> Any:
        worker = quadratic_worker(spec, seed=1)
        worker.__class__ = Wrong
        return nullcontext(worker)

    serving.create("wrong")
    said: list[str] = []
    device = simulated("wrong", hire=hire, tell=said)
    for _ in range(5):
        device.step()
    with pytest.raises(FederationError, match=r"refused 3 results in a row; the last because: loss.*nan"):
        device.step()
    assert device.status.n_refused == 3


def test_a_device_that_must_not_work_says_so_and_takes_no_task(serving: Serving, simulated: Made, tmp_path: Path) -> None:
    serving.create("resting")
    battery = tmp_path / "sys/class/power_supply/battery"
    battery.mkdir(parents=True)
    for name, text in {"type": "Battery", "capacity": "12", "status": "Discharging"}.items():
        (battery / name).write_text(text)
    device = simulated("resting", guard=Guard(root=tmp_path, every_s=0.0))
    assert device.step() >= 60.0
    assert device.status.reason == "the battery is at 12%, below 30%"
    assert device.client.identity is not None
    seen = {row["device"]: row for row in serving.admin("GET", "/v1/devices")}[device.client.identity.device]
    assert (seen["battery"], seen["charging"]) == (0.12, False)
    assert progress(serving, "resting")["leased"] == 0
    (battery / "capacity").write_text("90")
    undelivered(device)


def test_a_device_whose_battery_falls_while_it_works_leaves_the_task(serving: Serving, simulated: Made, tmp_path: Path) -> None:
    serving.create("falling")
    battery = tmp_path / "sys/class/power_supply/battery"
    battery.mkdir(parents=True)
    for name, text in {"type": "Battery", "capacity": "90", "status": "Discharging"}.items():
        (battery / name).write_text(text)
    said: list[str] = []

    def status(at: Any) -> None:
        if at.task_probes == 3:
            (battery / "capacity").write_text("5")

    device = simulated("falling", guard=Guard(root=tmp_path, every_s=0.0), listener=Listener(said.append, status))
    device.step()  # the score of version 0
    device.step()
    assert device.spool.pending() is None
    assert said[-1].startswith("left task t")
    assert said[-1].endswith(" to others: the battery is at 5%, below 30%")
    assert device.status.task_probes == 3


def test_stopping_between_two_probes_leaves_the_task_and_ends(serving: Serving, simulated: Made) -> None:
    serving.create("stopped")
    done: list[int] = []
    listener = Listener(on_status=lambda at: done.append(at.task_probes), stop=lambda: 4 in done)
    device = simulated("stopped", listener=listener)
    assert device.run() == "stopped"
    assert max(done) == 4


def test_waiting_for_the_network_stops_when_asked(serving: Serving, simulated: Made) -> None:
    serving.create("asked")
    device = simulated("asked", listener=Listener(sleep=lambda seconds: False))
    device.client.patience_s, device.client.sleep = 30.0, lambda seconds: False
    device.client.url = "http://127.0.0.1:9"
    with pytest.raises(Stopped):
        device.step()
    assert device.run() == "stopped"


def test_a_result_of_another_run_is_delivered_before_the_device_works_for_the_new_one(serving: Serving, simulated: Made) -> None:
    serving.create("former")
    serving.create("latter")
    store = MemoryStore()
    undelivered(simulated("former", store))
    device = simulated("latter", store)
    pending = undelivered_after_delivery(device)
    assert progress(serving, "former")["n_results"] == 1
    assert pending.run == serving.admin("GET", "/v1/runs/latter")["run"]


def undelivered_after_delivery(device: Device) -> Pending:
    """Step until the first result was taken, and then until there is another."""
    while device.status.n_tasks == 0:
        device.step()
    return undelivered(device)


def test_once_is_one_task(serving: Serving, simulated: Made) -> None:
    serving.create("once")
    device = simulated("once", once=True)
    work(device)
    assert (device.over, device.status.n_tasks) == ("one task was done", 1)
    assert (progress(serving, "once")["n_results"], progress(serving, "once")["leased"]) == (1, 0)


def test_a_device_goes_on_in_its_data_after_a_restart(serving: Serving, simulated: Made) -> None:
    serving.create("place")
    store = MemoryStore()
    workers: list[OracleWorker] = []

    def hire(spec: Any, initial: bytes) -> Any:
        workers.append(quadratic_worker(spec, seed=1))
        return nullcontext(workers[-1])

    first = simulated("place", store, hire=hire)
    work(first, until=lambda: first.status.n_tasks == 3)
    second = simulated("place", store, hire=hire)
    second.step()
    assert workers[1].place != workers[0].place
    assert workers[1].place.batch * 100 + workers[1].place.group > workers[0].place.batch * 100 + workers[0].place.group


def test_a_wrong_token_and_none_are_sentences(serving: Serving, simulated: Made) -> None:
    device = simulated("any")
    device.client.identity = None
    with pytest.raises(FederationError, match=r"is not known to http.*; give the enrolment token that its operator has, with --token\.$"):
        device.enrol("phone", None)
    with pytest.raises(Refused, match="token"):
        device.enrol("phone", "wrong")


def test_the_run_is_the_only_one_for_the_model_or_the_one_named() -> None:
    archive = Archive([])
    run = archive.run()
    base = run.spec.base.sha256
    other = run.model_copy(update={"run": "r2", "spec": run.spec.model_copy(update={"name": "other"})})
    other = other.model_copy(update={"genesis": other.spec.genesis().hex()})
    finished = other.model_copy(update={"status": "finished"})
    assert chosen_run([run, finished], None, base, "URL") == run
    assert chosen_run([run, other], "other", base, "URL") == other
    assert chosen_run([run, other], "r1", base, "URL") == run
    cases: list[tuple[list[Any], str | None, str, str]] = [
        ([run, other], None, base, "URL has several runs for this model: made (open), other (open). Choose one with --run."),
        ([run], "missing", base, "URL has no run 'missing'; it has made (open)."),
        ([finished], None, base, "URL has no run that goes on; it has other (finished)."),
        ([], None, base, "URL has no run that goes on; it has none."),
        ([run], None, "ee" * 32, f"Run 'made' is for toy, SHA-256 {base}, but this model's SHA-256 is {'ee' * 32}; give that file with --model."),
        (
            [run, other],
            None,
            "ee" * 32,
            f"None of the runs of URL is for this model, whose SHA-256 is {'ee' * 32}: made (toy, SHA-256 {base}), other (toy, SHA-256 {base}).",
        ),
        (
            [run.model_copy(update={"genesis": "00" * 32})],
            None,
            base,
            f"Run 'made' of URL begins with 000000000000, but its specification gives {run.genesis[:12]} here. "
            "Install the version of fwdllama that the aggregator has.",
        ),
    ]
    for runs, wanted, mine, sentence in cases:
        with pytest.raises(FederationError) as caught:
            chosen_run(runs, wanted, mine, "URL")
        assert str(caught.value) == sentence
