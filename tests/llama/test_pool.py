"""A prompt that is read from disk is the prompt that was computed, to the bit; what is not as it was written is computed again."""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.pool import PromptPool, Return, Unit
from fwdllama.llama.trunk import Trunk
from fwdllama.space import build_space
from fwdllama.types import Encoded
from gguf_tools.model import read_model_info
from gguf_tools.synth import write_tiny_llama
from tests.llama.test_trunk import INVOCATION, parts_of, tokens

OPTIONS = ContextOptions(n_ctx_seq=512, n_seq=8, n_outputs=64, n_batch=128, n_threads=1, kv_type="f16", flash=False)
LIMIT = 1 << 30


def unit(number: int, beginning: int, rests: Sequence[int]) -> list[Encoded | None]:
    """Examples that share a beginning of so many tokens."""
    shared = tokens(beginning, number)
    return [
        Encoded(f"{number}-{i}", shared + tokens(n, 10 * number + i), INVOCATION, tokens(1 + i, 7 * number + i), (), number)
        for i, n in enumerate(rests)
    ]


FIRST: list[Encoded | None] = [*unit(1, 280, (30, 7, 1)), None, *unit(2, 20, (4, 90)), *unit(3, 0, (17,))]  # also beyond 256 cells and n_batch
SECOND: list[Encoded | None] = [*unit(4, 60, (5, 6)), *unit(5, 100, (9, 3, 4))]
EMPTY: list[Encoded | None] = [Encoded("empty", (), INVOCATION, (70,), (70, 71), 6), *unit(6, 30, (8,))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("pool") / "model.gguf", type="Q8_0", n_head=2)  # heads of 32 values, which quantised caches need


def pool_in(folder: Path, limit: int = LIMIT, **identity: Any) -> PromptPool:
    return PromptPool(folder, identity, limit, Return(1))


@contextmanager
def opened(path: Path, pool: PromptPool | None, *, first: int = 0, **changes: Any) -> Iterator[LlamaOracle]:
    """An oracle of the whole model, or of its layers from `first` on with the trunk that belongs to them."""
    options = replace(OPTIONS, **changes)
    shapes: dict[str, Any] = {name: shape for name, (shape, _) in read_model_info(path).tensors.items()}
    space = build_space(shapes, 3, modules=["q", "k", "v", "o", "gate"], layers=(first, 2), rank=4, alpha=8.0, train="b", seed=3)
    parts = parts_of(path, first) if first else None
    trunk = Trunk(parts, options, ModelOptions(), n_seq=3) if parts else None
    try:
        with (
            Model(parts.top if parts else path, needs_vocabulary=parts is None) as model,
            LlamaOracle(model, space, "answer", options, trunk=trunk, pool=pool) as oracle,
        ):
            yield oracle
    finally:
        if trunk:
            trunk.close()


def losses(oracle: LlamaOracle, rows: Sequence[Encoded | None], seed: int = 1) -> NDArray[np.float64]:
    oracle.load(rows)
    oracle.write(np.float32(0.3) * np.random.default_rng(seed).standard_normal(oracle.space.n_params, np.float32))
    return oracle.losses()


def cells(oracle: LlamaOracle, rows: Sequence[Encoded | None]) -> list[bytes]:
    """What llama.cpp holds of the prompts."""
    for row, example in enumerate(rows):
        if example is not None:
            oracle.context.forget(row, len(example.prompt))
    return [oracle.context.saved(row).tobytes() for row, example in enumerate(rows) if example is not None]


KINDS: list[dict[str, Any]] = [{}, {"flash": True}, {"kv_type": "q8_0", "flash": True}, {"kv_type": "q4_0", "flash": True}, {"kv_type": "f32"}]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_losses_and_cells_are_the_same_to_the_bit_whether_prompts_are_computed_or_read(
    path: Path, tmp_path: Path, first: int, changes: dict[str, Any]
) -> None:
    with opened(path, None, first=first, **changes) as computing:
        wanted = [(losses(computing, rows), cells(computing, rows)) for rows in (FIRST, SECOND, EMPTY)]
    for n_found in (0, 3 + 2 + 1):  # units: first written, then, by another process, read
        pool = pool_in(tmp_path)
        with opened(path, pool, first=first, **changes) as oracle:
            for rows, (found, held) in zip((FIRST, SECOND, EMPTY), wanted, strict=True):
                assert np.array_equal(losses(oracle, rows), found)
                assert cells(oracle, rows) == held
        assert (pool.n_found, pool.n_kept) == (n_found, 6 - n_found)


def rows_of(pool: PromptPool, path: Path, *batches: Sequence[Encoded | None]) -> list[NDArray[np.float64]]:
    with opened(path, pool, first=1) as oracle:
        return [losses(oracle, rows) for rows in batches]


class Written(NamedTuple):
    """A pool of a batch, made once, and the losses without one."""

    folder: Path
    first: NDArray[np.float64]
    second: NDArray[np.float64]


@pytest.fixture(scope="module")
def written(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written") / "pool"
    with opened(path, None, first=1) as oracle:
        first, second = losses(oracle, FIRST), losses(oracle, SECOND)
    rows_of(pool_in(folder), path, FIRST)
    return Written(folder, first, second)


@pytest.fixture
def folder(written: Written, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(written.folder, tmp_path / "pool"))


def test_a_common_beginning_is_stored_once(folder: Path) -> None:
    n_cells = [17, (20 + 4) + (20 + 90), 280 + 30 + 7 + 1]  # the second unit's prompts share less than half of a prompt
    n_behind = [3, 3 + 4, 3 + 4 + 5]
    bytes_a_cell = 2 * 2 * 2 * 64 + 12  # K and V of two layers in F16, and the place
    expected = [bytes_a_cell * cells + 4 * 64 * behind for cells, behind in zip(n_cells, n_behind, strict=True)]
    sizes = sorted(file.stat().st_size for file in folder.glob("*/*"))
    assert [0 < size - cells < 1000 for size, cells in zip(sizes, expected, strict=True)] == [True] * 3


def test_no_more_than_one_sequence_is_in_memory_at_a_time(path: Path, tmp_path: Path) -> None:
    rows = [example for example in unit(1, 400, (20, 19, 18, 17)) if example is not None]
    pool = pool_in(tmp_path)
    prompts = Unit(range(4), [np.array(example.prompt, np.int32) for example in rows], [])
    with opened(path, None) as oracle:
        oracle.load(rows)
        for row, prompt in enumerate(prompts.prompts):
            oracle.context.forget(row, len(prompt))
        largest = len(oracle.context.saved(0))
        tracemalloc.start()
        try:
            assert pool.restore(oracle.context, prompts) is None
            pool.keep(oracle.context, prompts, [])
            assert pool.restore(oracle.context, prompts) == []
            assert tracemalloc.get_traced_memory()[1] < 1.75 * largest  # it, and what belongs to one of three layers
        finally:
            tracemalloc.stop()


def damaged(folder: Path, kind: str) -> None:
    for file in folder.glob("*/*"):
        data = bytearray(file.read_bytes())
        if kind == "cut":
            file.write_bytes(data[: len(data) // 2])
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "longer":
            file.write_bytes(data + b"0")
        else:
            data[{"magic": 0, "digest": 9, "index length": 24, "cells": len(data) // 2, "index": len(data) - 3}[kind]] ^= 1
            file.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "empty", "longer", "magic", "digest", "index length", "cells", "index"])
def test_what_is_damaged_is_computed_again_and_written_again(
    path: Path, folder: Path, written: Written, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damaged(folder, kind)
    pool = pool_in(folder)
    assert np.array_equal(rows_of(pool, path, FIRST)[0], written.first)
    assert [bool(re.search(r"pool/\w+/\w+ is computed again: it", message)) for message in caplog.messages] == [True] * 3
    assert (pool.n_found, pool.n_kept) == (0, 3)
    assert np.array_equal(rows_of(pool := pool_in(folder), path, FIRST)[0], written.first)
    assert pool.n_found == 3


def test_a_file_of_another_unit_under_its_name_is_refused(path: Path, folder: Path, written: Written) -> None:
    files = sorted(folder.glob("*/*"))
    for file, other in zip(files, [file.read_bytes() for file in (*files[1:], files[0])], strict=True):
        file.write_bytes(other)
    pool = pool_in(folder)
    assert np.array_equal(rows_of(pool, path, FIRST)[0], written.first)
    assert pool.n_found == 0


def test_cells_of_another_identity_are_not_taken(path: Path, folder: Path) -> None:
    pool = pool_in(folder, context="other")
    rows_of(pool, path, FIRST)
    assert (pool.n_found, pool.n_kept) == (0, 3)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/*"))


def test_a_full_pool_keeps_what_came_first_and_stays_within_its_limit(path: Path, folder: Path, written: Written) -> None:
    limit = size_of(folder) + 100
    for n_found in (3, 3):
        pool = pool_in(folder, limit)
        first, second = rows_of(pool, path, FIRST, SECOND)
        assert np.array_equal(first, written.first)
        assert np.array_equal(second, written.second)
        assert (pool.n_found, pool.n_kept) == (n_found, 0)
        assert size_of(folder) <= limit


def test_what_another_model_left_makes_room_the_oldest_first(path: Path, folder: Path) -> None:
    rows_of(pool_in(folder, other=1), path, SECOND)
    old, newer = (pool_in(folder, **identity).folder for identity in ({}, {"other": 1}))
    os.utime(old, (1, 1))
    os.utime(newer, (2, 2))
    pool = pool_in(folder, size_of(folder) + 1000, other=2)
    rows_of(pool, path, SECOND)
    assert not old.exists()
    assert newer.exists()
    assert pool.n_kept == 2


def test_a_disk_that_would_be_full_or_cannot_be_written_only_ends_the_adding(path: Path, tmp_path: Path, written: Written) -> None:
    (tmp_path / "file").touch()
    small = PromptPool(tmp_path / "small", {}, LIMIT, Return(1), reserve_bytes=1 << 60)
    pools = [small, pool_in(tmp_path / "file" / "pool")]
    found = [rows_of(pool, path, FIRST)[0] for pool in pools]
    assert [pool.n_kept for pool in pools] == [0, 0]
    assert not list((tmp_path / "small").glob("*/*"))
    for losses_found in found:
        assert np.array_equal(losses_found, written.first)


def test_units_that_will_not_return_at_this_pace_are_not_written(path: Path, tmp_path: Path) -> None:
    now = iter(range(100))
    pool = PromptPool(tmp_path, {}, LIMIT, Return(n_units=5, seconds=10.0), clock=lambda: float(next(now)))
    rows_of(pool, path, FIRST, SECOND)  # a second a unit, so ten of them: all return
    assert pool.n_kept == 5
    pool = PromptPool(tmp_path, {"other": 1}, LIMIT, Return(n_units=12, seconds=10.0), clock=lambda: float(next(now)))
    rows_of(pool, path, FIRST, SECOND)
    assert pool.n_kept == 0


def test_an_unfinished_file_of_a_killed_process_is_removed_an_hour_later(path: Path, folder: Path) -> None:
    left, fresh = (pool_in(folder).folder / f"ab.{pid}.part" for pid in (1, 2))
    for file in (left, fresh):
        file.touch()
    os.utime(left, (1, 1))
    pool_in(folder)
    assert (left.exists(), fresh.exists()) == (False, True)
