"""Bars are met by numbers on their side only, and the plan's items are all there."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fwdllama_eval.bench.cli import all_items
from fwdllama_eval.bench.measure import Bar, variant_of

from .conftest import gives, item


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
        "probe-share",
        "probe-naive",
        "throughput",
        "outside-decode",
        "probe-staged",
        "probe-examples",
        "prompt-pool",
        "plan",
        "determinism",
        "kill",
        "demo",
        "federation-load",
        "federation-memory",
        "federation-upload",
        "federation-kill",
        "federation-kill-postgresql",
        "federation-kill-devices",
        "federation-cut",
        "federation-dropout",
        "federation-hostile",
        "federation-training",
        "paper-fp16",
        "paper-int8",
        "paper-int4",
        "memory-7b-int4",
        "memory-7b-int8",
        "scaling",
    ]
    assert all(bar.figure in each.shown for each in items.values() for bar in each.bars)
    assert [name for name, each in items.items() if not each.bars] == ["throughput", "scaling"]  # of which nothing is required
    assert items["squad-int8-300s"].bar == "f1 >= 45, exact_match >= 33"
    assert items["kill"].bar == "identical is yes, kills >= 10"


def test_variants_are_those_of_the_registry_only() -> None:
    assert variant_of("smollm2-135m:int8", "int4") == "smollm2-135m:int4"
    assert variant_of("smollm2-135m", "fp16") == "smollm2-135m:fp16"
    assert variant_of("models/mine.gguf", "int4") is None
