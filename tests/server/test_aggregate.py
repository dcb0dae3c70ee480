"""From results to the ledger's entry: weights, copies, rules, and that nothing depends on who came first."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from fwdllama_server.aggregate import Contribution, Learner, bounded_slopes, merge, pooled, problem, slopes, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fwdllama.federation.message import TrainResult
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.toy import toy_run

EPS = 0.01
DIGEST = "0" * 64


def spec(*, copies: int = 1, sided: str = "two", pacing: dict[str, Any] | None = None, **aggregation: Any) -> RunSpec:
    train = {"estimator": {"sided": sided, "examples_per_probe": 4}, **({"pacing": pacing} if pacing else {})}
    shape = {"probes": 8, "most": 32, "probes_per_task": 4, "copies": copies}
    made, _ = toy_run("toy", 8, eps=EPS, train=train, round=shape, aggregation=aggregation)
    return made


def result(values: list[float], *, examples: tuple[int, ...] = (4,), loss: float = 2.0) -> TrainResult:
    """Two-sided losses around `loss` whose slopes are `values`."""
    plus, minus = ([loss + sign * EPS * v for v in values] for sign in (1, -1))
    return TrainResult(theta_digest=DIGEST, plus=plus, minus=minus, examples=examples, loss=loss, n_tokens=9)


def contribution(first: int, values: list[float], *, device: str = "a", lag: int = 0, **more: Any) -> Contribution:
    return Contribution(device, np.arange(first, first + len(values), dtype=np.uint64), result(values, **more), lag)


def test_slopes_are_central_differences() -> None:
    assert slopes(contribution(0, [1.0, -2.0, 0.5]), spec()) == pytest.approx([1.0, -2.0, 0.5])


def test_one_sided_slopes_are_taken_against_the_group_of_each_seed() -> None:
    plus = [1.0 + EPS * v for v in (1.0, 2.0, 3.0, 6.0)] + [3.0 + EPS * v for v in (5.0, 6.0, 7.0, 10.0)]
    mixed = [plus[i // 2 + 4 * (i % 2)] for i in range(8)]  # seed i belongs to group i % 2
    told = TrainResult(theta_digest=DIGEST, plus=mixed, minus=(1.0, 3.0), examples=(4, 4), loss=2.0, n_tokens=9)
    found = slopes(Contribution("a", np.arange(8, dtype=np.uint64), told), spec(sided="one"))
    assert found == pytest.approx([-2, -2, -1, -1, 0, 0, 3, 3])  # what all directions of a group share is curvature


def test_fewer_examples_than_wanted_and_late_results_weigh_less() -> None:
    seeds, _, weights = pooled(
        [
            contribution(0, [1.0] * 4),
            contribution(10, [1.0, 2.0, 1.0, 2.0], examples=(1, 8)),
            contribution(20, [1.0] * 4, lag=3),
        ],
        spec(),
    )
    assert seeds.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert weights == pytest.approx([1] * 4 + [0.25, 1] * 2 + [0.5] * 4)


@pytest.mark.parametrize(
    ("rule", "more", "expected"), [("mean", {}, 37.0), ("clip", {}, 37.0), ("median", {}, 2.0), ("trimmed", {"trim": 0.34}, 2.0)]
)
def test_copies_of_a_seed_become_one_slope_by_the_rule(rule: str, more: dict[str, float], expected: float) -> None:
    copies = [contribution(7, [v], device=str(v)) for v in (1.0, 2.0, 108.0)]
    seeds, found, weights = pooled(copies, spec(copies=3, rule=rule, scale=1e9, **more))
    assert (seeds.tolist(), weights.tolist()) == ([7], [1.0])
    assert found == pytest.approx([expected])


def test_a_trim_that_drops_none_of_its_copies_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"trim 0\.2 of 3 copies drops none; it must be at least 0\.333"):
        spec(copies=3, rule="trimmed", trim=0.2)


def test_a_result_a_thousand_times_too_large_counts_at_most_twice_as_much_as_the_middle_one() -> None:
    honest = [contribution(10 * i, [1.0, -1.0, 1.0, -1.0]) for i in range(4)]
    loud = contribution(90, [1000.0, -1000.0, 1000.0, -1000.0], loss=20.0)
    assert bounded_slopes([*honest, loud], spec())[-1] == pytest.approx([2.0, -2.0, 2.0, -2.0])
    assert bounded_slopes([*honest, loud], spec(rule="mean"))[-1] == pytest.approx([1000.0, -1000.0, 1000.0, -1000.0])
    assert all(np.array_equal(a, slopes(b, spec())) for a, b in zip(bounded_slopes([*honest, loud], spec()), honest, strict=False))


@pytest.mark.parametrize("size", [0.0, 1e-12, 0.01])
def test_losses_that_hardly_differ_are_dropped_and_do_not_lengthen_the_step(size: float) -> None:
    honest = [contribution(10 * i, [1.0, -1.0, 1.0, -1.0]) for i in range(2)]
    still = [contribution(100 + 10 * i, [size, -size, size, -size]) for i in range(2)]
    merged = merge([*honest, *still], spec(), Learner(), 0, 0.0)
    assert merged.learner.mean_square == pytest.approx(1.0)
    assert not merged.entry.coefficients[8:].any()
    assert np.array_equal(merged.entry.coefficients[:8], merge(honest, spec(), Learner(), 0, 0.0).entry.coefficients)


def test_a_round_without_any_information_is_a_step_of_zero() -> None:
    merged = merge([contribution(0, [0.0] * 4)], spec(), Learner(), 0, 0.0)
    assert merged.entry.coefficients.tolist() == [0.0] * 4
    assert merged.learner == Learner(None, 4)


def test_a_lone_result_is_taken_as_training_on_one_machine_takes_it() -> None:
    alone = contribution(0, [0.5, -3.0, 1.0, 0.1])
    assert np.array_equal(bounded_slopes([alone], spec())[0], slopes(alone, spec()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([("clip", 1), ("mean", 1), ("clip", 3), ("mean", 3), ("median", 3), ("trimmed", 3)]))
def test_an_entry_is_the_same_to_the_bit_whoever_delivered_first(seed: int, how: tuple[str, int]) -> None:
    rng = random.Random(seed)
    rule, copies = how

    def some(round_: int, slot: int, device: str) -> Contribution:
        values = [rng.gauss(0, 3) for _ in range(4)]
        return contribution(100 * round_ + 10 * slot, values, device=device, lag=2 - round_, examples=(rng.randint(1, 5),))

    given_ = [
        (round_, slot, device, some(round_, slot, device))
        for round_ in range(3)
        for slot in range(3)
        for device in "abc"[:copies]
    ]
    arrived = rng.sample(given_, len(given_))
    entries = []
    for order in (given_, arrived):
        ordered = [c for *_, c in sorted(order, key=lambda x: x[:2])]  # as the server reads them: by round and slot, copies as they came
        entries.append(merge(ordered, spec(copies=copies, rule=rule), Learner(2.0, 100), 3, 0.5).entry.payload())
    assert entries[0] == entries[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"plus": (1.0,)}, "plus holds 1 losses, but the task has 4 seeds."),
        ({"examples": ()}, "examples must count the examples of 1 to 4 groups, each at least 1; it holds 0 counts."),
        ({"examples": (4, 0)}, "examples must count the examples of 1 to 4 groups, each at least 1; it holds 2 counts."),
        ({"minus": (1.0,)}, "minus holds 1 losses, but must hold 4 (two-sided)."),
        ({"plus": (1.0, float("nan"), 1.0, 1.0)}, "plus[1] is nan, but a loss must be between 0 and 50 nats."),
        ({"minus": (1.0, 1.0, 1.0, 50.5)}, "minus[3] is 50.5, but a loss must be between 0 and 50 nats."),
        ({"loss": -0.1}, "loss[0] is -0.1, but a loss must be between 0 and 50 nats."),
        ({"loss": float("inf")}, "loss[0] is inf, but a loss must be between 0 and 50 nats."),
    ],
)
def test_what_is_wrong_with_a_result_is_said_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    assert problem(result([0.0] * 4), spec(), 4) is None
    assert problem(result([0.0] * 4).model_copy(update=change), spec(), 4) == sentence


def test_the_variance_gate_waits_for_more_probes_where_slopes_are_large() -> None:
    gate = spec(pacing={"kind": "variance", "tau": 1.0})
    assert wanted([], gate) == 8
    assert wanted([contribution(0, [1.0, -1.0] * 4)], gate) == 8
    assert wanted([contribution(0, [3.0, -3.0] * 4)], gate) == 18
    assert wanted([contribution(0, [30.0, -30.0] * 4)], gate) == 32


@pytest.mark.parametrize("rule", ["clip", "mean"])
@pytest.mark.parametrize("size", [5e-324, 1e-160, 1e-30])
def test_losses_next_to_nothing_make_no_infinite_coefficient(rule: str, size: float) -> None:
    told = TrainResult(theta_digest=DIGEST, plus=(size, 0.0, size, 0.0), minus=(0.0,) * 4, examples=(4,), loss=0.0, n_tokens=9)
    merged = merge([Contribution("a", np.arange(4, dtype=np.uint64), told)], spec(rule=rule), Learner(), 0, 0.0)
    assert np.isfinite(merged.entry.coefficients).all()
    if rule == "clip":
        assert not merged.entry.coefficients.any()
