"""Tiny models are real ones: llama.cpp loads them, tokenises and decodes with them, and adapters change them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.errors import FileError
from gguf_tools.model import read_model_info
from gguf_tools.synth import write_tiny_llama

OpenLlama = Callable[..., Any]
TEXT = "The cat sat on the mat, naïvely: 3 € + 4.\n"


def mean_loss(logits: np.ndarray[Any, Any], tokens: list[int]) -> float:
    rows = logits[:-1].astype(np.float64)
    log_total = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    return float(np.mean(log_total - rows[np.arange(len(rows)), tokens[1:]]))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_reads_a_tiny_model_and_is_as_uncertain_as_it_should_be(
    kind: Any, tied: bool, tmp_path: Path, open_llama: OpenLlama
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", type=kind, tied=tied)
    llama = open_llama(path)
    tokens = np.random.default_rng(0).integers(3, 320, 120).tolist()
    assert mean_loss(llama.logits(tokens), tokens) == pytest.approx(math.log(320), abs=0.35)


def test_text_survives_tokenisation_and_common_pairs_are_merged(tmp_path: Path, open_llama: OpenLlama) -> None:
    llama = open_llama(write_tiny_llama(tmp_path / "tiny.gguf"))
    tokens = llama.tokenise(TEXT)
    assert llama.text(tokens) == TEXT
    assert len(tokens) < len(TEXT.encode())
    assert llama.tokenise("<|im_start|>hi<|im_end|>", special=True)[0] == 1
    assert llama.tokenise("<|im_start|>", special=False)[0] != 1


def test_special_tokens_are_the_ones_that_llama_cpp_finds(tmp_path: Path, open_llama: OpenLlama) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    llama, info = open_llama(path), read_model_info(path)
    assert llama_cpp.llama_vocab_bos(llama.vocab) == info.bos_token == 0
    assert llama_cpp.llama_vocab_eos(llama.vocab) == info.eos_token == 0
    assert llama_cpp.llama_vocab_eot(llama.vocab) == info.eot_token == 2
    assert llama_cpp.llama_vocab_get_add_bos(llama.vocab) == info.add_bos
    assert llama_cpp.llama_vocab_n_tokens(llama.vocab) == info.n_vocab
    template = llama_cpp.llama_model_chat_template(llama.model, None)
    assert template.decode() == info.chat_template


def test_an_adapter_computes_what_adding_b_a_to_the_weights_computes(tmp_path: Path, open_llama: OpenLlama) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(3)
    tensors = {}
    for name, (shape, _) in read_model_info(path).tensors.items():
        if name.startswith("blk.") and len(shape) == 2:
            a, b = rng.standard_normal((4, shape[1])), 0.02 * rng.standard_normal((shape[0], 4))
            tensors[name] = a.astype(np.float32), b.astype(np.float32)
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 8.0, tensors))
    shutil.copy(path, tmp_path / "merged.gguf")
    merged = gguf.GGUFReader(tmp_path / "merged.gguf", "r+")
    for tensor in merged.tensors:
        if tensor.name in tensors:
            low, high = tensors[tensor.name]
            tensor.data[:] += 8.0 / 4 * high @ low
    merged.data.flush()
    tokens = open_llama(path).tokenise(TEXT)
    base, adapted = open_llama(path).logits(tokens), open_llama(path, tmp_path / "a.gguf").logits(tokens)
    np.testing.assert_allclose(adapted, open_llama(tmp_path / "merged.gguf").logits(tokens), atol=0.01)
    assert np.abs(adapted - base).max() > 0.1


def test_an_adapter_whose_b_is_zero_changes_nothing(tmp_path: Path, open_llama: OpenLlama) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    pair = np.ones((8, 64), np.float32), np.zeros((64, 8), np.float32)
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 8.0, {"blk.1.attn_q.weight": pair}))
    tokens = open_llama(path).tokenise(TEXT)
    adapted = open_llama(path, tmp_path / "a.gguf").logits(tokens)
    assert adapted.tobytes() == open_llama(path).logits(tokens).tobytes()


def test_a_tiny_model_of_other_sizes_is_written_and_loaded(tmp_path: Path, open_llama: OpenLlama) -> None:
    path = write_tiny_llama(
        tmp_path / "wide.gguf", n_layers=2, n_embd=96, n_head=6, n_head_kv=3, n_ff=160, n_vocab=1200, context_length=64
    )
    info = read_model_info(path)
    assert (info.n_layers, info.n_embd, info.n_vocab, info.context_length) == (2, 96, 1200, 64)
    assert open_llama(path).logits([5, 6]).shape == (2, 1200)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    one, same, other = (write_tiny_llama(tmp_path / f"{i}.gguf", seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def test_a_tiny_model_is_written_in_milliseconds(tmp_path: Path) -> None:
    start = time.process_time()
    write_tiny_llama(tmp_path / "tiny.gguf")
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"n_vocab": 299}, "n_vocab is 299, but 256 byte tokens, 3 special ones and merges need at least 300"),
        ({"n_embd": 60}, "60 values do not divide into 4 heads of even size over 2 KV heads"),
        ({"n_head_kv": 3}, "over 3 KV heads"),
        ({"n_ff": 100, "type": "Q4_0"}, "blk.0.ffn_down.weight has rows of 100 values, but Q4_0 needs whole blocks of 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=sentence):
        write_tiny_llama(tmp_path / "tiny.gguf", **sizes)
    assert not list(tmp_path.iterdir())


def test_a_tiny_model_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"tiny.gguf: the folder .*gone does not exist; create it first"):
        write_tiny_llama(tmp_path / "gone" / "tiny.gguf")


def test_reading_writing_and_checking_files_does_not_import_llama_cpp() -> None:
    code = "import sys, gguf_tools.synth, gguf_tools.quantize, gguf_tools.adapter; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import llama_cpp; {code}"], check=False).returncode == 1
