"""Reports of training runs: complete, escaped, self-contained, and calm about what is missing."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.drawing import nice_ticks, thinned
from fwdllama.formats import change, clock, flat, number, size
from fwdllama.plots import loss_figure, pacing_figure, score_figure, slope_figure
from fwdllama.report import AdapterFacts, AnswerPair, RunSummary, excerpt, render, verdict, write_report
from gguf_tools.errors import FileError

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "img", "hr", "input", "link"}


def rows(n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "elapsed_s": 9.0 * (i + 1),
            "n_probes": 256,
            "n_probes_gate": 250 + i,
            "loss": 4.0 / (i + 1),
            "held_out_loss": 4.1 / (i + 1) if i % 4 == 0 else None,
            "projected_gradient_rms": 1.0,
            "accepted": i != 5,
            "lr": 2.0,
            "tokens_per_s": 385.0,
            "peak_memory_bytes": 431 << 20,
            "decode_fraction": 0.94,
        }
        for i in range(n)
    ]


def summary(**changes: Any) -> RunSummary:
    facts = AdapterFacts("out/adapter.gguf", 741_216, "sha256:9f2c", "answer")
    pair = AnswerPair("What do otters wrap?", "Otters wrap pups in kelp fronds.", "They wrap pups.", "pups", ("pups",))
    defaults: dict[str, Any] = {
        "title": "A run",
        "when": "22 November 2026",
        "metrics": rows(),
        "config": {"space": {"rank": 8}, "scope": "answer"},
        "environment": {"python": "3.11"},
        "scores_before": {"exact_match": 1.0, "f1": 18.3},
        "scores_after": {"exact_match": 33.4, "f1": 46.2},
        "examples": [pair],
        "adapter": facts,
        "next_commands": [("Ask it something", "fwdllama answer --adapter out/adapter.gguf")],
    }
    return RunSummary(**(defaults | changes))


class Page(HTMLParser):
    """Tags with their attributes, and a check that they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_report_shows_scores_losses_answers_adapter_and_commands() -> None:
    html = render(summary())
    for text in [
        "46.2",
        "from 18.3, +27.9",
        "Held-out loss",
        "12 steps, 1 rejected",
        "3,072",
        "431 MiB",
        "94% of the time",
    ]:
        assert text in html
    for text in ["What do otters wrap?", "They wrap pups.", "out/adapter.gguf", "724 KiB", "sha256:9f2c", "space.rank"]:
        assert text in html
    assert "fwdllama answer --adapter out/adapter.gguf" in html
    assert html.count("<svg") == 6


def test_report_is_well_formed() -> None:
    assert Page(render(summary())).open == []


def test_report_asks_nothing_of_the_network_and_runs_nothing() -> None:
    html = render(summary())
    page = Page(html)
    assert page.names().isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    assert not [a for _, attrs in page.tags for a in attrs if a in ("src", "href", "xlink:href") or a.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", html)
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_report_has_dark_colours_and_a_phone_layout() -> None:
    html = render(summary())
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media (max-width: 760px)" in html
    assert 'name="viewport"' in html


def test_every_text_from_outside_is_escaped() -> None:
    html = render(
        summary(
            title=EVIL,
            when=EVIL,
            config={EVIL: {EVIL: EVIL}},
            environment={EVIL: [EVIL]},
            scores_before={EVIL: 1.0},
            scores_after={EVIL: 2.0},
            examples=[
                AnswerPair(EVIL, f"before {EVIL} after", EVIL, EVIL, (EVIL,)),
                AnswerPair(EVIL, EVIL, None, EVIL, ()),
            ],
            adapter=AdapterFacts(EVIL, 1, EVIL, "all"),
            next_commands=[(EVIL, EVIL)],
        )
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 14


def test_same_run_gives_the_same_bytes() -> None:
    assert render(summary()) == render(summary())


def test_scope_answer_warns_about_other_runtimes_and_scope_all_does_not() -> None:
    warning = "For such a runtime train with --scope all."
    assert warning in render(summary())
    assert warning not in render(summary(adapter=AdapterFacts("a", 1, "d", "all")))


def test_report_of_a_run_that_has_done_nothing_still_renders() -> None:
    empty = RunSummary("Empty", "now", [])
    page = Page(render(empty))
    assert page.open == []
    assert "svg" not in page.names()


def test_metrics_that_are_missing_or_not_finite_show_as_dashes_and_gaps() -> None:
    broken = [
        {"step": 1, "loss": math.nan, "elapsed_s": 1.0},
        {"step": 2},
        {"step": 3, "loss": 2.5, "elapsed_s": math.inf},
    ]
    html = render(summary(metrics=broken))
    assert ">nan" not in html
    assert "nan " not in html
    assert "\N{EN DASH}" in html
    assert loss_figure(broken, over="time") is None


def test_write_report_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    write_report(summary(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileError, match=r"cannot be written"):
        write_report(summary(), tmp_path / "absent" / "report.html")


def test_loss_over_probes_adds_the_probes_of_the_steps() -> None:
    figure = loss_figure(rows(3), over="probes")
    assert figure is not None
    assert ("quiet", "training batch") in figure.legend
    assert "Probes so far: 256)" in figure.svg  # the held-out point of step 1


def test_rejected_steps_are_marked_in_the_loss_plot() -> None:
    figure = loss_figure(rows(), over="time")
    assert figure is not None
    assert ("limit ring", "step rejected") in figure.legend
    assert figure.svg.count("step rejected:") == 1
    without = loss_figure(rows(4), over="time")
    assert without is not None
    assert "step rejected" not in [label for _, label in without.legend]


@pytest.mark.parametrize(("seconds", "unit"), [(90, "s"), (600, "min"), (40_000, "h")])
def test_time_axis_has_the_unit_that_suits_the_run(seconds: float, unit: str) -> None:
    figure = loss_figure([{"elapsed_s": 1.0, "loss": 2.0}, {"elapsed_s": seconds, "loss": 1.0}], over="time")
    assert figure is not None
    assert f"Training time ({unit})" in figure.svg


def test_pacing_without_a_gate_draws_probes_alone() -> None:
    figure = pacing_figure([{"step": i, "n_probes": 64, "n_probes_gate": None} for i in range(5)])
    assert figure is not None
    assert figure.legend == (("main", "probes taken"),)


def test_a_single_step_and_a_constant_can_be_drawn() -> None:
    figure = slope_figure([{"step": 1, "projected_gradient_rms": 0.0}])
    assert figure is not None
    assert "<svg" in figure.svg


def test_scores_without_a_base_draw_one_bar_each() -> None:
    figure = score_figure({}, {"f1": 40.0, "exact_match": 30.0})
    assert figure is not None
    assert figure.legend == (("main block", "tuned"),)
    assert figure.svg.count("<rect") == 2 + 2  # pygal's two backgrounds and two bars


def test_long_runs_are_thinned_to_what_can_be_seen() -> None:
    figure = loss_figure(rows(5000), over="time")
    assert figure is not None
    assert len(figure.svg) < 120_000


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_mean_within_the_range(points: list[tuple[float, float]], limit: int) -> None:
    kept = thinned(points, limit)
    assert len(kept) == min(limit, len(points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    assert all(low - 1e-6 <= y <= high + 1e-6 for _, y in kept)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_enclose_the_data_and_are_few(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1e-12, ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8


def test_excerpt_marks_the_answer_as_a_whole_word_and_cuts_at_words() -> None:
    context = "In 1995 many came. " * 30 + "There were 9 of them, said the keeper. " + "Then it rained again. " * 30
    text = str(excerpt(AnswerPair("How many?", context, None, None, ("9",)), limit=80))
    assert "were <mark>9</mark> of" in text
    assert text.startswith("… ")
    assert text.endswith(" …")
    assert all(word in context for word in re.sub(r"</?mark>|…", "", text).split())


@given(st.text(max_size=400), st.text(max_size=20), st.integers(1, 100))
def test_excerpt_never_lets_markup_through(context: str, truth: str, limit: int) -> None:
    text = str(excerpt(AnswerPair("q", context, None, None, (truth,)), limit))
    assert "<" not in text.replace("<mark>", "").replace("</mark>", "")
    assert text.count("<mark>") == text.count("</mark>") <= 1


def test_verdicts_follow_squad() -> None:
    assert verdict("the pups.", ("pups",)) == "exact"
    assert verdict("pups and cubs", ("pups",)) == "F1 50"
    assert verdict("", ()) == "exact"
    assert verdict("pups", ()) == "F1 0"


def test_numbers_are_printed_with_units_and_dashes() -> None:
    assert (size(999), size(1 << 20), size(5 << 30), size(None)) == ("999 bytes", "1.0 MiB", "5.0 GiB", "\N{EN DASH}")
    assert (clock(59.6), clock(3_725), clock(math.nan)) == ("1:00", "1:02:05", "\N{EN DASH}")
    assert (number(1234.5, 1), change(2.0, 1.5, 2)) == ("1,234.5", "\N{MINUS SIGN}0.50")
    assert flat({"a": {"b": {}}, "c": ()}) == [("a.b", "none"), ("c", "none")]


def test_importing_the_plots_leaves_no_import_hook_behind() -> None:
    code = "import sys, fwdllama.plots; print([f for f in sys.meta_path if not hasattr(f, 'find_spec')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
