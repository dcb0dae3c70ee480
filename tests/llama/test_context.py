"""A context decodes what it is given, keeps sequences apart, forgets exactly, and refuses what would abort."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.errors import EngineError, ResourceError
from fwdllama.llama.context import KV_TYPES, Context, ContextOptions
from fwdllama.llama.model import Model
from gguf_tools.synth import write_tiny_llama
from tests.reference import TinyLlama

TOKENS = np.random.default_rng(4).integers(3, 300, 24).astype(np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model(path) as opened:
        yield opened


def options(**changes: Any) -> ContextOptions:
    usual: dict[str, Any] = {"n_ctx_seq": 64, "n_seq": 4, "n_outputs": 64, "n_batch": 64, "n_threads": 1}
    usual |= {"kv_type": "f32", "flash": False}  # flash attention rounds more, so only some tests use it
    return ContextOptions(**{**usual, **changes})


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, options()) as opened:
        yield opened


def decoded(context: Context, tokens: NDArray[Any], *, start: int = 0, sequence: int = 0) -> NDArray[np.float32]:
    """A copy of the logits (n, n_vocab) of every token."""
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    logits = context.decode(tokens, positions, np.full(len(tokens), sequence, np.int32), np.ones(len(tokens), np.int8))
    assert logits is not None
    return logits.copy()


@pytest.mark.parametrize(
    ("flash", "kv_type", "noise"), [(False, "f32", 2e-5), (True, "f32", 5e-3), (True, "f16", 5e-3)]
)
def test_logits_are_those_of_the_model_worked_out_by_hand(
    model: Model, path: Path, flash: bool, kv_type: str, noise: float
) -> None:
    with Context(model, options(flash=flash, kv_type=kv_type)) as context:
        logits = decoded(context, TOKENS)
    assert np.abs(logits - TinyLlama(path).logits(TOKENS.tolist())).max() < noise


def test_decoding_in_pieces_is_decoding_at_once(context: Context) -> None:
    at_once = decoded(context, TOKENS)
    pieces = [decoded(context, TOKENS[i : i + 5], start=i, sequence=1) for i in range(0, len(TOKENS), 5)]
    assert np.abs(np.concatenate(pieces) - at_once).max() < 2e-5


def test_only_the_wanted_rows_come_back_in_the_order_of_their_tokens(context: Context) -> None:
    every = decoded(context, TOKENS)
    wants = np.zeros(len(TOKENS), np.int8)
    wants[[3, 11, 20]] = 1
    ramp = np.arange(len(TOKENS), dtype=np.int32)
    logits = context.decode(TOKENS, ramp, np.full(len(TOKENS), 2, np.int32), wants)
    assert logits is not None
    assert logits.shape == (3, context.model.n_vocab)
    assert np.abs(logits - every[[3, 11, 20]]).max() < 2e-5


def test_a_decode_that_wants_nothing_returns_nothing(context: Context) -> None:
    ramp = np.arange(4, dtype=np.int32)
    assert context.decode(TOKENS[:4], ramp, np.zeros(4, np.int32), np.zeros(4, np.int8)) is None


def test_sequences_do_not_see_each_other(context: Context) -> None:
    alone = decoded(context, TOKENS[:8])
    decoded(context, TOKENS[8:16], sequence=1)
    context.clear()
    decoded(context, TOKENS[8:16], sequence=1)
    assert np.array_equal(decoded(context, TOKENS[:8]), alone)


def test_an_answer_forgotten_and_decoded_again_is_bit_equal(context: Context) -> None:
    decoded(context, TOKENS[:10])
    first = decoded(context, TOKENS[10:14], start=10)
    for other in (TOKENS[14:18], TOKENS[14:24]):
        context.forget(0, 10)
        decoded(context, other, start=10)
    context.forget(0, 10)
    assert np.array_equal(decoded(context, TOKENS[10:14], start=10), first)


def test_a_position_that_was_not_forgotten_is_refused_in_words(context: Context) -> None:
    decoded(context, TOKENS[:10])
    with pytest.raises(EngineError, match=r"^llama_decode failed with -1 \(invalid batch\) on 4 tokens\.$"):
        decoded(context, TOKENS[:4], start=5)


def test_a_copied_sequence_goes_on_like_its_source_and_leaves_it_alone(context: Context) -> None:
    decoded(context, TOKENS[:10])
    context.copy(0, 3)
    context.forget(3, 6)
    decoded(context, TOKENS[20:24], start=6, sequence=3)
    context.forget(3, 6)
    decoded(context, TOKENS[6:10], start=6, sequence=3)
    source, copy = (decoded(context, TOKENS[10:14], start=10, sequence=sequence) for sequence in (0, 3))
    assert np.abs(source - copy).max() < 2e-5


def test_a_copy_is_what_its_source_held_though_another_state_is_restored_there_at_once(context: Context) -> None:
    first = decoded(context, TOKENS[:6])
    decoded(context, TOKENS[10:14], sequence=1)
    other = context.saved(1)
    context.copy(0, 3)
    context.restore(0, other)
    assert np.abs(decoded(context, TOKENS[14:16], start=4, sequence=0) - decoded(context, TOKENS[14:16], start=4, sequence=1)).max() < 2e-5
    context.forget(3, 5)
    assert np.abs(decoded(context, TOKENS[5:6], start=5, sequence=3)[0] - first[5]).max() < 2e-5


def test_clear_forgets_every_sequence(context: Context) -> None:
    for sequence in (0, 1):
        decoded(context, TOKENS[:5], sequence=sequence)
    context.clear()
    fresh = decoded(context, TOKENS[5:8], sequence=1)
    with Context(context.model, options()) as other:
        assert np.array_equal(fresh, decoded(other, TOKENS[5:8], sequence=1))


def test_inputs_of_the_first_layer_given_as_numbers_are_the_tokens_they_stand_for(context: Context, path: Path) -> None:
    embeddings = TinyLlama(path).weights["token_embd.weight"][TOKENS].astype(np.float32)
    by_token = decoded(context, TOKENS)
    by_number = decoded(context, embeddings, sequence=1)
    assert np.array_equal(by_token, by_number)
    assert np.array_equal(decoded(context, TOKENS, sequence=2), by_token)


@pytest.mark.parametrize("tokens", [TOKENS.astype(np.int64), np.zeros((8, 63), np.float32), np.zeros(8, np.float32)])
def test_inputs_of_another_type_or_width_are_refused_before_llama_cpp_reads_beyond_them(
    context: Context, tokens: NDArray[Any]
) -> None:
    with pytest.raises(EngineError, match=r"int32.*\(n, 64\)"):
        decoded(context, tokens[:8])


def test_a_decode_of_too_many_tokens_or_outputs_is_refused_before_llama_cpp_aborts(model: Model) -> None:
    with Context(model, options(n_batch=16, n_outputs=5)) as context:
        with pytest.raises(EngineError, match=r"^a decode of 17 tokens and 17 outputs exceeds the .* 16 and 5\.$"):
            decoded(context, TOKENS[:17])
        with pytest.raises(EngineError, match=r"^a decode of 6 tokens and 6 outputs exceeds the context's 16 and 5\.$"):
            decoded(context, TOKENS[:6])
        assert len(decoded(context, TOKENS[:5])) == 5


@pytest.mark.parametrize("sizes", ["n_seq=4, n_outputs=1, n_batch=16", "n_seq=1, n_outputs=1, n_batch=512"])
def test_sizes_that_llama_cpp_adjusts_by_itself_do_not_abort_the_process(path: Path, sizes: str) -> None:
    """It asks for an output a sequence, and cuts n_batch to n_ctx. In another process: it would end this one."""
    code = f"""
import numpy as np
from pathlib import Path
from fwdllama.errors import EngineError
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
options = ContextOptions(n_ctx_seq=256, {sizes}, n_threads=1)
with Model(Path({str(path)!r})) as model, Context(model, options) as context:
    n = context.options.n_batch
    tokens, ramp = np.full(n, 5, np.int32), np.arange(n, dtype=np.int32)
    try:
        context.decode(tokens, ramp, np.zeros(n, np.int32), np.zeros(n, np.int8))
    except EngineError as error:
        print(error)
"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-400:]
    refused = "a decode of 512 tokens and 0 outputs exceeds the context's 256 and 1.\n"
    assert done.stdout == (refused if "512" in sizes else "")


def test_a_sequence_that_is_full_is_refused_in_words(model: Model) -> None:
    with Context(model, options(n_ctx_seq=256, n_seq=1, n_batch=200, n_outputs=200)) as context:
        decoded(context, np.resize(TOKENS, 200))
        with pytest.raises(
            EngineError, match=r"^llama_decode failed with 1 \(no room in the KV cache\) on 60 tokens\.$"
        ):
            decoded(context, np.resize(TOKENS, 60), start=200)


def test_a_context_that_llama_cpp_cannot_make_is_refused_with_its_size_and_model(model: Model, path: Path) -> None:
    with pytest.raises(ResourceError, match=rf"^llama\.cpp cannot create a context of 4 x 64 tokens for {path}: "):
        Context(model, options(kv_type="q8_0", flash=True))  # heads of 16 values do not fill a block of 32


def test_every_kv_type_on_offer_is_one_of_llama_cpps(tmp_path: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide.gguf", n_layers=1, n_embd=128, n_head=4, n_head_kv=4)  # heads of 32 values
    exact = TinyLlama(wide).logits(TOKENS.tolist())
    with Model(wide) as model:
        for kv_type in KV_TYPES:
            with Context(model, options(kv_type=kv_type, flash=True)) as context:
                assert np.abs(decoded(context, TOKENS) - exact).max() < 0.5, kv_type


def test_decodes_are_counted_and_timed(context: Context) -> None:
    decoded(context, TOKENS[:7])
    spent = context.decode_s
    decoded(context, TOKENS[7:10], start=7)
    assert context.n_decoded == 10
    assert 0 < spent < context.decode_s


def test_a_context_and_a_model_may_be_closed_twice(path: Path) -> None:
    model = Model(path)
    context = Context(model, options())
    for opened in (context, context, model, model):
        opened.close()
    assert context.handle is None
    assert model.handle is None
