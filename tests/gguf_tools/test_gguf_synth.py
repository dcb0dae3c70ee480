"""Tiny models are real ones: llama.cpp loads them, tokenises and decodes with them, and adapters change them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf.quants import dequantize

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.blocks import RANDOM_TYPES, random_values
from gguf_tools.errors import FileError
from gguf_tools.model import read_model_info
from gguf_tools.shape import PRESETS, TINY
from gguf_tools.stream import OutTensor, write_streamed
from gguf_tools.synth import write_like, write_llama, write_tiny_llama
from tests.stopwatch import quick

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
    quick(lambda: write_tiny_llama(tmp_path / "tiny.gguf"), within_s=0.2)


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


@pytest.mark.parametrize("kind", RANDOM_TYPES)
def test_random_weights_of_every_type_spread_as_asked(kind: str) -> None:
    rng = np.random.Generator(np.random.Philox(7))
    raw = random_values(rng, 256 * 256, RANDOM_TYPES[kind], 0.02)
    values = dequantize(raw.reshape(256, -1), RANDOM_TYPES[kind]).astype(np.float64)
    assert values.shape == (256, 256)
    assert np.std(values) == pytest.approx(0.02, rel=0.04)
    assert abs(np.mean(values)) < 0.001
    assert len(np.unique(values)) > 2


@pytest.mark.parametrize("kind", ["bf16", "int4", "q5_1", "Q2_K", "Q4_K", "Q6_K", "iq3_s", "IQ4_XS", "TQ1_0"])
def test_llama_cpp_computes_with_random_blocks_of_every_kind(kind: str, tmp_path: Path, open_llama: OpenLlama) -> None:
    shape = replace(TINY, n_layers=2, n_embd=256, n_ff=256)
    path = write_llama(tmp_path / "k.gguf", shape, type=kind)
    logits = open_llama(path).logits(list(range(5, 40)))
    assert np.isfinite(logits).all()
    assert np.std(logits) == pytest.approx(0.5, rel=0.2)


def test_named_shapes_are_those_of_the_models() -> None:
    sizes = {name: sum(math.prod(each) for each in shape.tensors().values()) for name, shape in PRESETS.items()}
    assert sizes == {
        "tiny": 131_520, "smollm2-135m": 134_515_008, "tinyllama-1.1b": 1_100_048_384, "llama-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320, "llama3-8b": 8_030_261_248,
    }  # fmt: skip


def test_a_model_like_another_has_its_shapes_tokenizer_and_template_but_other_weights(tmp_path: Path, open_llama: OpenLlama) -> None:
    model = write_tiny_llama(tmp_path / "model.gguf", type="Q4_0", n_layers=2, context_length=99)
    for kind, stored in ((None, "Q4_0"), ("q8_0", "Q8_0")):
        info = read_model_info(write_like(tmp_path / "like.gguf", model, type=kind, seed=1, force=True))
        like = read_model_info(model)
        assert (info.context_length, info.chat_template, info.quantisation) == (99, like.chat_template, stored)
        assert {name: shape for name, (shape, _) in info.tensors.items()} == {name: shape for name, (shape, _) in like.tensors.items()}
        llama, before = open_llama(info.path), open_llama(model)
        assert llama.tokenise(TEXT) == before.tokenise(TEXT)
        assert np.std(llama.logits([5, 6, 7])) == pytest.approx(0.5, rel=0.3)
        assert np.abs(llama.logits([5, 6, 7]) - before.logits([5, 6, 7])).max() > 0.5
    with pytest.raises(FileError, match=r"model.gguf: is the model to imitate as well"):
        write_like(model, model, force=True)


@pytest.mark.parametrize(
    ("shape", "kind", "sentence"),
    [
        (TINY, "Q9", "tensor type 'Q9' cannot be made at random; these can: F32, F16, BF16, Q4_0"),
        (TINY, "Q4_K", "token_embd.weight has rows of 64 values, but Q4_K needs whole blocks of 256"),
        (replace(TINY, n_layers=0), "F32", "n_layers is 0, but must be 1 to 16777216"),
    ],
)
def test_what_makes_no_model_is_refused(shape: Any, kind: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=sentence):
        write_llama(tmp_path / "x.gguf", shape, type=kind)
    assert not list(tmp_path.iterdir())


def test_a_file_larger_than_the_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    huge = OutTensor("x", (1 << 20, 1 << 30), gguf.GGMLQuantizationType.F32, list)
    with pytest.raises(FileError, match=r"x.gguf: needs 4194304.00 GiB, but its disk has \d+\.\d\d GiB left"):
        write_streamed(tmp_path / "x.gguf", gguf.GGUFWriter(None, "llama"), [huge])
    assert not list(tmp_path.iterdir())


MEMORY = """
import resource, sys
from gguf_tools.shape import PRESETS
from gguf_tools.synth import write_llama
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
write_llama(sys.argv[1], PRESETS["smollm2-135m"], type="Q4_0")
print((peak() - before) / 1024)
"""


def test_a_large_model_takes_little_memory_to_write(tmp_path: Path) -> None:
    """76 MB of file; most of what is needed is the vocabulary."""
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "x.gguf")], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 40
    assert (tmp_path / "x.gguf").stat().st_size == pytest.approx(134_515_008 * 4.5 / 8, rel=0.02)
