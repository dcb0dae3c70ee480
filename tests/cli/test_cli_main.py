from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fwdllama import __version__
from fwdllama.cli import main

from .conftest import Run

HEAVY = ("numpy", "llama_cpp", "gguf", "jinja2", "fwdllama.config", "fwdllama.training", "fwdllama.answering")


def test_no_arguments_show_what_there_is(run: Run) -> None:
    result = run()
    assert result.code == 0
    for command in ("demo", "train", "resume", "answer", "eval", "score", "model", "calibrate", "doctor"):
        assert f" {command} " in result.out
    assert "reference" not in result.out
    assert result.err == ""


def test_version_is_printed_to_stdout(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out, result.err) == (0, f"fwdllama {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "No such command 'bogus'. See `fwdllama --help`."),
        (["--bogus"], "No such option: --bogus. See `fwdllama --help`."),
        (["model"], "Missing command. See `fwdllama model --help`."),
        (["train"], "Missing option '--model'. See `fwdllama train --help`."),
        (["resume"], "Missing argument 'run'. See `fwdllama resume --help`."),
    ],
)
def test_what_cannot_be_parsed_is_one_line_and_exit_code_2(run: Run, arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.err == f"error: {sentence}\n"
    assert result.out == ""


def test_debug_may_stand_anywhere_and_shows_the_traceback(run: Run) -> None:
    plain = run("resume", "nowhere")
    assert "Traceback" not in plain.err
    for arguments in (("--debug", "resume", "nowhere"), ("resume", "nowhere", "--debug")):
        result = run(*arguments)
        assert result.code == 1
        assert "Traceback" in result.err
        assert result.error == plain.error


def test_debug_shows_the_words_of_llama_cpp(run: Run, model: Path) -> None:
    question = ("answer", "--model", model, "--prompt", "hi", "--threads", 1, "--max-new-tokens", 1)
    quiet = run(*question)
    loud = run("--debug", *question)
    assert quiet.err == ""
    assert "debug: llama_model_loader" in loud.err
    assert quiet.out == loud.out


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs another package with a command `fail`, whose module is the given source."""

    def install(source: str) -> None:
        info = tmp_path / "plugin" / "plugin_of_test-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-test\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[fwdllama.commands]\nfail = plugin_of_test:register\n")
        (info.parent / "plugin_of_test.py").write_text(source)
        monkeypatch.syspath_prepend(info.parent)
        monkeypatch.delitem(sys.modules, "plugin_of_test", raising=False)

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("fwdllama.errors.DataError('the data is bad.')", 1, "error: the data is bad."),
        ("fwdllama.errors.UsageError('--x is 1.')", 2, "error: --x is 1."),
        ("gguf_tools.errors.FileError('m.gguf: does not exist.')", 1, "error: m.gguf: does not exist."),
        (
            "KeyError('lost')",
            1,
            "error: unexpected KeyError: 'lost'. Run it again with --debug to see where, and report it.",
        ),
        ("KeyboardInterrupt()", 130, ""),
    ],
)
def test_every_exception_of_a_command_becomes_a_line_and_a_code(
    run: Run, plugin: Callable[[str], None], error: str, code: int, line: str
) -> None:
    plugin(
        "import fwdllama.errors, gguf_tools.errors\n\n\n"
        "def register(app):\n    @app.command('fail')\n    def fail():\n"
        f"        raise {error}\n"
    )
    result = run("fail")
    assert result.code == code
    assert result.err.rstrip("\n") == line
    assert result.out == ""


def test_a_plugin_that_cannot_be_loaded_is_a_warning_and_the_rest_works(
    run: Run, plugin: Callable[[str], None]
) -> None:
    plugin("import absent_package\n")
    result = run("--help")
    assert result.code == 0
    reason = "No module named 'absent_package'"
    assert result.err == f"warning: the command fail (plugin_of_test:register) cannot be loaded: {reason}.\n"
    assert run("resume", "--help").err == "", "a command of ours loads no plugin"


LIGHT = (["resume", "--help"], ["doctor", "--help"], ["gguf", "merge", "--help"], ["--version"], ["model", "list"])
PROGRAM = f"""
import json, sys
from fwdllama.cli.main import run
for arguments in {LIGHT!r}:
    code = run(arguments)
    print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]), file=sys.stderr)
"""


def test_what_needs_no_model_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stderr.splitlines()] == [[0, []]] * len(LIGHT)


def test_only_the_command_that_is_named_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*words: str) -> dict[str, Any]:
        group: Any = typer.main.get_command(main.fitted(words))
        return {name: sorted(getattr(command, "commands", {})) for name, command in group.commands.items()}

    assert made("resume", "--help") == {"resume": []}
    assert made("--debug", "gguf", "merge", "model", "a.gguf") == {"gguf": ["merge"]}
    assert made("gguf", "peft", "to-gguf") == {"gguf": ["peft"]}
    assert made("score") == {"score": []}, "also where another package has it"
    everything = made("--help")
    assert {"train", "score", "gguf"} <= everything.keys()
    assert made("bogus") == made("reference") == everything
    assert made("gguf", "bogus") == {"gguf": everything["gguf"]}


def options() -> Iterator[tuple[str, Any]]:
    """Every option of every command."""

    def of(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield from ((path, parameter) for parameter in command.params)
        for name, child in getattr(command, "commands", {}).items():
            yield from of(child, f"{path} {name}")

    yield from of(typer.main.get_command(main.application()), "fwdllama")


def test_every_option_has_help() -> None:
    assert [f"{path} {option.name}" for path, option in options() if not getattr(option, "help", None)] == []


def test_what_is_written_is_named_by_out_whatever_the_command() -> None:
    named = {path: option.opts for path, option in options() if {"-o", "--out", "--output"} & set(option.opts)}
    assert {path: opts for path, opts in named.items() if "--out" not in opts} == {}
    assert {opts[-1] for path, opts in named.items() if path.startswith("fwdllama gguf ")} == {"-o"}
