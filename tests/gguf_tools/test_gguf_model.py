"""Reading what a model is: right where the file is right, a sentence where it is not."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.alphabet import CHAT_TEMPLATE
from gguf_tools.errors import FileError
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.synth import write_tiny_llama
from tests.stopwatch import quick


def write_model(path: Path, *, leave_out: str = "", **values: Any) -> Path:
    """A model of two layers with one tensor; `values` replace or add metadata by the last part of their key."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": 2, "embedding_length": 64, "context_length": 128, "attention.head_count": 4}
    for key, value in numbers.items():
        if key not in (leave_out, *values):
            writer.add_uint32(f"llama.{key}", value)
    if leave_out != "tokenizer":
        writer.add_tokenizer_model(str(values.pop("tokenizer_model", "gpt2")))
        writer.add_tokenizer_pre(str(values.pop("tokenizer_pre", "gpt-2")))
        writer.add_token_list(values.pop("tokens", ["a", "b", "c"]))
    for key, raw in values.items():
        key = key if key.split(".")[0] in ("general", "split", "tokenizer") else f"llama.{key}"
        kinds = {int: "uint32", str: "string", list: "array", bool: "bool", float: "float32"}
        getattr(writer, f"add_{kinds[type(raw)]}")(key, raw)
    if leave_out != "token_embd":
        writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0")


def test_a_model_is_described_as_it_was_written(tiny: Path) -> None:
    info = read_model_info(tiny)
    assert (info.path, info.architecture, info.name) == (tiny, "llama", "random llama 0")
    assert (info.n_layers, info.n_embd, info.n_head, info.n_head_kv, info.n_vocab) == (3, 64, 4, 2, 320)
    assert (info.context_length, info.size_bytes) == (2048, tiny.stat().st_size)
    assert (info.quantisation, info.file_type) == ("Q8_0", 7)
    assert info.tensors["blk.2.attn_k.weight"] == ((32, 64), "Q8_0")
    assert info.tensors["blk.0.ffn_down.weight"] == ((64, 128), "Q8_0")
    assert info.tensors["output_norm.weight"] == ((64,), "F32")
    assert info.tied_embeddings
    assert info.chat_template == CHAT_TEMPLATE
    assert (info.bos_token, info.eos_token, info.eot_token, info.add_bos) == (0, 0, 2, False)


def test_an_output_matrix_means_embeddings_are_not_tied(tmp_path: Path) -> None:
    info = read_model_info(write_tiny_llama(tmp_path / "untied.gguf", tied=False))
    assert not info.tied_embeddings
    assert info.tensors["output.weight"] == ((320, 64), "F32")


def test_kv_cache_of_llama_7b_takes_512_kib_a_token(tmp_path: Path) -> None:
    values: dict[str, Any] = {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32}
    info = read_model_info(write_model(tmp_path / "m.gguf", **values))
    assert info.kv_bytes_per_token() == 512 * 1024
    assert info.kv_bytes_per_token("q8_0", "Q8_0") == 512 * 1024 * 17 // 32  # 34 bytes for 32 values
    with pytest.raises(FileError, match=r"KV cache type 'Q9' is unknown"):
        info.kv_bytes_per_token("Q9")


def test_kv_cache_counts_each_layer_and_both_head_sizes(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "attention.head_count_kv": [4, 0],
        "attention.key_length": 24,
        "attention.value_length": 8,
    }
    info = read_model_info(write_model(tmp_path / "m.gguf", **values))
    assert (info.kv_heads, info.n_head_kv) == ((4, 0), 4)
    assert info.kv_bytes_per_token("F16", "F32") == 4 * (24 * 2 + 8 * 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (None, None, None, False)),  # the default of gpt2, token 11, is not in this vocabulary
        ({"tokenizer_model": "llama"}, (1, 2, None, True)),
        ({"tokenizer_pre": "llama-bpe"}, (None, None, None, True)),
        ({"tokenizer_pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, (None, None, None, False)),
        ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 3}, (None, 0, None, False)),
        ({"tokens": ["<|endoftext|>", "x", "<|im_end|>"]}, (None, None, 2, False)),
        ({"tokens": ["<|endoftext|>", "x", "<|im_end|>"], "tokenizer.ggml.eot_token_id": 1}, (None, None, 1, False)),
    ],
)
def test_special_tokens_are_those_llama_cpp_would_use(
    values: dict[str, Any], expected: tuple[int | None, int | None, int | None, bool], tmp_path: Path
) -> None:
    info = read_model_info(write_model(tmp_path / "m.gguf", **values))
    assert (info.bos_token, info.eos_token, info.eot_token, info.add_bos) == expected


def test_a_model_without_a_name_is_named_after_its_file(tmp_path: Path) -> None:
    assert read_model_info(write_model(tmp_path / "nameless.gguf")).name == "nameless"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"leave_out": "tokenizer"}, "has no tokenizer"),
        ({"tokenizer_model": "none"}, "has no tokenizer"),
        ({"tokens": [1, 2, 3]}, "has no tokenizer"),
        ({"leave_out": "token_embd"}, "holds no tensor token_embd.weight"),
        ({"leave_out": "block_count"}, "llama.block_count is missing, but must be 1 to 10000"),
        ({"block_count": 0}, "llama.block_count is 0, but must be 1 to 10000"),
        ({"block_count": "two"}, "llama.block_count is of type STRING, but must be an integer"),
        ({"context_length": 1.5}, "llama.context_length is of type FLOAT32, but must be an integer"),
        ({"attention.head_count": [4]}, "llama.attention.head_count has 1 values, but must have 2"),
        ({"attention.head_count": [0, 0]}, "models without attention are not supported"),
        ({"attention.head_count": ["a", "b"]}, "must be an array of integers, not of STRING"),
        ({"split.count": 3}, "is one of 3 parts of a split model, which is not supported; join them with"),
        ({"general.type": "mmproj"}, "general.type is 'mmproj', but a base model was expected"),
        ({"general.architecture": "a\nb"}, r"general.architecture is 'a\\nb', but must name an architecture"),
        ({"general.architecture": 7}, "general.architecture is of type UINT32, but must be a string"),
    ],
)  # fmt: skip
def test_an_unfit_model_is_refused_with_the_reason(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "unfit.gguf", **options)
    with pytest.raises(FileError, match=sentence) as caught:
        read_model_info(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    zeros = np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32)
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 1.0, {"blk.0.attn_q.weight": zeros}))
    with pytest.raises(FileError, match=r"a.gguf: is an adapter, but a base model was expected"):
        read_model_info(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        (0, "is empty"),
        (3, "is not a GGUF file"),
        (12, "the number of tensors at byte 8 needs 8 bytes, but 4 are left; the file is truncated or damaged"),
        (24, "claims 29 tensors at byte 8, but at most 0 can follow; the file is truncated or damaged"),
        (1000, "claims 320 elements of tokenizer.ggml.tokens at byte .* truncated or damaged"),
        (60_000, "is truncated: .* ends at byte"),
        (-1, "is truncated: .* ends at byte"),
    ],
)
def test_a_truncated_model_is_refused(keep: int, sentence: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(FileError, match=sentence):
        read_model_info(path)


def test_a_vocabulary_of_256000_tokens_is_read_in_under_a_second(tmp_path: Path) -> None:
    path = write_model(tmp_path / "large.gguf", tokens=[f"token{i}" for i in range(256_000)])
    assert quick(lambda: read_model_info(path), within_s=1).n_vocab == 256_000


def small_model() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"n_layers": 1, "n_embd": 8, "n_head": 2, "n_head_kv": 1, "n_ff": 8, "n_vocab": 300}
        return write_tiny_llama(Path(folder) / "m.gguf", **sizes).read_bytes()


SMALL_MODEL = small_model()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 16_000), st.integers(0, 255)), max_size=3),
    st.integers(0, 16_000) | st.just(1 << 30),
)
def test_a_mutated_model_is_read_or_is_a_file_error(flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(SMALL_MODEL)
    for at, value in flips:
        data[at % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data[:cut])
        message = f"{path}: "
        try:
            read_model_info(path)
        except FileError as error:
            message = str(error)
        assert message.startswith(f"{path}: ")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"model" * 1000)
    assert file_sha256(path) == hashlib.sha256(b"model" * 1000).hexdigest()


def test_sha256_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"one")
    digest = file_sha256(path, cache)
    stored = json.loads((cache / "sha256.json").read_text())
    stored[str(path)][2] = "remembered"
    (cache / "sha256.json").write_text(json.dumps(stored))
    assert file_sha256(path, cache) == "remembered"
    path.write_bytes(b"two!")
    assert file_sha256(path, cache) == hashlib.sha256(b"two!").hexdigest() != digest


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"x": 1}', struct.pack("<I", 7)])
def test_a_damaged_digest_cache_is_rebuilt(content: bytes, tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"one")
    cache.mkdir()
    (cache / "sha256.json").write_bytes(content)
    assert file_sha256(path, cache) == hashlib.sha256(b"one").hexdigest()
    assert str(path) in json.loads((cache / "sha256.json").read_text())


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_sha256(path, path / "not a folder") == hashlib.sha256(b"one").hexdigest()


def test_sha256_of_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"gone: cannot be read: No such file or directory"):
        file_sha256(tmp_path / "gone")


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "directory": (lambda path: path.mkdir(), "is a directory, but a GGUF file was expected"),
    "empty": (lambda path: path.touch(), "is empty, but a GGUF file was expected"),
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "file as a folder": (lambda path: None, "cannot be read: Not a directory|does not exist"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    make, sentence = UNREADABLE[name]
    path = tmp_path / "model.gguf"
    make(path)
    if name == "file as a folder":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "model.gguf"
    with pytest.raises(FileError, match=sentence):
        read_model_info(path)


def test_a_zero_byte_in_the_path_is_refused() -> None:
    with pytest.raises(FileError, match=r"is not a path"):
        read_model_info("a\0b")
