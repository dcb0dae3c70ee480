"""An adapter in memory can be rewritten in three ways that give the same bits, and lets go in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.adapter import LoadedAdapter, Writing
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from gguf_tools.adapter import Adapter
from gguf_tools.synth import write_tiny_llama
from tests.reference import TinyLlama

TOKENS = np.random.default_rng(4).integers(3, 300, 12).astype(np.int32)
SHAPES = {"blk.0.attn_q.weight": (64, 64), "blk.1.attn_v.weight": (32, 64), "blk.2.ffn_down.weight": (64, 128)}
RANK, ALPHA = 4, 8.0
WRITINGS: tuple[Writing, ...] = get_args(Writing)
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model(path) as opened:
        yield opened


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    options = ContextOptions(n_ctx_seq=64, n_seq=1, n_outputs=16, n_batch=16, n_threads=1, kv_type="f32", flash=False)
    with Context(model, options) as opened:
        yield opened


def drawn(seed: int) -> dict[str, Pair]:
    rng = np.random.default_rng(seed)
    return {
        name: (
            (rng.standard_normal((RANK, n_in)) * n_in**-0.5).astype(np.float32),
            (rng.standard_normal((n_out, RANK)) * 0.5).astype(np.float32),
        )
        for name, (n_out, n_in) in SHAPES.items()
    }


def adapter(seed: int) -> Adapter:
    return Adapter(architecture="llama", alpha=ALPHA, tensors=drawn(seed))


def values(tensors: dict[str, Pair]) -> dict[str, NDArray[np.float32]]:
    return {
        f"{name}.lora_{part}": value for name, pair in tensors.items() for part, value in zip("ab", pair, strict=True)
    }


def logits(context: Context) -> NDArray[np.float32]:
    context.clear()
    ramp = np.arange(len(TOKENS), dtype=np.int32)
    result = context.decode(TOKENS, ramp, np.zeros(len(TOKENS), np.int32), np.ones(len(TOKENS), np.int8))
    assert result is not None
    return result.copy()


def test_this_build_writes_in_place(model: Model) -> None:
    loaded = LoadedAdapter(model, adapter(1))
    assert loaded.writing == "in-place"
    loaded.close()


@pytest.mark.parametrize("writing", WRITINGS)
def test_an_adapter_adds_alpha_over_rank_times_b_a_to_each_of_its_matrices(
    model: Model, context: Context, path: Path, writing: Writing
) -> None:
    loaded = LoadedAdapter(model, adapter(1), writing=writing)
    loaded.attach(context, True)
    expected = TinyLlama(path).logits(TOKENS.tolist(), drawn(1), ALPHA / RANK)
    plain = TinyLlama(path).logits(TOKENS.tolist())
    assert np.abs(logits(context) - expected).max() < 5e-5
    assert np.abs(plain - expected).max() > 0.1
    loaded.close()


def test_the_three_ways_of_rewriting_give_the_same_bits_as_loading_the_numbers(model: Model, context: Context) -> None:
    fresh = LoadedAdapter(model, adapter(2))
    fresh.attach(context, True)
    expected = logits(context)
    fresh.close()
    for writing in WRITINGS:
        loaded = LoadedAdapter(model, adapter(1), writing=writing)
        assert loaded.writing == writing
        loaded.attach(context, True)
        before = logits(context)
        loaded.update(values(drawn(2)))
        assert np.array_equal(logits(context), expected), writing
        assert not np.array_equal(before, expected)
        loaded.update(values(drawn(1)))
        assert np.array_equal(logits(context), before), writing
        loaded.close()


@pytest.mark.parametrize("writing", WRITINGS)
def test_an_update_of_some_tensors_leaves_the_others(model: Model, context: Context, writing: Writing) -> None:
    name = "blk.1.attn_v.weight"
    mixed = drawn(1) | {name: (drawn(1)[name][0], drawn(2)[name][1])}
    whole = LoadedAdapter(model, Adapter(architecture="llama", alpha=ALPHA, tensors=mixed), writing=writing)
    whole.attach(context, True)
    expected = logits(context)
    whole.close()
    loaded = LoadedAdapter(model, adapter(1), writing=writing)
    loaded.attach(context, True)
    loaded.update({f"{name}.lora_b": drawn(2)[name][1]})
    assert np.array_equal(logits(context), expected)
    loaded.close()


@pytest.mark.parametrize("writing", WRITINGS)
def test_an_update_copies_its_numbers(model: Model, context: Context, writing: Writing) -> None:
    loaded = LoadedAdapter(model, adapter(1), writing=writing)
    loaded.attach(context, True)
    given = values(drawn(2))
    loaded.update(given)
    expected = logits(context)
    for value in given.values():
        value += 1.0
    loaded.update({})
    assert np.array_equal(logits(context), expected)
    loaded.close()


@pytest.mark.parametrize("writing", WRITINGS)
def test_an_adapter_that_is_off_or_closed_leaves_exactly_the_base_model(
    model: Model, context: Context, writing: Writing
) -> None:
    base = logits(context)
    loaded = LoadedAdapter(model, adapter(1), writing=writing)
    assert np.array_equal(logits(context), base)
    loaded.attach(context, True)
    on = logits(context)
    loaded.attach(context, False)
    assert np.array_equal(logits(context), base)
    loaded.update(values(drawn(2)))
    assert np.array_equal(logits(context), base)
    loaded.update(values(drawn(1)))
    loaded.attach(context, True)
    assert np.array_equal(logits(context), on)
    loaded.close()
    assert np.array_equal(logits(context), base)


@pytest.mark.parametrize("writing", WRITINGS)
def test_one_adapter_serves_several_contexts_each_on_or_off(model: Model, context: Context, writing: Writing) -> None:
    base = logits(context)
    with Context(model, context.options) as other:
        loaded = LoadedAdapter(model, adapter(1), writing=writing)
        loaded.attach(context, True)
        loaded.attach(other, False)
        loaded.update(values(drawn(2)))
        assert np.array_equal(logits(other), base)
        loaded.attach(other, True)
        assert np.array_equal(logits(other), logits(context))
        loaded.close()


@pytest.mark.parametrize("writing", WRITINGS)
def test_an_adapter_outlives_its_context_and_may_be_closed_twice(
    model: Model, context: Context, writing: Writing
) -> None:
    loaded = LoadedAdapter(model, adapter(1), writing=writing)
    loaded.attach(context, True)
    context.close()
    loaded.update(values(drawn(2)))
    loaded.close()
    loaded.close()
    assert not loaded.handle


def test_no_temporary_file_stays_behind(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = LoadedAdapter(model, adapter(1), writing="temp-file")
    loaded.update(values(drawn(2)))
    loaded.close()
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_made_for_another_model_is_refused_with_the_reason_of_each_way(model: Model) -> None:
    name = "blk.0.attn_q.weight"
    a, b = np.ones((RANK, 32), np.float32), np.ones((64, RANK), np.float32)
    with pytest.raises(EngineError) as refused:
        LoadedAdapter(model, Adapter(architecture="llama", alpha=ALPHA, tensors={name: (a, b)}))
    sentence = str(refused.value)
    assert sentence.startswith("the adapter cannot be loaded: in-place: ")
    assert [way for way in WRITINGS if f"{way}: llama.cpp refused the adapter" in sentence] == list(WRITINGS)


def test_numbers_that_cannot_be_are_refused_and_the_adapter_stays_as_it_was(path: Path) -> None:
    """In another process: a handle that was freed and is used again ends it."""
    code = f"""
from pathlib import Path
import numpy as np
from fwdllama.errors import FwdllamaError
from fwdllama.llama.context import Context
from fwdllama.llama.model import Model
from gguf_tools.errors import FileError
from tests.llama import test_adapter as t
from fwdllama.llama.context import ContextOptions
with Model(Path({str(path)!r})) as model:
    options = ContextOptions(n_ctx_seq=64, n_seq=1, n_outputs=16, n_batch=16, n_threads=1)
    for writing in {WRITINGS!r}:
        with Context(model, options) as context:
            loaded = t.LoadedAdapter(model, t.adapter(1), writing=writing)
            loaded.attach(context, True)
            before = t.logits(context)
            try:
                loaded.update({{"blk.0.attn_q.weight.lora_b": np.full((64, 4), np.nan, np.float32)}})
            except (FwdllamaError, FileError) as error:
                print(writing, "refused", np.array_equal(t.logits(context), before))
            loaded.close()
"""
    environment = {"PYTHONPATH": os.pathsep.join(["", *sys.path]), "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{writing} refused True" for writing in WRITINGS]), done.stderr[-400:]
