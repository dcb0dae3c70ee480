"""A prompt that is read from disk is the prompt that was computed, to the bit; what is not as it was written is computed again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.llama import pool as pool_module
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.pool import PromptPool, Return
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
    return write_tiny_llama(tmp_path_factory.mktemp("pool") / "model.gguf", type="Q8_0")


def pool_in(folder: Path, *, limit: int = LIMIT, returns: Return = Return(1), **identity: Any) -> PromptPool:
    return PromptPool(folder, identity, limit, returns)


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
            Model(parts.top if parts else path) as model,
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


@pytest.mark.parametrize("first", [0, 1, 2])
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
