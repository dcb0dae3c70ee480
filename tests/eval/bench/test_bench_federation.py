"""The bench of federation on tiny sizes: an aggregator in a process of its own, its devices, and checks that find what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")

from fwdllama_eval.bench.federation import aggregator, dropout, fleet, hostile, kill, load
from fwdllama_eval.bench.federation.aggregator import HOST, Aggregator
from fwdllama_eval.bench.federation.books import acknowledged, checked
from fwdllama_eval.bench.federation.proxy import Proxy
from fwdllama_eval.bench.federation.wire import Lost, asked
from fwdllama_eval.bench.measure import Bench, BenchError

from fwdllama.federation.toy import toy_run

pytestmark = pytest.mark.service

ROUND = {"probes": 40, "most": 40, "probes_per_task": 10}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aggregator]:
    """One aggregator for all tests that leave it as it is."""
    with Aggregator(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(served: Aggregator, tmp_path_factory: pytest.TempPathFactory) -> tuple[fleet.Report, Counter[str]]:
    """A run from its beginning to its end by a simulated device, and what they were told to be stored."""
    spec, initial = toy_run("whole", rounds=3, round=ROUND, evaluation={"every": 2, "devices": 1})
    devices = served.enrolled(1)
    served.create(spec, initial)
    log = tmp_path_factory.mktemp("whole") / "accepted.log"
    report = asyncio.run(fleet.Fleet(load.orders_for(served, "whole", devices, 20.0, log)).run())
    return report, acknowledged([log])


def test_the_books_of_a_whole_run_add_up(books: Path, whole: tuple[fleet.Report, Counter[str]]) -> None:
    report, done = whole
    assert (report.finished, report.failures, report.lost) == (True, 0, 0)
    assert len(done) == report.accepted == 3 * 4 + 3  # tasks of three rounds, and evaluations of versions 0, 2 and 3
    found = checked(f"sqlite:///{books}", "whole", done)
    assert (found["lost"], found["counted_twice"], found["miscounted"], found["rounds"], found["results"]) == (0, 0, 0, 3, 15)
    assert (found["chain_valid"], found["audit_valid"]) == (True, True)
    assert checked(f"sqlite:///{books}", "whole", done + Counter({"t0": 1}))["lost"] == 1


@pytest.mark.parametrize(
    ("damage", "figure", "expected"),
    [
        ("UPDATE tasks SET counted = counted - 1 WHERE kind = 'train' AND counted = 1 AND slot = 0", "counted_twice", 20),
        ("UPDATE tasks SET counted = NULL WHERE kind = 'train' AND counted = 2 AND slot = 1", "lost", 1),
        ("UPDATE runs SET n_results = n_results + 1 WHERE name = 'whole'", "miscounted", 1),
        ("UPDATE runs SET n_probes = n_probes + 1 WHERE name = 'whole'", "chain_valid", False),
        ("UPDATE entries SET hash = zeroblob(32) WHERE number = 1", "chain_valid", False),
        ("UPDATE audit SET at = at + 1 WHERE seq = 1", "audit_valid", False),
        ("DELETE FROM audit WHERE seq = 2", "audit_valid", False),
    ],
)
def test_damaged_books_are_found_out(books: Path, whole: tuple[fleet.Report, Counter[str]], damage: str, figure: str, expected: object) -> None:
    with contextlib.closing(sqlite3.connect(books)) as connection:
        assert connection.execute(damage).rowcount >= 1
        connection.commit()
    assert checked(f"sqlite:///{books}", "whole", whole[1])[figure] == expected


@pytest.fixture
def books(served: Aggregator, whole: tuple[fleet.Report, Counter[str]], tmp_path: Path) -> Path:
    """A copy of the database, with nothing in it of other runs."""
    path = tmp_path / "books.sqlite"
    original = served.folder / "aggregator" / "aggregator.sqlite"
    with contextlib.closing(sqlite3.connect(original)) as source, contextlib.closing(sqlite3.connect(path)) as copy:
        source.backup(copy)
        copy.execute("DELETE FROM tasks WHERE run != (SELECT id FROM runs WHERE name = 'whole')")
        copy.execute("DELETE FROM entries WHERE run != (SELECT id FROM runs WHERE name = 'whole')")
        copy.execute("UPDATE devices SET n_results = 0 WHERE id NOT IN (SELECT device FROM tasks)")
        copy.commit()
    return path


def test_a_fleet_that_was_killed_in_the_middle_of_a_line_has_not_acknowledged_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("t1\nt2\nt")
    assert acknowledged([tmp_path / "log", tmp_path / "none"]) == Counter(["t1", "t2"])


def test_nothing_passes_a_cut_network_until_it_is_mended(served: Aggregator) -> None:
    with Proxy(served.port) as proxy:
        assert asked(HOST, proxy.port, "GET", "/health").status == 200
        proxy.cut()
        with pytest.raises(Lost, match="GET /health: TimeoutError"):
            asked(HOST, proxy.port, "GET", "/health", answer_s=0.1)
        proxy.mend()
        assert asked(HOST, proxy.port, "GET", "/health").status == 200


def test_an_aggregator_that_cannot_start_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregator, "PROGRAM", "raise SystemExit('no room on the disk')")
    with pytest.raises(BenchError, match="the aggregator did not start: no room on the disk"):
        Aggregator(tmp_path)


def test_load_counts_what_the_aggregator_counts(served: Aggregator, tmp_path: Path) -> None:
    figures = load.loaded(served, tmp_path, enrolled=12, concurrent=6, seconds=0.4, warm_s=0.1)
    assert (figures["enrolled"], figures["failures"]) == (12, 0)
    assert figures["results_a_second"] > 10
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["worst_ms"]


def test_kills_and_a_cut_network_lose_nothing(tmp_path: Path) -> None:
    def everything(scene: kill.Scene) -> None:
        scene.kill_devices()
        kill.cut(scene, 0.3)
        scene.kill_aggregator()

    bench = Bench("no-model", None, tmp_path)
    figures = kill.interrupted(bench, "killed", everything, 1, through_proxy=True, fleets=1).figures
    assert figures["acknowledged"] > 10
    assert kill.ITEMS[0].met({**figures, "interruptions": 50})


def test_what_leaving_devices_waste_is_what_the_aggregator_reports(served: Aggregator, tmp_path: Path) -> None:
    pace = dropout.Pace(task_s=0.05, away_s=(0.1, 0.5), lease_s=0.3, probes=80)
    found = dropout.waste(served, tmp_path, "async", 1.0, 1.0, 6, 2, pace)
    assert found["unreported"] == 0
    assert found["dropped"] > 0
    assert 0 < found["wasted"] < 1


def test_a_lie_is_what_its_name_says() -> None:
    honest = {"theta_digest": "now", "plus": [1.0, 3.0], "minus": [2.0], "loss": 2.0}
    first = {**honest, "theta_digest": "then", "plus": [9.0, 9.5]}
    told = {name: lie(honest, first) for name, lie in hostile.LIES.items()}
    assert told["times_1000"] == {**honest, "plus": [1000.0, 3000.0], "minus": [2000.0], "loss": 2000.0}
    assert told["sign_flipped"] == {**honest, "plus": [3.0, 1.0]}
    assert told["constant"]["plus"] == told["constant"]["minus"] * 2
    assert json.dumps(told["nan"]["plus"]) == "[NaN, 3.0]"
    assert told["replayed"] == {**first, "theta_digest": "now"}


def test_robust_rules_bear_liars_that_the_plain_mean_does_not(served: Aggregator) -> None:
    size = hostile.Size(devices=5, rounds=6, probes=100)
    identities = served.enrolled(size.devices)
    play = functools.partial(hostile.played, served, identities, size=size)
    clip, mean = hostile.Rule("clip", max_loss=hostile.WIDE), hostile.MEAN
    clean, refused = play(clip, None)
    assert refused == 0
    assert play(clip, "times_1000")[0] < 1.1 * clean
    assert play(mean, "times_1000")[0] > 1.3 * clean
    loss, refused = play(hostile.Rule("clip"), "nan")
    assert refused > 0
    assert loss < 1.1 * clean


def test_a_task_of_twenty_probes_is_delivered_in_less_than_a_kilobyte(served: Aggregator) -> None:
    figures = load.uploads(served)
    item = next(item for item in load.ITEMS if item.name == "federation-upload")
    assert item.met(figures)
    assert figures["one_sided_payload_per_probe"] < figures["two_sided_payload_per_probe"] <= 32


def test_memory_is_measured_over_all_rounds(served: Aggregator, tmp_path: Path) -> None:
    figures = load.remembered(served, tmp_path, enrolled=20, rounds=20)
    assert (figures["enrolled"], figures["rounds"]) == (20, 20)
    assert 20e6 < figures["rss_bytes"] < 400e6
