"""What enters a layer comes back from disk as it was put there, whatever happened to the process that wrote it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest

from fwdllama.errors import EngineError, ResourceError
from fwdllama.llama.half import rounded
from fwdllama.llama.states import Passage, StateStore, Unit, stored_bytes
from fwdllama.types import Encoded

N_EMBD = 8


def unit(number: int, n: int = 3) -> Unit:
    beginning = tuple(range(100 * number, 100 * number + 30))
    return Unit.of([Encoded(f"{number}-{i}", (*beginning, *range(i + 1)), (7, 8), (9, *range(i), 2)) for i in range(n)])


def values(unit: Unit, seed: int = 0) -> list[np.ndarray]:
    """Random values of every sequence, equal where the sequences are."""
    rng = np.random.default_rng(seed)
    stored = rng.standard_normal((unit.n_tokens, N_EMBD)).astype(np.float32) * 3
    return unit.parted(stored)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_common_beginning_is_stored_once() -> None:
    found = unit(1)
    lengths = [len(p) + len(b) for p, b in zip(found.prompts, found.behind, strict=True)]
    assert lengths == [31 + 3, 32 + 4, 33 + 5]
    assert found.lengths[0] == 34
    assert found.n_tokens < 60
    whole = values(found)
    assert [len(v) for v in whole] == lengths
    assert np.array_equal(whole[2][:30], whole[0][:30])
    assert same(found.parted(found.joined(whole)), whole)


def test_units_that_differ_in_any_token_or_border_have_other_keys() -> None:
    keys = {
        Unit(((1, 2), (3,)), ((4,), (5,))).key,
        Unit(((1, 2), (3,)), ((4,), (6,))).key,
        Unit(((1,), (2, 3)), ((4,), (5,))).key,
        Unit(((1, 2), (3,)), ((4, 5), ())).key,
        Unit(((1, 2),), ((4,),)).key,
    }
    assert len(keys) == 5
    assert unit(1).key == unit(1).key


def test_a_passage_is_continued_behind_the_last_whole_unit(tmp_path: Path) -> None:
    units, path = [unit(n) for n in range(4)], tmp_path / "pass.f32"
    first = Passage(path, units, N_EMBD)
    for i in range(3):
        first.append(values(units[i], i))
    assert not first.complete
    first.close()
    os.truncate(path, path.stat().st_size - 5)  # killed while it wrote the third
    again = Passage(path, units, N_EMBD)
    assert again.n_complete == 2
    again.append(values(units[2], 22))
    again.append(values(units[3], 3))
    assert again.complete
    assert [same(again.read(i), values(units[i], seed)) for i, seed in enumerate((0, 1, 22, 3))] == [True] * 4
    again.close()
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    damaged = Passage(path, units, N_EMBD)
    assert damaged.n_complete == 0
    damaged.remove()
    assert not path.exists()


@pytest.mark.parametrize("half", [True, False])
def test_a_store_gives_back_what_was_added_in_this_process_and_the_next(half: bool, tmp_path: Path) -> None:
    units = [unit(n) for n in range(3)]
    kept = [values(u, n) for n, u in enumerate(units)]
    expected = [[rounded(v) if half else v for v in each] for each in kept]
    with StateStore(tmp_path / "s", 5, N_EMBD, half=half) as store:
        assert store.missing([*units, units[0]]) == units
        store.add(units[0], kept[0])
        store.add(units[1], kept[1])
        assert same(store.states(*units[1].arrays), expected[1])
    size = sum(stored_bytes(u.n_tokens, N_EMBD, half=half) for u in units[:2])
    (file,) = (tmp_path / "s").glob("values.*")
    assert file.stat().st_size == size
    with open(file, "ab") as behind:  # of a unit that was never named
        behind.write(b"half a unit")
    with StateStore(tmp_path / "s", 5, N_EMBD, half=half) as store:
        assert store.missing(units) == [units[2]]
        store.add(units[2], kept[2])
        for u, wanted in zip(units, expected, strict=True):
            assert same(store.states(*u.arrays), wanted)
        assert store.states([], []) == []
        with pytest.raises(EngineError, match=r"does not hold these 1 sequences; they were not staged before training\.$"):
            store.states(units[0].arrays[0][:1], units[0].arrays[1][:1])


def test_values_that_half_precision_cannot_hold_keep_their_size() -> None:
    states = np.array([[1e6, 1.0, -3e4], [1.0, 2.0, 65504.0], [1e-3, 0.0, 2.0]], np.float32)
    assert np.abs(rounded(states) / np.where(states, states, 1) - (states != 0)).max() < 1e-3


def test_damage_is_told_with_what_to_do(tmp_path: Path) -> None:
    with StateStore(tmp_path / "s", 5, N_EMBD, half=False) as store:
        store.add(unit(1), values(unit(1)))
    path = tmp_path / "s" / "values.f32"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 16
    path.write_bytes(raw)
    file, folder = re.escape(str(path)), re.escape(str(tmp_path / "s"))
    sentence = rf"^{file} is damaged; remove {folder} and go on with `fwdllama resume`, which makes it anew\.$"
    with StateStore(tmp_path / "s", 5, N_EMBD, half=False) as store, pytest.raises(ResourceError, match=sentence):
        store.states(*unit(1).arrays)


def test_a_store_is_used_by_one_process_and_leaves_nothing_when_removed(tmp_path: Path) -> None:
    with StateStore(tmp_path / "s", 5, N_EMBD, half=True) as store:
        with pytest.raises(ResourceError, match=r"is in use by another process, which trains on the same model and data; wait for its end\.$"):
            StateStore(tmp_path / "s", 5, N_EMBD, half=True)
        store.add(unit(1), values(unit(1)))
        store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=rf"file/s cannot be written: {os.strerror(errno.ENOTDIR)}\. Nothing is lost; make room"):
        StateStore(tmp_path / "file" / "s", 5, N_EMBD, half=True)
