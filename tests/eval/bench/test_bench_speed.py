"""Times are taken in turns and divided by what was done in them; which size of a probe is best follows from slopes and times alone."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fwdllama_eval.bench import examples as sizes
from fwdllama_eval.bench import speed
from fwdllama_eval.bench.child import run
from fwdllama_eval.bench.examples import State, expected, figures_of
from fwdllama_eval.bench.measure import Bench
from fwdllama_eval.bench.runs import train_words
from fwdllama_eval.bench.speed import BATCH, alternating, naive_times, random_examples, share_times, short_pairs, throughputs


def test_doctests() -> None:
    assert doctest.testmod(sizes).failed == 0


def test_every_act_has_its_turn_in_every_round_and_the_first_round_does_not_count() -> None:
    turns: list[tuple[str, int]] = []
    seconds = alternating({"a": lambda turn: turns.append(("a", turn)), "b": lambda turn: turns.append(("b", turn))}, 2)
    assert turns == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert sorted(seconds) == ["a", "b"]


def test_random_examples_are_of_one_length_and_of_the_models_tokens() -> None:
    drawn = random_examples(BATCH, 50)
    assert {(len(e.prompt), len(e.invocation), len(e.target)) for e in drawn} == {(160, 2, 7)}
    assert all(3 <= token < 50 for e in drawn for token in (*e.prompt, *e.invocation, *e.target))


def test_a_probes_share_its_naive_twin_and_its_throughput_are_measured_on_any_model(bench: Bench) -> None:
    share, naive = share_times(bench.model), naive_times(bench.model)
    assert share["n_places"] == BATCH  # thetas did stand side by side
    assert min(share.values()) > 0
    assert naive["naive"] > naive["ours"]
    assert set(throughputs(bench.model)) == {"probes", "raw"}


def test_the_pairs_for_large_models_are_a_data_set(tmp_path: Path) -> None:
    lines = short_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 60
    assert json.loads(lines[0]) == {"prompt": "Which number comes after 100?", "answer": "It is 101"}


def test_the_model_of_squares_is_exact_where_examples_agree_or_are_independent() -> None:
    assert [expected({1: 5.0, 8: 5.0}, size) for size in (1, 2, 4, 8)] == pytest.approx([5.0] * 4)
    assert [expected({1: 8.0, 8: 1.0}, size) for size in (1, 2, 4, 8)] == pytest.approx([8.0, 4.0, 2.0, 1.0])


def test_figures_name_the_best_size_the_models_error_and_what_the_default_costs() -> None:
    linear = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    found = [State(4.0, {1: 4.0, 2: 3.0, 4: 2.5, 8: 2.25}, linear), State(1.0, {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, {1: 1.0, 2: 1.5, 4: 2.0, 8: 5.0})]
    figures = figures_of(found, 4)
    assert (figures["untrained_best"], figures["trained_best"], figures["trained_recommended"]) == (1, 4, 4)
    assert figures["model_error"] == pytest.approx(0.0, abs=1e-12)
    assert figures["default_above_best"] == pytest.approx(2.5)  # a default of four, untrained: 2.5 x 4 against 4 x 1
    assert figures_of([found[0], replace(found[1], squares={1: 8.0, 2: 4.0, 4: 4.0, 8: 1.0})], 4)["model_error"] == pytest.approx(0.5)


def test_slopes_and_times_of_all_sizes_are_taken_at_both_ends_of_a_run(bench: Bench) -> None:
    run(bench, *train_words(bench, bench.work, "--steps", 2, "--held-out", 2))
    before, after = sizes.states(bench.model, bench.train_data, bench.work / "run")
    assert before.loss != after.loss
    for state in (before, after):
        assert set(state.squares) == set(state.seconds) == set(sizes.SIZES)
        assert min(*state.squares.values(), *state.seconds.values()) > 0
        assert state.squares[1] > state.squares[8]


def test_time_outside_the_engine_is_held_against_what_a_model_of_its_size_is_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STEPS", 1)
    figures = speed.outside_decode(bench).figures
    assert figures["allowed"] == 0.06
    assert figures["of_allowed"] == pytest.approx(figures["outside"] / 0.06)
    assert figures["outside_of_worst_step"] == pytest.approx(figures["outside"])  # of one step the mean is the worst
    assert 0 < figures["outside"] < 1
