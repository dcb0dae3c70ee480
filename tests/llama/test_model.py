"""A model in memory tells its sizes, its tokens and its ends, and refuses in words what llama.cpp cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import ModelError
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.types import Segment
from gguf_tools.errors import FileError
from gguf_tools.synth import write_tiny_llama

END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model(path) as opened:
        yield opened


def test_a_model_tells_its_sizes_and_special_tokens(model: Model) -> None:
    assert (model.n_vocab, model.n_embd, model.n_layers) == (320, 64, 3)
    assert (model.bos, model.end, model.end_of_turn, model.adds_bos) == (END_OF_TEXT, END_OF_TEXT, TURN_END, False)
    assert [model.is_end(token) for token in (END_OF_TEXT, TURN_END, TURN_START, 77)] == [True, True, False, False]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60))
def test_the_pieces_of_a_texts_tokens_are_the_text(model: Model, text: str) -> None:
    tokens = model.tokenize(text)
    assert b"".join(model.piece(token) for token in tokens).decode() == text
    assert not {END_OF_TEXT, TURN_START, TURN_END} & set(tokens)


def test_control_tokens_are_recognised_only_where_they_are_meant(model: Model) -> None:
    spelled = model.tokenize("<|im_end|>")
    assert len(spelled) > 1
    assert model.tokenize("<|im_end|>", special=True) == [TURN_END]
    assert model.piece(TURN_END) == b""
    segments = (Segment("<|im_start|>", special=True), Segment("<|im_end|>"), Segment("<|im_end|>", special=True))
    assert model.encode(segments) == [TURN_START, *spelled, TURN_END]


def test_however_the_weights_are_held_they_are_the_same_model(path: Path) -> None:
    tokens = np.arange(40, 52, dtype=np.int32)
    ramp, zeros = np.arange(12, dtype=np.int32), np.zeros(12, np.int32)
    options = ContextOptions(n_ctx_seq=64, n_seq=1, n_outputs=12, n_batch=16, n_threads=1, flash=False)
    found = []
    for held in (
        ModelOptions(),
        ModelOptions(mmap=True, repack=False),
        ModelOptions(mmap=True),
        ModelOptions(repack=False),
    ):
        with Model(path, held) as model, Context(model, options) as context:
            assert model.options == held
            logits = context.decode(tokens, ramp, zeros, np.ones(12, np.int8))
            assert logits is not None
            found.append(logits.copy())
    assert max(float(np.abs(logits - found[0]).max()) for logits in found) < 0.05
    assert np.array_equal(found[0], found[2])  # mapped or read, the numbers are the same


def test_a_file_that_is_no_model_is_refused_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(FileError, match=r"text\.gguf"):
        Model(tmp_path / "text.gguf")


def test_a_model_that_llama_cpp_cannot_load_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "strange.gguf", architecture="strange")
    sentence = r"strange\.gguf: llama\.cpp cannot load this model \(architecture 'strange'\)\. Run with --debug "
    with pytest.raises(ModelError, match=sentence):
        Model(path)


def test_a_model_may_be_closed_twice(path: Path) -> None:
    model = Model(path)
    model.close()
    model.close()
    assert model.handle is None
