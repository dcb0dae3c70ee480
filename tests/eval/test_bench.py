"""The bench tells what it found: bars, skipped and crashed items, and figures that mean what their names say."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import typer
from fwdllama_eval.bench import backprop_race, costs, directions, runs, safety, table
from fwdllama_eval.bench.child import Command, in_child, run
from fwdllama_eval.bench.cli import all_items, default_data, register
from fwdllama_eval.bench.measure import DEV_FILE, TRAIN_FILE, Bar, Bench, BenchError, Item, Measured, int4_of
from fwdllama_eval.bench.record import Record, cpu_name
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from fwdllama.answering import answer_dataset, open_engine
from fwdllama.config import EstimatorConfig
from fwdllama.errors import ResourceError, UsageError
from fwdllama.tasks.load import load_dataset
from fwdllama.tasks.template import seed_template
from gguf_tools.adapter import read_adapter
from gguf_tools.synth import write_tiny_llama

MACHINE = {"cpu": "Abacus 9", "cores": 2, "memory_bytes": 8 << 30}
SMALL = ("--units", "2", "--per-unit", "2", "--fresh", "1", "--held-out", "4", "--rounds", "2", "--threads", "1")


def squad(n_paragraphs: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)

    def words(n: int) -> list[str]:
        return ["".join(rng.choices("abcdefgh", k=3)) for _ in range(n)]

    paragraphs = []
    for p in range(n_paragraphs):
        context = words(12)
        qas = [
            {"id": f"{p}-{q}", "question": " ".join(words(2)), "answers": [{"text": context[q], "answer_start": 4 * q}]}
            for q in range(2)
        ]
        paragraphs.append({"context": " ".join(context), "qas": qas})
    return {"version": "1.1", "data": [{"title": "made", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("bench-model") / "tiny.gguf")


@pytest.fixture
def bench(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A tiny model, data of two dozen questions, and a cache of their own."""
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))
    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    work.mkdir()
    (data / TRAIN_FILE).write_text(json.dumps(squad(12, 1)))
    (data / DEV_FILE).write_text(json.dumps(squad(4, 2)))
    return Bench(str(model), data, work)


def item(name: str, measure: Callable[[Bench], Measured], *bars: Bar, needs: tuple[Any, ...] = ()) -> Item:
    return Item(name, f"about {name}", bars, tuple(bar.figure for bar in bars), needs, 1, measure)


def gives(**figures: Any) -> Callable[[Bench], Measured]:
    return lambda bench: Measured(figures, "fwdllama something")


def crashes(bench: Bench) -> Measured:
    raise ZeroDivisionError("nothing to divide by")


# -- bars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [
        (Bar("x", ">=", 45), 45, True),
        (Bar("x", ">=", 45), 44.99, False),
        (Bar("x", "<=", 1.05), 1.05, True),
        (Bar("x", "<=", 1.05), 1.06, False),
        (Bar("x", "<=", 1.05), math.nan, False),
        (Bar("x", "<=", 1.05), -math.inf, False),
        (Bar("x", "<=", 1.05), None, False),
        (Bar("x", "<=", 1.05), "1", False),
        (Bar("x", ">=", 0), True, False),
        (Bar("x", "is", True), True, True),
        (Bar("x", "is", True), 1, False),
        (Bar("x", "is", True), False, False),
    ],
)
def test_bar_is_met_by_numbers_on_its_side_and_by_nothing_else(bar: Bar, value: Any, met: bool) -> None:
    assert bar.met({"x": value}) is met
    assert not bar.met({})


def test_an_item_meets_its_bar_only_when_all_of_its_bars_are_met() -> None:
    both = item("both", gives(), Bar("f1", ">=", 45), Bar("exact_match", ">=", 33))
    assert both.met({"f1": 46, "exact_match": 33})
    assert not both.met({"f1": 46, "exact_match": 32})
    assert both.bar == "f1 >= 45, exact_match >= 33"


def test_items_are_those_of_the_plan_each_with_a_bar_on_a_figure_that_is_shown() -> None:
    items = {each.name: each for each in all_items()}
    assert list(items) == [
        "squad-int8-300s",
        "squad-int8-1200s",
        "squad-int4-300s",
        "decode-share",
        "backprop-race",
        "directions",
        "probe-cost",
        "memory",
        "start",
        "plan",
        "determinism",
        "kill",
        "demo",
    ]
    assert all(bar.figure in each.shown for each in items.values() for bar in each.bars)
    assert all(each.bars for each in items.values())
    assert items["squad-int8-300s"].bar == "f1 >= 45, exact_match >= 33"
    assert items["kill"].bar == "identical is yes, kills >= 10"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def command_(*arguments: object, items: list[Item]) -> Result:
        app = typer.Typer()
        register(app, items=items)
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(app, words if "--model" in words else [*words, "--model", str(model)])

    return command_


def results(path: Path = Path("bench.json")) -> dict[str, Any]:
    return {result["item"]: result for result in json.loads(path.read_text())["results"]}


def test_missed_bars_are_said_plainly_and_are_no_failure(command: Callable[..., Result]) -> None:
    done = command(items=[item("fast", gives(x=1), Bar("x", "<=", 2)), item("slow", gives(x=3), Bar("x", "<=", 2))])
    assert done.exit_code == 0
    assert "1 of 2 measured items meet their bars; missed: slow." in done.stdout
    found = results()
    assert (found["fast"]["met"], found["slow"]["met"]) == (True, False)
    assert found["slow"]["figures"] == {"x": 3}
    assert found["slow"]["bar"] == "x <= 2"
    assert found["slow"]["command"] == "fwdllama something"
    assert len(found["slow"]["load_average"]) == 3


def test_a_crash_costs_its_own_result_only_and_is_a_failure(command: Callable[..., Result]) -> None:
    done = command(items=[item("bad", crashes, Bar("x", ">=", 0)), item("good", gives(x=1), Bar("x", ">=", 0))])
    assert done.exit_code == 1
    assert "crashed: bad." in done.stdout
    bad = results()["bad"]
    assert (bad["status"], bad["met"], bad["reason"]) == ("crashed", False, "nothing to divide by")
    assert "ZeroDivisionError" in bad["traceback"]
    assert results()["good"]["met"]


def test_results_are_on_disk_before_the_next_item_begins(command: Callable[..., Result]) -> None:
    seen: list[dict[str, Any]] = []

    def look(bench: Bench) -> Measured:
        seen.append(results())
        raise KeyboardInterrupt

    command(items=[item("first", gives(x=1), Bar("x", ">=", 0)), item("second", look, Bar("x", ">=", 0))])
    assert list(seen[0]) == ["first"]
    assert list(results()) == ["first"]


def test_a_later_bench_replaces_what_it_measures_and_keeps_the_rest(command: Callable[..., Result]) -> None:
    command(items=[item("a", gives(x=1), Bar("x", ">=", 2)), item("b", gives(x=1), Bar("x", ">=", 2))])
    done = command("b", items=[item("a", crashes, Bar("x", ">=", 2)), item("b", gives(x=2), Bar("x", ">=", 2))])
    assert done.exit_code == 0
    assert {name: result["met"] for name, result in results().items()} == {"a": False, "b": True}


def test_what_cannot_be_measured_is_a_result_with_the_reason(command: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = command(
        "--data-dir",
        tmp_path / "data",
        items=[item("q", gives(), Bar("x", ">=", 0), needs=("data",)), item("r", gives(), Bar("x", ">=", 0), needs=("int4",))],
    )
    assert done.exit_code == 0
    assert "skipped: q, r." in done.stdout
    assert results()["q"]["reason"] == f"{tmp_path / 'data'} has no {TRAIN_FILE}."
    assert results()["r"]["reason"].endswith("tiny.gguf has no INT4 variant.")
    assert results()["q"]["met"] is False


def test_without_the_model_everything_is_skipped_with_the_command_that_fetches_it(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))
    command("--model", "smollm2-135m", items=[item("a", crashes, Bar("x", ">=", 0))])
    assert "fetch it with: fwdllama model fetch smollm2-135m" in results()["a"]["reason"]


def test_list_tells_names_and_bars_and_measures_nothing(command: Callable[..., Result]) -> None:
    done = command("--list", items=[item("a", crashes, Bar("x", ">=", 2))])
    assert "about a; x >= 2" in done.stdout
    assert not Path("bench.json").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (["b"], UsageError, "'b' is nothing that can be measured; choose from a."),
        (["--out", "results"], UsageError, "--out is results, but must end in .json"),
        (["--out", "absent/bench.json"], ResourceError, "the folder absent does not exist; make it first."),
        (["--markdown", "absent/bench.md"], ResourceError, "the folder absent does not exist; make it first."),
        (["--seconds-scale", "0"], UsageError, "--seconds-scale is 0.0, but must be a positive number."),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(
    command: Callable[..., Result], arguments: list[str], kind: type[Exception], sentence: str
) -> None:
    done = command(*arguments, items=[item("a", crashes, Bar("x", ">=", 0))])
    assert isinstance(done.exception, kind)
    assert sentence in str(done.exception)


def test_a_folder_of_someone_else_is_not_used_for_runs(command: Callable[..., Result]) -> None:
    Path("bench").mkdir()
    Path("bench/thesis.txt").touch()
    done = command(items=[item("a", gives(x=1), Bar("x", ">=", 0))])
    assert "bench is not an earlier bench's folder" in str(done.exception)
    assert Path("bench/thesis.txt").exists()


def test_markdown_has_the_verdicts_and_the_machine(command: Callable[..., Result]) -> None:
    command("--markdown", "b.md", items=[item("a|b", gives(x=3), Bar("x", "<=", 2))])
    text = Path("b.md").read_text()
    assert "| a\\|b | about a\\|b | x 3 | x <= 2 | missed |" in text
    assert "cores" in text.splitlines()[0]


def test_a_scaled_trial_says_that_bars_are_for_whole_times(command: Callable[..., Result]) -> None:
    done = command("--seconds-scale", "0.1", items=[item("a", gives(x=1), Bar("x", ">=", 0))])
    assert "bars are for whole times, but some were scaled by 0.1" in done.stdout


def test_every_option_has_help() -> None:
    app = typer.Typer()
    register(app, items=[])
    command: Any = typer.main.get_command(app)
    assert [p.name for p in command.params if not getattr(p, "help", None)] == []


# -- the results file --------------------------------------------------------------------------------------------------


def result(name: str, status: str = "measured") -> dict[str, Any]:
    return {"item": name, "status": status}


def test_an_item_that_is_skipped_now_leaves_what_was_measured_earlier(tmp_path: Path) -> None:
    record = Record(tmp_path / "b.json", MACHINE)
    record.add(result("a"))
    record.add(result("a", "skipped"))
    record.add(result("b", "skipped"))
    assert [r["status"] for r in Record(tmp_path / "b.json", MACHINE).results] == ["measured", "skipped"]


def test_results_of_another_machine_are_not_mixed_with_those_of_this_one(tmp_path: Path) -> None:
    Record(tmp_path / "b.json", MACHINE).add(result("a"))
    with pytest.raises(UsageError, match=r"measured on another machine \(cpu Abacus 9, here Slide Rule\); name another --out"):
        Record(tmp_path / "b.json", {**MACHINE, "cpu": "Slide Rule"})


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}', '{"fwdllama_bench": 99}'])
def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="holds no results of this bench; name another --out"):
        Record(path, MACHINE)
    assert path.read_text() == content


def test_processor_is_named_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 9 @ 1 Hz\n")
    assert cpu_name(tmp_path) == "Abacus 9 @ 1 Hz"
    assert cpu_name(tmp_path / "absent")


def test_data_is_where_the_environment_says_else_beside_the_checkout() -> None:
    assert default_data({"FWDLLAMA_DATA": "some/where"}) == Path("some/where")
    found = default_data({})
    assert found is None or (found.is_dir() and found.name == "data")


def test_int4_is_a_variant_of_the_registry_only() -> None:
    assert int4_of("smollm2-135m:int8") == "smollm2-135m:int4"
    assert int4_of("models/mine.gguf") is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("probes", 12345, "probes 12,345"),
        ("loss", 1.23456, "loss 1.235"),
        ("ratio", None, "ratio \N{EN DASH}"),
        ("answer_ms", 12.34, "answer 12.34 ms"),
    ],
)
def test_figures_are_shown_with_their_units(name: str, value: Any, text: str) -> None:
    assert table.shown(name, value) == text


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_function_in_a_child_returns_fails_or_dies() -> None:
    assert in_child(math.sqrt, 16.0) == 4.0
    with pytest.raises(BenchError, match="invalid literal for int"):
        in_child(int, "x")
    with pytest.raises(BenchError, match="_exit died with exit code 3 and without a result"):
        in_child(os._exit, 3)


def test_a_command_that_fails_gives_its_last_words(bench: Bench) -> None:
    with pytest.raises(BenchError, match=r"`fwdllama train --model absent` ended with 2: error: Missing option"):
        run(bench, "train", "--model", "absent")


def test_a_command_has_its_own_memory_and_time(bench: Bench) -> None:
    ran = run(bench, "--version")
    assert ran.stdout.startswith("fwdllama ")
    assert 0.0 < ran.wall_s < 60.0
    assert 1 << 20 < ran.peak_bytes < 1 << 30


def test_a_command_is_killed_at_its_moment_or_was_done_before(bench: Bench) -> None:
    with Command(bench, "--version") as killed:
        assert killed.killed_after(0.0)
    with Command(bench, "--version") as done:
        assert not done.killed_after(60.0)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_decode_share_is_of_all_training_time(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"decode_s": 18.0, "elapsed_s": 20.0}')
    rows = [{"step": 0, "elapsed_s": 5.0, "decode_fraction": 0.8}, {"step": 1, "elapsed_s": 20.0, "decode_fraction": 0.96}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = runs.decode_shares(tmp_path)
    assert shares["decode_share"] == 0.9
    assert shares["decode_share_of_steps"] == pytest.approx((5 * 0.8 + 15 * 0.96) / 20)
    assert shares["decode_share_of_worst_step"] == 0.8


@pytest.mark.parametrize(
    ("loss", "seconds"), [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 27.5), (1.0, 30.0), (0.9, None)]
)
def test_time_to_a_loss_is_read_between_two_points_of_the_curve(loss: float, seconds: float | None) -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 2.5), (30.0, 1.0)]
    expected = 20.0 + 10.0 * (2.5 - 1.5) / 1.5 if loss == 1.5 else seconds
    assert directions.time_to(curve, loss) == (None if expected is None else pytest.approx(expected))


def test_race_compares_with_the_best_rate_at_each_loss() -> None:
    forward = [(0.0, 4.0), (60.0, 1.5), (90.0, 1.3), (200.0, 1.25)]
    slow, fast, wild = [(0.0, 4.0), (100.0, 1.3)], [(0.0, 4.0), (20.0, 1.5), (60.0, 1.31)], [(0.0, 4.0), (10.0, 1.59), (20.0, 9.0)]
    found = backprop_race.figures_of(forward, {1e-3: slow, 3e-3: fast, 1e-2: wild}, {1e-3: slow})
    assert found["ratio"] == pytest.approx(90 / 60)
    assert found["best_rate"] == 3e-3
    assert found["backprop_s"]["1.6"] == 10.0
    assert found["forward_s"]["1.2"] is None
    assert found["ratios"]["1.1"] is None
    assert found["ratio_ab"] == pytest.approx(0.9)
    assert Bar("ratio", "<=", 1.5).met(found)


def test_race_without_a_winner_meets_no_bar() -> None:
    found = backprop_race.figures_of([(0.0, 4.0), (9.0, 2.0)], {1e-3: [(0.0, 4.0), (5.0, 1.0)]}, {1e-3: [(0.0, 4.0)]})
    assert found["ratio"] is None
    assert not Bar("ratio", "<=", 1.5).met(found)


@given(n=st.integers(1, 30), seed=st.integers(0, 1000), span=st.floats(0.1, 1e4))
def test_kills_are_spread_over_the_whole_span(n: int, seed: int, span: float) -> None:
    moments = safety.kill_moments(n, seed, span)
    assert moments == safety.kill_moments(n, seed, span)
    parts = sorted(moments)
    assert all(part / n * span <= moment <= (part + 1) / n * span for part, moment in enumerate(parts))


# -- on a model of three layers ----------------------------------------------------------------------------------------


def values(steps: int) -> dict[str, Any]:
    return {
        "budget": {"steps": steps},
        "estimator": {"rounds": 2},
        "batch": {"units": 4, "per_unit": 2, "fresh": 1, "held_out": 4, "evaluate_every": 1},
        "step": {"accept": False},
        "engine": {"n_threads": 1},
    }


def test_a_probe_with_the_prompt_kept_decodes_a_fraction_of_the_tokens(bench: Bench) -> None:
    found, prompt_tokens = costs.probe_times(bench.model, bench.train_data, 2, 4)
    size = EstimatorConfig().examples_per_probe
    for times in found.values():
        assert len(times.answer_s) == len(times.all_s) == 8
        assert times.all_tokens - times.answer_tokens == pytest.approx(size * prompt_tokens)
        assert times.ratio == pytest.approx(sorted(a / b for a, b in zip(times.answer_s, times.all_s, strict=True))[3], rel=1)
    assert set(found) == {"whole", "trunk"}


def test_watched_run_begins_with_the_untrained_loss_and_has_every_step(bench: Bench) -> None:
    curve, probes = directions.watched(values(2), bench.model, bench.train_data, bench.fresh("run"))
    assert [len(curve), len(probes)] == [3, 2]
    assert curve[0][0] == 0.0
    assert 5.0 < curve[0][1] < 7.0  # ln(320) and a little
    assert curve[1][0] < curve[2][0]


@pytest.fixture
def raced(bench: Bench) -> tuple[backprop_race.Curve, backprop_race.Job]:
    folder = bench.fresh("run")
    directions.watched(values(2), bench.model, bench.train_data, folder)
    curve, job, train = backprop_race.replayed_run(folder / "run", bench.dev_data, 6)
    assert train == "b"
    return curve, job


def test_replayed_losses_are_those_that_scoring_the_adapter_finds(
    bench: Bench, raced: tuple[backprop_race.Curve, backprop_race.Job]
) -> None:
    curve, job = raced
    assert [len(curve), len(job.questions), job.n_threads] == [3, 6, 1]
    assert len({loss for _, loss in curve}) == 3
    adapter = bench.work / "run" / "adapter.gguf"
    best = int(read_adapter(adapter).metadata["fwdllama.run.step"])
    with open_engine(job.model, adapter_path=adapter, n_threads=1) as engine:
        losses = answer_dataset(engine, load_dataset(bench.dev_data), seed_template("squad"), max_new_tokens=1).losses
    assert fmean(losses[question.id] for question in job.questions) == pytest.approx(curve[best][1], abs=1e-4)


def test_both_sides_of_the_race_start_from_the_same_loss_and_backprop_lowers_it(
    raced: tuple[backprop_race.Curve, backprop_race.Job],
) -> None:
    pytest.importorskip("torch")
    curve, job = raced
    learned = backprop_race.adamw(replace(job, pool=job.questions), "b", 1e-2, 0.2)
    assert learned[0][1] == pytest.approx(curve[0][1], abs=1e-3)
    assert learned[-1][1] < learned[0][1] - 0.01
    assert 0.0 < learned[1][0] <= learned[-1][0]


def test_killed_run_that_is_resumed_equals_the_unbroken_one(bench: Bench) -> None:
    found = safety.kill(bench, n_kills=2, small=("--steps", "3", *SMALL)).figures
    assert found["identical"] is True
    assert found["kills"] == len(found["moments"]) == 2


def test_a_single_byte_makes_runs_differ(bench: Bench) -> None:
    folder = bench.fresh("run")
    directions.watched(values(1), bench.model, bench.train_data, folder)
    before = safety.digests(folder)
    ledger = folder / "run" / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes()[:-1] + b"\0")
    assert safety.digests(folder)["ledger"] != before["ledger"]
    assert safety.digests(folder)["adapter"] == before["adapter"]
