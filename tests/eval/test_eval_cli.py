"""`fwdllama eval` and `fwdllama score`, run as a user runs them, with recorded answers in place of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from fwdllama_eval.answer import Answerer, EngineSettings, RecordedAnswerer, RecordedAnswers
from fwdllama_eval.cli import register
from typer.testing import CliRunner, Result

from fwdllama.errors import DataError, ResourceError, UsageError
from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.errors import FileError

BASE = RecordedAnswers({"a": "It is Denver.", "b": "no idea"}, {"a": 4.0, "b": 4.2}, 400, 20, 10.0)
TUNED = RecordedAnswers({"a": "Denver", "b": "the lake"}, {"a": 1.0, "b": 1.4}, 400, 6, 8.0)


class Opened:
    """Opens recorded answers and remembers what for."""

    def __init__(self, base: RecordedAnswers = BASE, tuned: RecordedAnswers = TUNED) -> None:
        self.base, self.tuned = base, tuned
        self.calls: list[tuple[EngineSettings, Path | None]] = []
        self.n_open = 0

    @contextmanager
    def __call__(self, settings: EngineSettings, adapter: Path | None) -> Iterator[Answerer]:
        assert self.n_open == 0, "one model at a time"
        self.calls.append((settings, adapter))
        self.n_open += 1
        yield RecordedAnswerer(self.base if adapter is None else self.tuned)
        self.n_open -= 1


def run(*arguments: object, opened: Opened | None = None) -> Result:
    app = typer.Typer()
    register(app, open_answerer=opened or Opened())
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    qas = [
        {"id": "a", "question": "Which city?", "answers": [{"text": "Denver", "answer_start": 0}]},
        {"id": "b", "question": "Which water?", "answers": [{"text": "lake", "answer_start": 0}]},
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": "Denver lake", "qas": qas}]}]}))
    return path


def adapter_file(tmp_path: Path, **changes: Any) -> Path:
    a, b = np.ones((8, 32), np.float32), np.ones((32, 8), np.float32)
    path = tmp_path / "adapter.gguf"
    fields: dict[str, Any] = {"scope": "answer", "invocation_tokens": (5, 6)}
    write_adapter(path, Adapter("llama", 16.0, {"blk.0.attn_q.weight": (a, b)}, **(fields | changes)))
    return path


def test_eval_of_a_base_model_prints_one_column(data: Path) -> None:
    result = run("eval", "--model", "m.gguf", "--data", data)
    assert result.exit_code == 0
    assert "base" in result.stdout
    assert "tuned" not in result.stdout
    assert "Exact match (%)" in result.stdout
    assert "answering 2 questions" in result.stderr


def test_eval_with_an_adapter_compares_with_the_base(data: Path, tmp_path: Path) -> None:
    opened = Opened()
    result = run(
        "eval", "--model", "m.gguf", "--adapter", adapter_file(tmp_path), "--data", data, "--json", opened=opened
    )
    shown = json.loads(result.stdout)
    assert shown["base"]["exact_match"] == 0.0
    assert shown["tuned"]["exact_match"] == 100.0
    assert shown["tuned"]["loss_nats_per_token"] == pytest.approx(1.2)
    assert shown["tuned"]["tokens_per_s"] == 406 / 8
    assert shown["n_questions"] == 2
    assert len(shown["adapter"]["sha256"]) == 64
    assert [adapter is None for _, adapter in opened.calls] == [False, True]


def test_no_compare_asks_the_tuned_model_only(data: Path, tmp_path: Path) -> None:
    opened = Opened()
    arguments = (
        "eval",
        "--model",
        "m.gguf",
        "--adapter",
        adapter_file(tmp_path),
        "--data",
        data,
        "--json",
        "--no-compare",
    )
    assert json.loads(run(*arguments, opened=opened).stdout)["base"] is None
    assert len(opened.calls) == 1


def test_scope_comes_from_the_adapter_and_an_override_is_said_aloud(data: Path, tmp_path: Path) -> None:
    opened, path = Opened(), adapter_file(tmp_path)
    quiet = run("eval", "--model", "m.gguf", "--adapter", path, "--data", data, opened=opened)
    loud = run("eval", "--model", "m.gguf", "--adapter", path, "--data", data, "--scope", "all", opened=opened)
    assert opened.calls[0][0].scope == "answer"
    assert opened.calls[2][0].scope == "all"
    assert "warning" not in quiet.stderr
    assert "warning: the adapter was trained with scope answer, but is scored with scope all as asked." in loud.stderr


def test_template_is_the_one_that_the_adapter_was_trained_with(data: Path, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, metadata={"fwdllama.template": "chat"})
    opened = Opened()
    run("eval", "--model", "m.gguf", "--adapter", path, "--data", data, opened=opened)
    run("eval", "--model", "m.gguf", "--adapter", path, "--data", data, "--template", "seed", opened=opened)
    assert [settings.template for settings, _ in opened.calls] == ["chat", "chat", "seed", "seed"]


def test_options_reach_the_engine(data: Path) -> None:
    opened = Opened()
    run("eval", "--model", "m.gguf", "--data", data, "--batch", 3, "--ctx", 99, "--threads", 1, opened=opened)
    assert opened.calls[0][0] == EngineSettings(Path("m.gguf"), batch=3, n_ctx=99, n_threads=1)


def test_limit_asks_the_first_questions_only(data: Path) -> None:
    assert (
        json.loads(run("eval", "--model", "m.gguf", "--data", data, "--limit", 1, "--json").stdout)["n_questions"] == 1
    )


def test_predictions_that_eval_writes_are_read_and_scored_the_same_by_score(data: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.json"
    result = run(
        "eval",
        "--model",
        "m.gguf",
        "--adapter",
        adapter_file(tmp_path),
        "--data",
        data,
        "--json",
        "--predictions",
        said,
    )
    scores = json.loads(run("score", said, "--data", data, "--json").stdout)
    assert json.loads(said.read_text()) == dict(TUNED.predictions)
    assert scores["f1"] == json.loads(result.stdout)["tuned"]["f1"]


def test_html_report_is_written_beside_the_table(data: Path, tmp_path: Path) -> None:
    html = tmp_path / "eval.html"
    result = run("eval", "--model", "m.gguf", "--adapter", adapter_file(tmp_path), "--data", data, "--html", html)
    assert result.exit_code == 0
    text = html.read_text(encoding="utf-8")
    assert "m with adapter.gguf" in text
    assert "Which city?" in text


def test_questions_without_an_answer_are_warned_about(data: Path) -> None:
    result = run("eval", "--model", "m.gguf", "--data", data, opened=Opened(RecordedAnswers({"a": "Denver"})))
    assert "warning: 1 of 2 questions got no answer: 1 without a recorded answer." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (["--scope", "all"], UsageError, "--scope all says where an adapter is on, but no --adapter was given."),
        (["--html", "absent/e.html"], ResourceError, "the folder absent does not exist; make it first."),
        (["--predictions", "."], ResourceError, "is a folder, but a file to write was expected."),
        (["--adapter", "absent.gguf"], FileError, "absent.gguf"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_opened(
    data: Path, arguments: list[str], kind: type[Exception], sentence: str
) -> None:
    opened = Opened()
    result = run("eval", "--model", "m.gguf", "--data", data, *arguments, opened=opened)
    assert isinstance(result.exception, kind)
    assert sentence in str(result.exception)
    assert opened.calls == []


def test_unknown_data_is_an_error_of_the_data(tmp_path: Path) -> None:
    result = run("eval", "--model", "m.gguf", "--data", tmp_path / "absent.json")
    assert isinstance(result.exception, DataError)


def test_score_warns_of_missing_predictions_and_prints_official_names(data: Path, tmp_path: Path) -> None:
    said = tmp_path / "p.json"
    said.write_text('{"a": "Denver"}')
    result = run("score", said, "--data", data)
    assert "Exact match" in result.stdout
    assert "50.0000" in result.stdout
    assert "warning: 1 of 2 questions have no prediction and are scored 0, such as 'b'." in result.stderr
    v2 = run("score", said, "--data", data, "--version", "2.0", "--json")
    assert json.loads(v2.stdout)["exact"] == 100.0
    assert "are left out" in v2.stderr


def test_score_takes_probabilities_for_v2_only(data: Path, tmp_path: Path) -> None:
    said, doubts = tmp_path / "p.json", tmp_path / "na.json"
    said.write_text('{"a": "Denver", "b": "x"}')
    doubts.write_text('{"a": 0.1, "b": 0.9}')
    refused = run("score", said, "--data", data, "--na-probs", doubts)
    assert isinstance(refused.exception, UsageError)
    scores = json.loads(run("score", said, "--data", data, "--na-probs", doubts, "--version", "2.0", "--json").stdout)
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50.0, 0.1)


@pytest.mark.parametrize("system", ["logistic-regression", "bert-ensemble"])
def test_score_prints_the_published_figures_to_the_last_digit(data_dir: Path, system: str) -> None:
    expected = json.loads((data_dir / "squad-dev-sample.expected.json").read_text())[system]
    said = data_dir / f"squad-dev-sample.predictions-{system}.json.gz"
    scores = json.loads(run("score", said, "--data", data_dir / "squad-dev-sample.json.gz", "--json").stdout)
    assert {name: scores[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["eval", "score"])
def test_every_option_has_help(command: str) -> None:
    app = typer.Typer()
    register(app)
    group = typer.main.get_command(app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    assert [p.name for p in parameters if not getattr(p, "help", None)] == []
