"""Every way to run rounds, from end to end: the aggregator, and devices that drive the real loop."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa
from fwdllama_server.audit import check_ledgers
from fwdllama_server.schema import tasks
from fwdllama_server.state import run_named

from fwdllama.federation.client import Client
from fwdllama.federation.device import Device, Listener
from fwdllama.federation.store import MemoryStore
from fwdllama.federation.toy import BASE
from fwdllama.federation.worker import quadratic_worker
from fwdllama.ledger import replay
from fwdllama.sampler import seeds_at

if TYPE_CHECKING:
    from .conftest import Aggregator

ROUND = {"probes": 40, "most": 160, "probes_per_task": 10}


def devices(aggregator: Aggregator, run: str, n: int) -> list[Device]:
    token = aggregator.admin("POST", "/v1/tokens", {"name": "tests"}).json()["token"]
    found = []
    for seed in range(n):
        client = Client("http://testserver", aggregator.client, patience_s=0.0, now=aggregator.clock)
        hire = lambda spec, initial, seed=seed: nullcontext(quadratic_worker(spec, seed=seed))  # noqa: E731
        found.append(Device(client, MemoryStore(), BASE, 24, hire, run_name=run, listener=Listener()))
        found[-1].enrol(f"simulated {seed}", token)
    return found


def driven(aggregator: Aggregator, at_work: list[Device], n_steps: int = 400) -> None:
    """In turn, until the run is finished; each works on while the others deliver."""
    for _ in range(n_steps):
        for device in at_work:
            if device.over is None:
                device.step()
        aggregator.clock.at += 0.5
        if all(device.over for device in at_work):
            return
    raise AssertionError(f"the run did not finish: {aggregator.admin('GET', '/v1/runs/toy/progress').json()}")


@pytest.mark.parametrize(
    ("round_", "more"),
    [
        ({}, {}),
        ({"staleness": 2}, {}),
        ({"staleness": 2, "over_selection": 2.0}, {"train": {"step": {"lr": 0.15, "candidates": 2}}}),
        ({"copies": 3}, {"aggregation": {"rule": "median"}}),
        ({"copies": 3, "over_selection": 2.0}, {"aggregation": {"rule": "trimmed"}}),
        ({}, {"train": {"step": {"lr": 0.15}, "pacing": {"kind": "variance", "tau": 0.05}}}),
        ({"staleness": 1}, {"train": {"step": {"lr": 0.15}, "pacing": {"kind": "variance", "tau": 0.05}}}),
        ({}, {"train": {"step": {"lr": 0.15}, "budget": {"probes": 130}}}),
    ],
)
def test_run_of_every_kind_ends_better_than_it_began_and_can_be_verified(
    aggregator: Aggregator, round_: dict[str, Any], more: dict[str, Any]
) -> None:
    train = {"step": {"lr": 0.15}, **more.get("train", {})}
    aggregator.create(rounds=5, n_params=32, round={**ROUND, **round_}, evaluation={"every": 2, "devices": 3}, **{**more, "train": train})
    driven(aggregator, devices(aggregator, "toy", 3))
    run = aggregator.admin("GET", "/v1/runs/toy").json()
    progress = aggregator.admin("GET", "/v1/runs/toy/progress").json()
    assert run["reason"] == "the budget is used up"
    if "budget" in train:
        assert 130 <= progress["n_probes"] < 130 + 40
    else:
        assert run["version"] == 5
    assert progress["n_refused"] == 0 or round_.get("copies") or round_.get("staleness")
    versions = aggregator.admin("GET", "/v1/runs/toy/versions").json()
    held_out = [v["held_out_loss"] for v in versions if v["held_out_loss"] is not None]
    assert held_out[-1] < 0.9 * held_out[0]
    assert aggregator.context.store.view(check_ledgers) == run["version"]
    if train.get("pacing"):
        assert max(v["n_probes"] for v in versions) > 40


def test_late_result_is_weighed_down_and_measured_at_the_version_that_it_was_given(aggregator: Aggregator) -> None:
    train = {"step": {"lr": 0.15}}
    shape = {**ROUND, "staleness": 2}
    aggregator.create(rounds=30, n_params=32, train=train, round=shape, aggregation={"rule": "mean"}, evaluation={"every": 1000})
    at_work = devices(aggregator, "toy", 3)
    while aggregator.admin("GET", "/v1/runs/toy").json()["version"] < 5:
        for device in at_work:
            device.step()
        aggregator.clock.at += 0.5
    context = aggregator.context
    run = context.store.view(lambda c: run_named(c, context.registry, "toy"))
    member = aggregator.member()
    theta, entries = member.theta("toy")
    late = set()
    for entry in entries:
        rows = context.store.view(
            lambda c, number=entry.step: c.execute(
                sa.select(tasks).where(tasks.c.kind == "train", tasks.c.counted == number).order_by(tasks.c.version, tasks.c.slot)
            ).all()
        )
        assert entry.seeds.tolist() == [s for x in rows for s in seeds_at(run.spec.train.seed, x.version, 10 * x.slot, 10)]
        slopes, weights = [], []
        for row in rows:
            told = json.loads(row.result)
            slope = (np.array(told["plus"]) - np.array(told["minus"])[np.arange(10) % len(told["minus"])]) / run.spec.eps
            assert len(told["minus"]) == 1
            slopes.append(slope - slope.mean())
            weights += [min(1.0, told["examples"][0] / 4) * (1 + entry.step - row.version) ** -0.5] * 10
            late.add(entry.step - row.version)
        expected = np.concatenate(slopes) * weights
        ratio = float(entry.coefficients @ expected / (expected @ expected))
        assert entry.coefficients == pytest.approx(ratio * expected, rel=1e-4, abs=1e-9)
    assert late >= {0, 1}
    assert np.array_equal(replay(np.zeros(32, np.float32), entries), theta)
