"""A model cut in two gives the losses of the whole to the bit, and what is kept of a batch is what a fresh one has."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.errors import DataError, EngineError
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.slice import Slice
from fwdllama.llama.trunk import UNUSED_S, Parts, Trunk, cut
from fwdllama.space import build_space
from fwdllama.types import Encoded, Scope
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.synth import write_tiny_llama

INVOCATION = (44, 45, 46)
SCOPES: tuple[Scope, ...] = get_args(Scope)
TYPES = ("F32", "Q8_0")
OPTIONS = ContextOptions(n_ctx_seq=512, n_seq=12, n_outputs=64, n_batch=128, n_threads=1, kv_type="f16", flash=False)


def tokens(n: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 300, n).tolist())


def unit_of(number: int, rng: random.Random) -> list[Encoded]:
    """Up to three examples of one beginning, some longer than a decode and with cells beyond the first 256."""
    beginning = tokens(rng.randint(5, 300), number)
    rests = [tokens(rng.randint(1, 40), 10 * number + i) for i in range(rng.randint(1, 3))]
    return [
        Encoded(f"{number}-{i}", beginning + rest, INVOCATION, tokens(rng.randint(1, 6), 7 * number + i), (), number)
        for i, rest in enumerate(rests)
    ]


def batch(seed: int) -> list[Encoded | None]:
    rng = random.Random(seed)
    rows: list[Encoded | None] = [e for number in range(3) for e in unit_of(10 * seed + number, rng)]
    rows.insert(2, None)
    return [
        *rows,
        Encoded("no prompt", (), INVOCATION, (70,), (70, 71, 90)),
        Encoded("free", tokens(20, 3), (44,), (9,)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trunk")


@pytest.fixture(scope="module", params=TYPES)
def path(request: pytest.FixtureRequest, folder: Path) -> Path:
    return write_tiny_llama(folder / f"{request.param}.gguf", type=request.param)


def parts_of(path: Path, first: int, shortlist: NDArray[np.int32] | None = None) -> Parts:
    parts = cut(path, file_sha256(path), first, path.parent / "cache", shortlist=shortlist)
    assert parts is not None
    return parts


@contextmanager
def opened(
    path: Path, scope: Scope, layers: tuple[int, int], trunk_below: int = 0, shortlist: NDArray[np.int32] | None = None, **changes: Any
) -> Iterator[LlamaOracle]:
    """An oracle of the whole model, or of its layers from `trunk_below` on, with the logits of a shortlist, and the trunk that belongs to them."""
    info, options = read_model_info(path), replace(OPTIONS, **changes)
    shapes: dict[str, Any] = {name: shape for name, (shape, _) in info.tensors.items()}
    modules = ["q", "k", "v", "o", "gate", "up", "down"]
    space = build_space(shapes, 3, modules=modules, layers=layers, rank=4, alpha=8.0, train="b", seed=3)
    parts = parts_of(path, trunk_below, shortlist) if trunk_below else None
    trunk = Trunk(parts, options, ModelOptions(), n_seq=3) if parts else None
    try:
        with (
            Model(parts.top if parts else path, needs_vocabulary=parts is None) as model,
            LlamaOracle(model, space, scope, options, trunk=trunk, shortlist=shortlist) as oracle,
        ):
            yield oracle
    finally:
        if trunk:
            trunk.close()


def drawn(oracle: LlamaOracle, seed: int) -> NDArray[np.float32]:
    return np.float32(0.3) * np.random.default_rng(seed).standard_normal(oracle.space.n_params, np.float32)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (2, 2)])
def test_trunk_and_top_give_the_losses_of_the_whole_model_to_the_bit(
    path: Path, scope: Scope, first: int, last: int
) -> None:
    with opened(path, scope, (first, last)) as whole, opened(path, scope, (first, last), first) as top:
        for seed in (1, 2):
            rows, theta = batch(seed), drawn(whole, seed)
            for oracle in (whole, top):
                oracle.load(rows)
                oracle.write(theta)
            assert np.array_equal(top.losses(), whole.losses())
            assert np.array_equal(top.losses([0, 4]), whole.losses([0, 4]))
        whole.write(drawn(whole, 3))
        assert not np.array_equal(top.losses(), whole.losses())


@pytest.mark.parametrize("scope", SCOPES)
def test_losses_of_a_top_with_a_shortlist_are_relative_to_its_tokens(path: Path, scope: Scope) -> None:
    short = np.arange(6, 300, 3, dtype=np.int32)
    rows: list[Encoded | None] = [Encoded(str(i), tokens(30 + i, i), INVOCATION, (int(short[7 * i]),)) for i in range(5)]
    among: list[Encoded | None] = [replace(row, choices=tuple(short.tolist())) for row in rows if row]
    labels: list[Encoded | None] = [replace(row, choices=(*row.target, 9, 297)) for row in rows if row and row.target[0] not in (9, 297)]
    with opened(path, scope, (1, 2)) as whole, opened(path, scope, (1, 2), 1, short) as top:
        assert top.model.n_vocab == len(short)
        theta = drawn(whole, 1)
        for given, expected in ((rows, among), (labels, labels)):
            top.load(given)
            whole.load(expected)
            for oracle in (top, whole):
                oracle.write(theta)
            np.testing.assert_allclose(top.losses(), whole.losses(), rtol=1e-5)
        whole.load(rows)
        whole.write(theta)
        top.load(rows)
        assert (whole.losses() - top.losses() > 0.1).all()
        sentence = r"^example far: token 7 of its answer is not among the 98 whose logits are computed\.$"
        with pytest.raises(DataError, match=sentence):
            top.load([Encoded("far", tokens(9, 1), INVOCATION, (9, 7))])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_shortlist_of_every_token_changes_no_bit(path: Path, scope: Scope) -> None:
    every = np.arange(read_model_info(path).n_vocab, dtype=np.int32)
    with opened(path, scope, (1, 2), 1) as top, opened(path, scope, (1, 2), 1, every) as short:
        for oracle in (top, short):
            oracle.load(batch(1))
            oracle.write(drawn(top, 1))
        assert np.array_equal(top.losses(), short.losses())


def loaded_and_asked(oracle: LlamaOracle, rows: list[Encoded | None]) -> None:
    """Scope `answer` decodes prompts in loading, scope `all` with the losses."""
    oracle.load(rows)
    oracle.losses()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_batch_loaded_step_by_step_has_the_losses_of_a_fresh_oracle_to_the_bit(
    path: Path, scope: Scope, first: int
) -> None:
    """Which is what makes a resumed run identical; units come, stay and go, leave gaps, and one loading fails."""
    rng = random.Random(first)
    with opened(path, scope, (first, 2), first) as own:
        theta = drawn(own, 1)
        rows: list[Encoded | None] = [None] * 12
        for step in range(3):
            for slot in rng.sample(range(4), 2 if step else 4):
                members = unit_of(4 * step + slot, rng)
                rows[slot::4] = [*members, *[None] * (3 - len(members))]
            if step == 1:
                own.load([None, *rows[1:]])
                with pytest.raises(EngineError):
                    loaded_and_asked(own, [*rows[:11], Encoded("no such token", (10**6,), INVOCATION, (5, 5))])
            own.load(rows)
            own.write(theta)
            some = [i for i, row in enumerate(rows) if row is not None][::2]
            with opened(path, scope, (first, 2), first) as fresh:
                fresh.load(rows)
                fresh.write(theta)
                assert np.array_equal(own.losses(), fresh.losses())
                assert np.array_equal(own.losses(some), fresh.losses(some))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_prompts_with_other_answers_have_the_losses_of_those(folder: Path, scope: Scope) -> None:
    path = write_tiny_llama(folder / "answers.gguf")
    rows = [e for e in batch(1) if e is not None]
    others = [replace(e, target=(*e.target[::-1], 7), choices=()) for e in rows]
    with opened(path, scope, (1, 2)) as whole, opened(path, scope, (1, 2), 1) as top:
        for oracle in (whole, top):
            oracle.write(drawn(whole, 1))
            oracle.load(rows)
            oracle.load(others)
        assert np.array_equal(top.losses(), whole.losses())


def test_the_trunk_runs_once_an_example_and_shares_what_prompts_have_in_common(folder: Path) -> None:
    path = write_tiny_llama(folder / "once.gguf")
    beginning = tokens(40, 1)
    rows = [Encoded(str(n), beginning + tokens(n, n), INVOCATION, (5, 6), (), 1) for n in (6, 9)]
    with opened(path, "answer", (2, 2), 2) as oracle:
        oracle.load(rows)
        assert oracle.trunk is not None
        # The second needs its own 9 tokens; both have three of the invocation and one of the target behind them.
        assert [oracle.trunk.n_decoded, oracle.context.n_decoded] == [46 + 4 + 9 + 4, 46 + 9]
        oracle.load([*rows, Encoded("x", tokens(8, 2), INVOCATION, (5,), (), 2)])
        assert [oracle.trunk.n_decoded, oracle.context.n_decoded] == [63 + 8 + 3, 55 + 8]
        before = oracle.trunk.n_decoded
        for seed in (1, 2):
            oracle.write(drawn(oracle, seed))
            oracle.losses()
        assert oracle.trunk.n_decoded == before
        assert oracle.n_decoded == before + oracle.context.n_decoded
        assert oracle.decode_s > oracle.context.decode_s


def test_states_of_more_prompts_than_sequences_are_taken_in_turns(folder: Path) -> None:
    path = write_tiny_llama(folder / "turns.gguf")
    prompts = [np.array(tokens(n, n), np.int32) for n in (5, 200, 17, 3, 30)]
    behind = [np.array(tokens(n, 50 + n), np.int32) for n in (1, 4, 2, 3, 5)]
    with_two, with_five = (Trunk(parts_of(path, 1), OPTIONS, ModelOptions(), n) for n in (2, 5))
    for a, b, prompt, rest in zip(
        with_two.states(prompts, behind), with_five.states(prompts, behind), prompts, behind, strict=True
    ):
        assert a.shape == (len(prompt) + len(rest), 64)
        assert np.array_equal(a, b)
    assert with_two.states([], []) == []
    for trunk in (with_two, with_two, with_five):
        trunk.close()


def test_a_model_is_cut_once_for_each_content_and_layer(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    parts = parts_of(path, 1)
    assert parts.first == 1
    assert [read_model_info(part, needs_vocabulary=False).n_layers for part in (parts.trunk, parts.top)] == [1, 2]
    written = [part.stat().st_mtime_ns for part in (parts.trunk, parts.top)]
    moved = path.rename(tmp_path / "renamed.gguf")
    parts = replace(parts, model=moved)
    assert cut(moved, file_sha256(moved), 1, tmp_path / "cache") == parts
    assert [part.stat().st_mtime_ns for part in (parts.trunk, parts.top)] == written
    parts.trunk.unlink()
    assert parts_of(moved, 1) == parts
    assert parts.trunk.is_file()
    other = write_tiny_llama(path, seed=1)
    of_other = {part for found in (parts_of(other, 1), parts_of(moved, 2)) for part in (found.trunk, found.top)}
    assert len(of_other & {parts.trunk, parts.top}) == 0
    assert sorted((tmp_path / "cache" / "parts").iterdir()) == sorted({parts.trunk, parts.top, *of_other})


def test_tops_of_other_shortlists_are_put_out_once_nobody_has_asked_for_them_for_a_while(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    every = parts_of(path, 1)
    old, recent, new = (parts_of(path, 1, np.arange(n, dtype=np.int32)) for n in (32, 64, 96))
    assert len({every, old, recent, new}) == 4
    long_ago = time.time() - UNUSED_S - 9
    for parts in (every, old, recent):
        os.utime(parts.top, (long_ago, long_ago))
    assert parts_of(path, 1, np.arange(64, dtype=np.int32)) == recent  # asked for again
    assert sorted((tmp_path / "cache" / "parts").iterdir()) == sorted({every.top, every.trunk, recent.top, new.top})
    assert read_model_info(recent.top, needs_vocabulary=False).n_vocab == 64


def test_a_model_that_cannot_be_cut_is_used_whole_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert cut(path, "a" * 64, 0, tmp_path) is None  # nothing lies below layer 0
    assert not caplog.records
    other = write_tiny_llama(tmp_path / "other.gguf", architecture="mpt")
    with caplog.at_level(logging.WARNING, "fwdllama.llama"):
        assert cut(other, "b" * 64, 1, tmp_path) is None
    assert "every probe computes all layers: " in caplog.text
    assert "layers of the architecture 'mpt' may depend on their position" in caplog.text
    caplog.clear()
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "fwdllama.llama"):
        assert cut(path, "a" * 64, 1, tmp_path / "file") is None
    assert "Not a directory" in caplog.text


def test_a_trunk_whose_values_are_not_seen_says_what_to_do(folder: Path) -> None:
    parts = parts_of(write_tiny_llama(folder / "unseen.gguf"), 1)
    sentence = r"^the values that leave layers of .*gguf were not seen in the graph; use --no-trunk "
    with closing(Slice(parts.trunk, OPTIONS, ModelOptions(), 1, layers=9)) as part, pytest.raises(EngineError, match=sentence):
        part.passed([np.array([5, 6], np.int32)], [np.zeros((2, 64), np.float32)])
