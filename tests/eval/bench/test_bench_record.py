"""The results file keeps what was measured on this machine, and what is in it can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fwdllama_eval.bench import table
from fwdllama_eval.bench.record import Record, cpu_name

from fwdllama.errors import UsageError

MACHINE = {"cpu": "Abacus 9", "cores": 2, "memory_bytes": 8 << 30}


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
    with pytest.raises(UsageError, match="holds no results of this bench; name another file"):
        Record(path, MACHINE)
    assert path.read_text() == content


def test_processor_is_named_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 9 @ 1 Hz\n")
    assert cpu_name(tmp_path) == "Abacus 9 @ 1 Hz"
    assert cpu_name(tmp_path / "absent")


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
