from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.parametrize("arguments", [["resume", "--help"], ["doctor", "--help"], ["--version"], ["model", "list"]])
def test_what_needs_no_model_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from fwdllama.cli.main import run\n"
        f"assert run({arguments!r}) == 0\n"
        f"print('\\n' + json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert json.loads(printed.splitlines()[-1]) == []


def test_every_option_has_help() -> None:
    def missing(command: object, path: str) -> list[str]:
        found = [f"{path} {p.name}" for p in command.params if not getattr(p, "help", None)]  # type: ignore[attr-defined]
        for name, child in getattr(command, "commands", {}).items():
            found += missing(child, f"{path} {name}")
        return found

    assert missing(typer.main.get_command(main.application()), "fwdllama") == []
