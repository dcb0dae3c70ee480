"""A step's batch follows from seed and step alone, shows every unit once a pass, and puts answers of one length side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.batches import EncodedUnits, RollingBatches, Rows, grouped, groups_of, shuffled
from fwdllama.errors import DataError
from fwdllama.types import Encoded, Example
from tests.reference import philox_words

Units = list[tuple[Encoded, ...]]


def units_of(sizes: Sequence[int]) -> Units:
    """Unit u holds sizes[u] examples "u-0", "u-1", ..., the answers of later ones shorter."""
    return [tuple(Encoded(f"{u}-{i}", (u,), (1,), (2,) * (9 - i)) for i in range(n)) for u, n in enumerate(sizes)]


def origin(example: Encoded) -> int:
    return int(example.id.split("-")[0])


def ids(rows: Rows) -> list[str | None]:
    return [None if row is None else row.id for row in rows]


def drawn_units(batches: RollingBatches, n_steps: int) -> list[int]:
    """Which units came in, in the order of their numbers."""
    seen = {e.unit: origin(e) for step in range(n_steps) for e in batches.batch(step)[0] if e is not None}
    assert sorted(k for k in seen if k is not None) == list(range(len(seen)))
    return [seen[number] for number in range(len(seen))]


sizes_of_units = st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any)
settings = {
    "sizes": sizes_of_units,
    "n_slots": st.integers(1, 6),
    "fresh": st.integers(1, 6),
    "unit_size": st.integers(1, 4),
    "seed": st.integers(0, 2**63 - 1),
}


@given(order=st.permutations(range(7)), **settings)
def test_a_batch_is_a_function_of_seed_and_step(
    order: list[int], sizes: list[int], n_slots: int, fresh: int, unit_size: int, seed: int
) -> None:
    first, second = (
        RollingBatches(units_of(sizes), unit_size=unit_size, n_slots=n_slots, fresh=fresh, seed=seed) for _ in range(2)
    )
    in_order = [first.batch(step) for step in range(7)]
    assert {step: second.batch(step) for step in order} == dict(enumerate(in_order))


@given(**settings)
def test_every_unit_with_examples_is_seen_once_a_pass(
    sizes: list[int], n_slots: int, fresh: int, unit_size: int, seed: int
) -> None:
    batches = RollingBatches(units_of(sizes), unit_size=unit_size, n_slots=n_slots, fresh=fresh, seed=seed)
    usable = sorted(u for u, n in enumerate(sizes) if n)
    drawn = drawn_units(batches, 3 * len(sizes))
    assert len(drawn) >= 3 * len(usable)
    for start in (0, len(usable), 2 * len(usable)):
        assert sorted(drawn[start : start + len(usable)]) == usable


@given(**settings)
def test_the_new_rows_are_those_of_the_newest_units(
    sizes: list[int], n_slots: int, fresh: int, unit_size: int, seed: int
) -> None:
    batches = RollingBatches(units_of(sizes), unit_size=unit_size, n_slots=n_slots, fresh=fresh, seed=seed)
    before, new = batches.batch(0)
    assert new == [row for row, example in enumerate(before) if example is not None]
    assert batches.fresh == min(fresh, batches.n_slots)
    newest = batches.n_slots - 1
    for step in range(1, 6):
        rows, new = batches.batch(step)
        assert len(rows) == len(before) == batches.n_slots * unit_size
        numbers = {row: e.unit for row, e in enumerate(rows) if e is not None and e.unit is not None}
        assert new == [row for row, number in numbers.items() if number > newest]
        newest += batches.fresh
        assert set(numbers.values()) == set(range(newest + 1 - batches.n_slots, newest + 1))
        before = rows


@given(**settings)
def test_rows_go_from_short_answers_to_long_ones_and_hold_all_of_every_unit_that_has_room(
    sizes: list[int], n_slots: int, fresh: int, unit_size: int, seed: int
) -> None:
    batches = RollingBatches(units_of(sizes), unit_size=unit_size, n_slots=n_slots, fresh=fresh, seed=seed)
    for step in range(4):
        rows, _ = batches.batch(step)
        held = [row for row in rows if row is not None]
        assert rows == [*held, *[None] * (len(rows) - len(held))]
        lengths = [len(row.target) for row in held]
        assert lengths == sorted(lengths)
        for number in {row.unit for row in held}:
            unit = [row for row in held if row.unit == number]
            assert len(unit) == min(unit_size, sizes[origin(unit[0])])
            # Of more examples than have room the first ones are taken.
            assert ids(list(unit)) == [f"{origin(unit[0])}-{i}" for i in reversed(range(len(unit)))]


def test_a_small_data_set_fills_fewer_slots_and_empty_units_none() -> None:
    batches = RollingBatches(units_of([2, 0, 1, 0]), unit_size=2, n_slots=9, fresh=5, seed=1)
    assert (batches.n_slots, batches.fresh) == (2, 2)
    assert sorted(filter(None, ids(batches.batch(0)[0]))) == ["0-0", "0-1", "2-0"]


def test_units_of_which_nothing_fits_are_refused_in_words() -> None:
    examples = [Example(str(i), {"context": "c"}, ("a",)) for i in range(3)]
    long = EncodedUnits([examples], lambda e: Encoded(e.id, (1,) * 99, (2,), (3,)), 64, "train.json")
    sentence = r"^train\.json: none of its examples fits the context of 64 tokens\. Use a larger --ctx\.$"
    with pytest.raises(DataError, match=sentence):
        RollingBatches(long, unit_size=3, n_slots=2, fresh=1, seed=0)


def test_examples_are_made_into_tokens_once_when_they_are_first_drawn() -> None:
    asked: list[str] = []

    def encode(example: Example) -> Encoded:
        asked.append(example.id)
        return Encoded(example.id, (1,) * int(example.id), (2, 2), (3, 3, 3))

    groups = [[Example(str(n), {}, ()) for n in lengths] for lengths in ((4, 5), (6, 7, 9), (1,))]
    units = EncodedUnits(groups, encode, 10, "train.json")
    assert (len(units), asked) == (3, [])
    assert [e.id for e in units[1]] == ["6"]  # 6 + 2 + 2 tokens fill the context
    assert units[1] is units[1]
    assert asked == ["6", "7", "9"]
    assert units.skipped == {
        "answer longer than the context of 10 tokens leaves room for": 1,
        "prompt longer than the context of 10 tokens": 1,
    }
    assert [e.id for e in units[0]] == ["4", "5"]
    assert sum(units.skipped.values()) == 2
    limited = EncodedUnits(groups, encode, 10, "train.json", n_outputs=2)
    assert limited[0] == ()
    assert limited.skipped == {"answer longer than the 2 tokens that are predicted at once": 2}


def test_neighbours_of_one_context_form_even_groups_of_limited_size() -> None:
    contexts = ["a", "a", "a", "b", "a", "b", "b"]
    examples = [Example(str(i), {"context": c}, ("x",)) for i, c in enumerate(contexts)]
    assert [[e.id for e in group] for group in groups_of(examples, 2)] == [["0"], ["1", "2"], ["3"], ["4"], ["5", "6"]]
    pairs = [Example(str(i), {"prompt": "same"}, ("x",)) for i in range(3)]
    assert [len(group) for group in groups_of(pairs, 4)] == [1, 1, 1]
    assert groups_of([], 4) == []


@given(st.integers(0, 2**63 - 1), st.integers(0, 5), st.integers(0, 40))
def test_a_shuffle_sorts_the_raw_words_of_its_epoch(seed: int, epoch: int, n: int) -> None:
    words = philox_words((seed, 0), (0, 0, 1, epoch))
    keys = [next(words) for _ in range(n)]
    assert shuffled(seed, epoch, n).tolist() == sorted(range(n), key=lambda i: keys[i])


def test_shuffles_of_other_seeds_and_epochs_are_others() -> None:
    orders = {tuple(shuffled(seed, epoch, 20)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert shuffled(5, 2, 10).tolist() == [8, 5, 3, 6, 7, 9, 1, 4, 2, 0]


rows_with_gaps = st.lists(st.booleans(), max_size=40)


@given(rows_with_gaps, st.integers(1, 5), st.integers(0, 9))
def test_groups_hold_every_example_once_and_only_consecutive_rows(gaps: list[bool], size: int, shift: int) -> None:
    rows = [Encoded("e", (), (1,), (2,)) if here else None for here in gaps]
    groups = grouped(rows, size, shift)
    assert [row for group in groups for row in group] == [row for row, here in enumerate(gaps) if here]
    if size >= sum(gaps):
        assert len(groups) <= 1, "one direction for the whole batch"
        return
    for group in groups:
        assert 1 <= len(group) <= size
        assert list(group) == list(range(group[0], group[0] + len(group)))
    whole = grouped([Encoded("e", (), (1,), (2,))] * len(rows), size, shift)
    assert Counter(len(group) for group in whole)[size] >= len(rows) // size - 1


def test_an_example_meets_others_in_the_next_step() -> None:
    rows = [Encoded("e", (), (1,), (2,))] * 5
    assert grouped(rows, 2, 0) == [(0, 1), (2, 3), (4,)]
    assert grouped(rows, 2, 1) == [(0,), (1, 2), (3, 4)]
    assert grouped([None, *rows[:2], None, rows[0]], 2, 0) == [(1,), (2,), (4,)]
