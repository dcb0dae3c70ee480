"""Hostile adapter files, written byte by byte: a sentence for each, at once, and never another exception."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.synth import write_tiny_llama
from gguf_tools.validate import check_adapter, validate_adapter
from tests.gguf_tools.forge import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    NAME,
    STRING,
    T_F16,
    T_I32,
    T_Q8_0,
    U32,
    Crafted,
    Tensor,
    array,
    entry,
    pair,
    text,
    tokens_entry,
)
from tests.gguf_tools.refusal import check_refusal
from tests.stopwatch import quick

GOOD = Crafted()


def keyed(*extra: bytes) -> Crafted:
    return replace(GOOD, extra=extra)


def of(*tensors: Tensor) -> Crafted:
    return replace(GOOD, tensors=tensors)


def alpha(kind: int, payload: bytes) -> Crafted:
    return replace(GOOD, alpha=entry("adapter.lora.alpha", kind, payload))


A, B = GOOD.tensors
NAN = struct.pack("<256I", *[0] * 255, 0x7FC00000)
INFINITE_F16 = struct.pack("<256H", 0x7C00, *[0] * 255)

HOSTILE: dict[str, tuple[Crafted, str]] = {
    "magic": (replace(GOOD, magic=b"GGML"), r"is not a GGUF file; it begins with b'GGML'"),
    "version 1": (replace(GOOD, version=1), r"is GGUF version 1 .* versions 2 and 3 are read"),
    "big endian": (replace(GOOD, version=3 << 24), r"big-endian"),
    "tensor count": (
        replace(GOOD, n_tensors=1 << 62),
        r"claims 4611686018427387904 tensors at byte 8, but at most 8000",
    ),
    "tensor count of -1": (replace(GOOD, n_tensors=(1 << 64) - 1), r"claims 18446744073709551615 tensors"),
    "key count": (replace(GOOD, n_keys=1 << 40), r"claims 1099511627776 metadata values at byte 16"),
    "one key too many": (
        replace(GOOD, n_keys=5),
        r"a tensor name at byte \d+ is \d+ bytes long, but must have 1 to 63",
    ),
    "one tensor too many": (replace(GOOD, n_tensors=3), r"tensor name at byte \d+ is 0 bytes long"),
    "key length": (keyed(struct.pack("<Q", 1 << 60)), r"a metadata key at byte \d+ is 1152921504606846976"),
    "empty key": (keyed(entry("", U32, bytes(4))), r"a metadata key at byte \d+ is 0 bytes long"),
    "key not UTF-8": (keyed(entry(b"\xff\xfe", U32, bytes(4))), r"key at byte \d+ is not UTF-8"),
    "zero byte in key": (keyed(entry("a\0b", U32, bytes(4))), r"control characters: 'a\\x00b'"),
    "duplicate key": (keyed(GOOD.alpha), r"key 'adapter.lora.alpha' occurs twice"),
    "unknown value type": (keyed(entry("x", 99, b"")), r"metadata value x has type 99"),
    "string length": (
        keyed(entry("x", STRING, struct.pack("<Q", 1 << 62))),
        r"value x at byte \d+ needs 4611686018427387904 bytes, but \d+ are left; the file is truncated or damaged",
    ),
    "string not UTF-8": (keyed(entry("x", STRING, text(b"\xff"))), r"value x is not UTF-8 text"),
    "array length": (keyed(array("x", "<IQ", F64, 1 << 61)), r"elements of x at byte"),
    "array of arrays": (keyed(array("x", "<IQ", ARRAY, 1)), r"array of arrays"),
    "array of nothing known": (keyed(array("x", "<IQ", 77, 1)), r"has type 77"),
    "string array runs out": (
        keyed(array("x", "<IQQQ", STRING, 2, (1 << 64) - 1, 5)),
        r"the metadata value x at byte \d+ needs \d+ bytes",
    ),
    "alignment 0": (keyed(entry("general.alignment", U32, bytes(4))), r"general.alignment is 0 of type"),
    "alignment 24": (keyed(entry("general.alignment", U32, b"\x18\0\0\0")), r"alignment is 24"),
    "alignment 2 GiB": (keyed(entry("general.alignment", U32, b"\0\0\0\x80")), r"is 2147483648"),
    "alignment a float": (keyed(entry("general.alignment", F32, bytes(4))), r"of type FLOAT32"),
    "type a model": (replace(GOOD, type=entry("general.type", STRING, text("model"))), r"general.type is 'model'"),
    "type missing": (replace(GOOD, type=b""), r"is not a LoRA adapter: general.type is None"),
    "type a number": (replace(GOOD, type=entry("general.type", U32, bytes(4))), r"general.type is of type UINT32"),
    "control vector": (replace(GOOD, adapter_type=entry("adapter.type", STRING, text("cv"))), r"adapter.type is 'cv'"),
    "adapter type a flag": (
        replace(GOOD, adapter_type=entry("adapter.type", BOOL, b"1")),
        r"adapter.type is of type BOOL",
    ),
    "architecture missing": (replace(GOOD, architecture=b""), r"general.architecture is missing"),
    "architecture an array": (
        replace(GOOD, architecture=entry("general.architecture", ARRAY, struct.pack("<IQ", U32, 0))),
        r"general.architecture is of type ARRAY, but must be a string",
    ),
    "architecture of another": (
        replace(GOOD, architecture=entry("general.architecture", STRING, text("qwen2"))),
        r"was made for the architecture 'qwen2', but the base model is 'llama'",
    ),
    "alpha an integer": (
        alpha(U32, struct.pack("<I", 16)),
        r"adapter.lora.alpha is 16 of type UINT32, but must be a finite FLOAT32",
    ),
    "alpha a double": (alpha(F64, bytes(8)), r"of type FLOAT64"),
    "alpha a string": (alpha(STRING, text("16")), r"of type STRING"),
    "alpha missing": (replace(GOOD, alpha=b""), r"adapter.lora.alpha is missing"),
    "alpha NaN": (alpha(F32, struct.pack("<f", np.nan)), r"alpha is nan"),
    "alpha infinite": (alpha(F32, struct.pack("<f", np.inf)), r"alpha is inf"),
    "tokens of floats": (keyed(tokens_entry([1], F32)), r"invocation_tokens must be an array of UINT32"),
    "tokens of int32": (keyed(tokens_entry([1], I32)), r"invocation_tokens must be an array of UINT32"),
    "tokens a number": (
        keyed(entry("adapter.alora.invocation_tokens", U32, bytes(4))),
        r"invocation_tokens must be an array of UINT32",
    ),
    "no tokens": (keyed(tokens_entry([])), r"invocation_tokens has 0 tokens, but must have 1 to"),
    "many tokens": (keyed(tokens_entry(range(5000))), r"has 5000 tokens"),
    "token outside": (keyed(tokens_entry([320])), r"has token 320, but the vocabulary ends at 319"),
    "no tensors": (of(), r"holds no tensors"),
    "I32 tensor": (of(replace(A, type=T_I32), B), r"lora_a at byte \d+ is of type I32, but adapter tensors must be"),
    "quantised tensor": (of(replace(A, type=T_Q8_0, data=bytes(272)), B), r"lora_a at byte \d+ is of type Q8_0, but"),
    "smaller type": (of(replace(A, type=T_F16), B), r"lora_b lies at offset 1024 \(after a gap\)"),
    "unknown tensor type": (of(replace(A, type=4), B), r"lora_a has tensor type 4, which is unknown"),
    "NaN": (of(replace(A, data=NAN), B), r"lora_a holds a value that is not finite at byte \d+"),
    "infinite F16": (
        of(*pair(NAME, type=T_F16, data=INFINITE_F16)),
        r"lora_a holds a value that is not finite at byte \d+",
    ),
    "1-D": (of(replace(A, ne=(256,)), B), r"lora_a at byte \d+ has 1 dimensions, but must have 2"),
    "3-D": (of(replace(A, ne=(64, 2, 2)), B), r"lora_a at byte \d+ has 3 dimensions, but must have 2"),
    "0-D": (of(replace(A, ne=(), data=bytes(4)), B), r"lora_a has 0 dimensions"),
    "5-D": (of(replace(A, ne=(64, 1, 1, 1, 4)), B), r"lora_a has 5 dimensions, but a tensor has 1 to 4"),
    "empty dimension": (of(replace(A, ne=(64, 0)), B), r"lora_a has shape \(0, 64\)"),
    "overflowing shape": (
        of(replace(A, ne=(1 << 33, 1 << 33), data=bytes(1024)), B),
        r"is truncated: .*lora_a ends at byte 295147905179352\d+, but the file has \d+ bytes",
    ),
    "long tensor name": (of(*pair("blk.0." + "q" * 80)), r"tensor name at byte \d+ is \d+ bytes long"),
    "tensor name not UTF-8": (of(replace(A, name=b"\xc3("), B), r"tensor name at byte \d+ is not UTF-8"),
    "duplicate tensor": (of(A, A), r"the tensor blk.0.attn_q.weight.lora_a occurs twice"),
    "overlap": (of(A, replace(B, offset=0)), r"lora_b lies at offset 0 \(overlapping .* at 1024"),
    "gap": (of(A, replace(B, offset=2048)), r"lora_b lies at offset 2048 \(after a gap\)"),
    "misaligned": (of(A, replace(B, offset=1025)), r"offset 1025 \(misaligned\), but must be at 1024"),
    "offset wraps around": (of(A, replace(B, offset=(1 << 64) - 32)), r"lora_b lies at offset 184467"),
    "no partner": (of(A), r"lora_a has no partner blk.0.attn_q.weight.lora_b"),
    "no adapter name": (of(replace(A, name=NAME)), r"is no part of an adapter; names end in"),
    "third half": (of(A, B, replace(A, name=f"{NAME}.lora_c")), r"lora_c is no part of an adapter"),
    "ranks differ": (of(*pair(NAME, b=(8, 64))), r"\(4, 64\), lora_b \(64, 8\): the ranks differ"),
    "huge rank": (of(*pair(NAME, a=(1, 9000), b=(9000, 1))), r"has rank 9000, but at most 4096"),
    "wrong n_in": (
        of(*pair(NAME, a=(32, 4))),
        r"lora_a has shape \(4, 32\), but the base model needs \(rank, 64\)\. Was it trained on another model\?",
    ),
    "wrong n_out": (of(*pair(NAME, b=(4, 96))), r"lora_b has shape \(96, 4\), .* needs \(64, rank\)"),
    "unknown layer": (of(*pair("blk.9.attn_q.weight")), r"adapts blk.9.attn_q.weight, which the base"),
    "unknown module": (of(*pair("blk.0.attn_z.weight")), r"adapts blk.0.attn_z.weight, which the base"),
    "output of a tied model": (of(*pair("output.weight")), r"adapts output.weight, which the base model"),
    "token embeddings": (of(*pair("token_embd.weight")), r"belongs to the token embeddings"),
    "per-layer embeddings": (of(*pair("per_layer_token_embd.weight")), r"belongs to the token embeddings"),
    "norm": (of(*pair("blk.0.attn_norm.weight")), r"belongs to a norm, which llama.cpp would ignore"),
    "bare norm": (of(A, B, Tensor("output_norm.weight", (64,))), r"output_norm.weight at byte \d+ has 1 dimensions"),
    "bare 2-D norm": (of(A, B, Tensor("output_norm.weight", (64, 1))), r"belongs to a norm"),
    "bias": (of(*pair("blk.0.attn_q.bias")), r"belongs to a bias; only weight matrices"),
    "half in the middle": (of(*pair("blk.0.lora_a.weight")), r"blk.0.lora_a.weight.lora_a has '.lora_' twice"),
    "not a matrix of a layer": (of(*pair("rope_freqs.weight")), r"belongs to rope_freqs.weight, but only"),
    "path as a name": (of(*pair("../../etc/passwd")), r"belongs to ../../etc/passwd, but only"),
    "tail": (replace(GOOD, tail=bytes(1 << 17)), r"131072 bytes follow the last tensor"),
    "many keys": (keyed(*tuple(entry(f"k{i}", U32, bytes(4)) for i in range(2000))), r"claims 2004 metadata"),
    "large header": (
        keyed(array("x", "<IQ", STRING, 1 << 18) + bytes(8 << 18)),
        r"claims 262144 elements of x at byte \d+, but at most \d+ can follow",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return read_model_info(write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny.gguf"))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_file_that_the_hostile_ones_are_made_from_is_valid(tmp_path: Path, base: ModelInfo) -> None:
    validate_adapter(write(tmp_path / "good.gguf", GOOD.bytes()), base)
    f16 = replace(GOOD, tensors=pair(NAME, type=T_F16, data=bytes(512)), extra=(tokens_entry([319]),))
    validate_adapter(write(tmp_path / "f16.gguf", f16.bytes()), base)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_adapter_is_refused_in_one_sentence_at_once_and_in_little_memory(name: str, tmp_path: Path, base: ModelInfo) -> None:
    crafted, sentence = HOSTILE[name]
    path = write(tmp_path / "hostile.gguf", crafted.bytes())
    check_refusal(lambda path: validate_adapter(path, base), path, sentence)


def test_a_header_as_large_as_allowed_is_judged_within_100_ms(base: ModelInfo) -> None:
    strings = entry("x", ARRAY, struct.pack("<IQ", STRING, 200_000) + bytes(8 * 200_000))
    names = tuple(Tensor(f"blk.{i}.attn_q.weight.lora_a", (1, 1)) for i in range(4000))
    crafted = replace(GOOD, extra=(strings,), tensors=names).bytes()

    def judge() -> None:
        with pytest.raises(FileError, match=r"has no partner"):
            check_adapter(crafted, "large.gguf", base)

    quick(judge, within_s=0.1)


def test_a_not_finite_value_beyond_the_first_piece_is_found_where_it_is() -> None:
    n_in = 1 << 20  # 4 MiB of F32 a row, as much as is looked at in one piece
    values = np.zeros((2, n_in), np.float32)
    values[1, 7] = np.inf
    crafted = replace(GOOD, tensors=pair(NAME, a=(n_in, 2), b=(2, 1)))
    data = replace(crafted, tensors=(replace(crafted.tensors[0], data=values.tobytes()), crafted.tensors[1])).bytes()
    header_bytes = len(data) - values.nbytes - 32
    with pytest.raises(
        FileError, match=rf"lora_a holds a value that is not finite at byte {header_bytes + 4 * (n_in + 7)}"
    ):
        check_adapter(data, "far.gguf")


def test_an_adapter_cut_at_any_byte_is_refused() -> None:
    data = GOOD.bytes()
    for n in range(len(data)):
        with pytest.raises(FileError, match=r"truncated|are left|at most|is not a GGUF file"):
            check_adapter(data[:n], "cut.gguf")
