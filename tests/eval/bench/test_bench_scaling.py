"""Curves of a probe's cost: a point for every size, and ratios from the right points."""

from __future__ import annotations

from pathlib import Path

import pytest
from fwdllama_eval.bench import scaling


@pytest.mark.service
def test_every_curve_has_a_positive_cost_at_each_size_and_the_parts_are_removed(model: Path, tmp_path: Path) -> None:
    found = scaling.curves(str(model), tmp_path, n_timed=1)
    assert [x for x, _ in found["tokens_all"]] == list(scaling.TOKENS)
    assert [x for x, _ in found["sizes"]] == list(scaling.SIZES)
    assert [x for x, _ in found["firsts_whole"]] == [0, 1, 2]
    assert [x for x, _ in found["firsts_top"]] == [1, 2]  # nothing lies below layer 0
    assert all(ms > 0 for name, curve in found.items() if isinstance(curve, list) for _, ms in curve)
    assert found["probes"][0][1] == pytest.approx(found["load_ms"] + found["probe_ms"])
    assert list(tmp_path.rglob("*.gguf")) == []


def test_ratios_are_of_one_example_against_sixteen_and_of_the_first_cut_behind_three_fifths() -> None:
    found = {
        "sizes": [(1, 10.0), (16, 80.0)],
        "firsts_whole": [(0, 40.0), (18, 42.0), (24, 40.0)],
        "firsts_top": [(18, 20.0), (24, 8.0)],
        "n_layers": 30,
        "probe_ms": 1.0,
        "load_ms": 2.0,
    }
    figures = scaling.figures_of(found)
    assert figures["one_of_16"] == 2.0
    assert figures["top_third_gain"] == 2.1
    assert scaling.figures_of({**found, "firsts_top": []})["top_third_gain"] is None
