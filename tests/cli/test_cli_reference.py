from __future__ import annotations

from pathlib import Path

from .conftest import Run

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_command_reference_is_current(run: Run) -> None:
    result = run("reference")
    assert result.code == 0
    assert DOCUMENT.read_text(encoding="utf-8") == result.out, "write it anew: fwdllama reference > docs/cli.md"


def test_command_reference_has_every_command_and_its_defaults(run: Run) -> None:
    text = run("reference").out
    for command in (
        "train",
        "resume",
        "answer",
        "eval",
        "score",
        "model fetch",
        "model list",
        "calibrate",
        "doctor",
        "demo",
    ):
        assert f"\n## fwdllama {command}\n" in text
    assert "| `--rank` N | Rank of each adapted matrix. Default: " in text
    assert "| `--mmap` / `--no-mmap` |" in text
    assert "**Required.**" in text
    assert "## fwdllama reference" not in text
