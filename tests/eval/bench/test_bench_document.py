"""The benchmarks' document comes from results alone: its tables, its plots, and what it says of what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from fwdllama_eval.bench.curve import Point
from fwdllama_eval.bench.docs import register
from fwdllama_eval.bench.paper import headline, row_of
from fwdllama_eval.bench.record import FORMAT
from typer.testing import CliRunner, Result

from fwdllama.errors import UsageError
from fwdllama.formats import MISSING

MACHINE = {
    "cpu": "Some | CPU", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux 6 x86_64", "python": "3.11.7",
    "versions": {"fwdllama": "0.1.0", "torch": None},
}  # fmt: skip


def paper_figures() -> dict[str, Any]:
    scored = {"f1": 41.25, "exact_match": 30.0, "loss": 1.3}
    fast = row_of([Point(0.0, 4.0), Point(10.0, 1.25, 320)], 900 << 20, scored)
    slow = row_of([Point(0.0, 4.0), Point(30.0, 1.5, 900), Point(60.0, 1.28, 2400)], 300 << 20, scored)
    rows = {
        "forward-only, answer": {**slow, "upload_bytes": 900, "setup_s": 12.2},
        "torch, answer": {**fast, "upload_bytes": 4 * 129024, "upload_all_bytes": 8 * 129024},
    }
    return {**headline(rows), "base": {"f1": 13.8, "exact_match": 0.5}, "rows": rows}


def scaling_figures() -> dict[str, Any]:
    names = ("tokens_answer", "tokens_all", "sizes", "sizes_each", "ranks", "firsts_whole", "firsts_top", "probes")
    return {"one_of_16": 1.3, "curves": {name: [(1, 10.0), (2, 20.0)] for name in names}}


def memory_figures() -> dict[str, Any]:
    return {
        "model_bytes": 3_825_000_000, "whole_bytes": 4_310_000_000, "kv_type": "q8_0", "limited_by": "cgroup v1", "limit_bytes": 5_000_000_000,
        "staged_bytes": 1_460_000_000, "staged_options": "slices of 8 layers", "staged_plan_error": 0.02,
        "eval_bytes": 4_300_000_000, "ratio": 1.0023, "plan_error": 0.031,
    }  # fmt: skip


def result(item: str, figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "item": item, "what": f"about {item}", "status": "measured", "figures": figures, "bar": "x <= 1", "met": True, "reason": None,
        "began": "2026-01-02 03:04:05", "seconds_scale": 1.0, "commit": "abc123", **more,
    }  # fmt: skip


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the document of some results into the current folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    register(app)

    def write(*results: dict[str, Any], out: str = "benchmarks.md") -> Result:
        Path("bench.json").write_text(json.dumps({"fwdllama_bench": FORMAT, "machine": MACHINE, "results": results}))
        return CliRunner().invoke(app, ["--out", out])

    return write


def test_document_has_every_figure_of_the_results_and_the_machine_commit_and_day(written: Any) -> None:
    written(
        result("paper-int8", paper_figures()), result("memory-7b-int4", memory_figures()), result("scaling", scaling_figures(), began="2026-01-04")
    )
    text = Path("benchmarks.md").read_text()
    assert "Some | CPU, 2 cores, 8.0 GiB of memory; Linux 6 x86_64, Python 3.11.7, fwdllama 0.1.0." in text
    assert "Measured 2026-01-02 to 2026-01-04, commit abc123." in text
    assert f"| none (the base) | {MISSING} |" in text
    assert "| forward-only, answer | 300 MiB | 12 | 30 (900) | 60 (2,400) | not reached (2,400) | 1.28 | 41.2 | 30.0 | 900 bytes |" in text
    assert f"| torch, answer | 900 MiB | {MISSING} | 10 (320) | 10 (320) | not reached (320) | 1.25 | 41.2 | 30.0 | 504 KiB (1.0 MiB wit" in text
    assert "| INT4 | 3.83 | 4.31 (KV q8_0) | 5.00, cgroup v1 | 1.46 | slices of 8 layers | 4.30 | 1.002 | 3.1 %, 2.0 % |" in text
    assert "| paper-int8 | about paper-int8 |" in text
    assert "Not measured yet" not in text


def test_plots_are_there_for_what_was_measured_and_are_whole_files(written: Any) -> None:
    Path("benchmarks").mkdir()
    Path("benchmarks/loss-int4.svg").write_text("of an earlier document")
    written(result("paper-int8", paper_figures()), result("scaling", scaling_figures()))
    text = Path("benchmarks.md").read_text()
    names = {path.name for path in Path("benchmarks").iterdir()}
    assert names == {
        "loss-int8.svg", "memory-int8.svg", "scaling-tokens.svg", "scaling-examples.svg", "scaling-layers.svg", "scaling-rank.svg",
        "scaling-probes.svg",
    }  # fmt: skip
    for name in names:
        assert f"(benchmarks/{name})" in text
        root = ElementTree.parse(Path("benchmarks") / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in (root.findtext("{http://www.w3.org/2000/svg}style") or "")
    assert "forward-only, answer" in Path("benchmarks/loss-int8.svg").read_text()


def test_what_was_not_measured_is_said_with_the_command_that_does(written: Any) -> None:
    failed = {**result("memory-7b-int4", {}), "status": "crashed", "reason": "it was killed"}
    written(failed)
    text = Path("benchmarks.md").read_text()
    for command in ("paper-fp16 paper-int8 paper-int4", "memory-7b-int4 memory-7b-int8", "scaling"):
        assert f"Not measured yet: `fwdllama bench {command}`" in text
    assert "it was killed" in text


def test_the_same_results_give_the_same_bytes(written: Any) -> None:
    written(result("scaling", scaling_figures()))
    first = {path: path.read_bytes() for path in [Path("benchmarks.md"), *Path("benchmarks").iterdir()]}
    written(result("scaling", scaling_figures()))
    assert {path: path.read_bytes() for path in first} == first


def test_results_that_are_none_and_a_document_that_is_no_markdown_are_refused(written: Any) -> None:
    assert str(written(out="benchmarks.html").exception).startswith("--out is benchmarks.html, but must end in .md")
    Path("bench.json").write_text("{}")
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, ["--out", "benchmarks.md"])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == "bench.json holds no results of this bench; name another file."
    assert not Path("benchmarks.md").exists()
