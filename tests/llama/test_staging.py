"""Slices one after the other give what the whole trunk gives to the bit, and a pass that was stopped is continued."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fwdllama.errors import ResourceError, Stopped
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.staging import Stage
from fwdllama.llama.states import StateStore, Unit
from fwdllama.llama.trunk import Trunk, cut
from fwdllama.types import Encoded, Staged
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.split import slices
from gguf_tools.synth import write_tiny_llama

N_LAYERS, FIRST = 7, 5
OPTIONS = ContextOptions(n_ctx_seq=256, n_seq=1, n_outputs=8, n_batch=64, n_threads=1)
WEIGHTS = ModelOptions()


def units() -> list[Unit]:
    rng = random.Random(1)
    found = []
    for number in range(4):
        beginning = tuple(rng.randrange(3, 300) for _ in range(rng.randint(20, 150)))
        members = [
            Encoded(str(i), (*beginning, *(rng.randrange(3, 300) for _ in range(rng.randint(1, 20)))), (44, 45), (5, number + 3, 2))
            for i in range(rng.randint(1, 3))
        ]
        found.append(Unit.of(members))
    return found


@pytest.fixture(scope="module", params=["F32", "Q8_0", "Q4_1"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("staging") / "m.gguf", type=request.param, n_layers=N_LAYERS, tied=False)


def stage(model: Path, boundaries: tuple[int, ...]) -> Stage:
    return Stage(model, boundaries, OPTIONS, WEIGHTS, n_seq=3)


def whole(model: Path, *, half: bool) -> list[list[np.ndarray]]:
    parts = cut(model, file_sha256(model), FIRST, model.parent / "cache")
    assert parts is not None
    with closing(Trunk(parts, OPTIONS, WEIGHTS, 3, half=half)) as trunk:
        return [trunk.states(*unit.arrays) for unit in units()]


def held(store: StateStore) -> list[list[np.ndarray]]:
    return [store.states(*unit.arrays) for unit in units()]


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return all(np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("boundaries", [(0, 5), (0, 2, 4, 5), (0, 1, 2, 3, 4, 5)])
def test_slices_give_what_the_whole_trunk_gives_to_the_bit(model: Path, boundaries: tuple[int, ...], half: bool, tmp_path: Path) -> None:
    with StateStore(tmp_path / "s", FIRST, read_model_info(model).n_embd, half=half) as store:
        n = stage(model, boundaries).run(store, units(), half=half)
        assert n == sum(unit.n_tokens for unit in units())
        assert same(held(store), whole(model, half=half))
        assert sorted(path.name for path in store.folder.iterdir()) == [".lock", "index", f"values.f{16 if half else 32}"]
        assert stage(model, boundaries).run(store, units(), half=half) == 0


def test_a_pass_stopped_anywhere_goes_on_there_even_with_other_slices(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", type="Q8_0", n_layers=N_LAYERS)
    wanted, n_embd = whole(model, half=True), read_model_info(model).n_embd
    rng = random.Random(3)
    for trial in range(8):
        left = [rng.randint(1, 6), rng.randint(1, 6), 100]
        seen: list[float] = []

        def count(staged: Staged, left: list[int] = left, seen: list[float] = seen) -> None:
            left[0] -= 1
            seen.append(staged.done)

        while left:
            boundaries = rng.choice([(0, 2, 5), (0, 3, 5), (0, 1, 4, 5)])
            with StateStore(tmp_path / f"s{trial}", FIRST, n_embd, half=True) as store:
                try:
                    stage(model, boundaries).run(store, units(), half=True, on_progress=count, stop=lambda left=left: left[0] == 0)
                except Stopped:
                    left.pop(0)
                    seen.clear()
                    continue
                assert same(held(store), wanted)
                assert not seen or seen[-1] == 1.0
                assert seen == sorted(seen)
                break


def test_what_needs_more_room_than_there_is_is_refused_with_its_size(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", n_layers=N_LAYERS)
    some = stage(model, (0, 3, 5))
    kept, most = some.needed_bytes(units(), half=True)
    assert 0 < kept < most
    with StateStore(tmp_path / "s", FIRST, 64, half=True) as store:
        with pytest.raises(ResourceError, match=r"needs .* for what enters layer 5 of [\d,]+ tokens \(.* of it to stay\), but .* are free\."):
            some.run(store, units(), half=True, free_bytes=most - 1)
        assert store.missing(units()) == units()
        assert some.run(store, units(), half=True, free_bytes=most) > 0


def test_slices_are_as_long_as_allowed_and_begin_where_the_architecture_can_be_cut(tmp_path: Path) -> None:
    info = read_model_info(write_tiny_llama(tmp_path / "m.gguf", n_layers=12))
    assert slices(info, 7, 3) == (0, 3, 6, 7)
    assert slices(info, 7, 100) == (0, 7)
    assert slices(info, 1, 1) == (0, 1)
    gemma = read_model_info(write_tiny_llama(tmp_path / "g.gguf", n_layers=19, architecture="gemma3"))
    assert slices(replace(gemma), 18, 7) == (0, 6, 12, 18)
    assert slices(gemma, 12, 1) == (0, 6, 12)
