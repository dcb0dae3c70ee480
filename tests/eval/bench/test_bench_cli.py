"""The bench tells what it found: bars missed, items skipped and crashed, and nothing that was measured is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from fwdllama_eval.bench.cli import default_data, register
from fwdllama_eval.bench.measure import TRAIN_FILE, Bar, Bench, Item, Measured
from typer.testing import CliRunner, Result

from fwdllama.errors import ResourceError, UsageError

from .conftest import gives, item


def crashes(bench: Bench) -> Measured:
    raise ZeroDivisionError("nothing to divide by")


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


def test_data_is_where_the_environment_says_else_beside_the_checkout() -> None:
    assert default_data({"FWDLLAMA_DATA": "some/where"}) == Path("some/where")
    found = default_data({})
    assert found is None or (found.is_dir() and found.name == "data")
