"""Hostile models: a sentence for each, at once and in little memory; and real ones pass."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import read_model_info
from gguf_tools.soundness import validate_file
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.forge import ARRAY, BOOL, F32, F64, I32, STRING, T_F16, T_I32, U32, U64, Parts, Tensor, entry, size_of, strings
from tests.gguf_tools.refusal import check_refusal

MODEL, EXPERTS, WORDS = bases.tiny(), bases.mixture(), bases.sentencepiece()
QWEN3, GEMMA3 = bases.of_architecture("qwen3"), bases.of_architecture("gemma3")
N_HEAD_BYTES = len(MODEL.bytes()) - sum(len(t.payload) + -len(t.payload) % 32 for t in MODEL.tensors)

Edit = Callable[[Parts], None]


def key(name: str, kind: int, value: object) -> Edit:
    return lambda parts: parts.set(name if "." in name and name.split(".")[0] in ("tokenizer", "general", "split") else f"llama.{name}", kind, value)


def no(name: str) -> Edit:
    return lambda parts: parts.keys.__delitem__(name)


def numbers(name: str, kind: int, *values: int) -> Edit:
    code = {U32: "I", I32: "i", F32: "f"}[kind]
    return lambda parts: parts.keys.__setitem__(name, (ARRAY, struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)))


def texts(name: str, *values: bytes) -> Edit:
    return lambda parts: parts.keys.__setitem__(name, (ARRAY, strings(values)))


def tensor(name: str, **changes: object) -> Edit:
    def edit(parts: Parts) -> None:
        (i,) = [i for i, t in enumerate(parts.tensors) if t.name == name]
        changed = replace(parts.tensors[i], **changes)  # type: ignore[arg-type]
        if "data" not in changes:
            changed = replace(changed, data=bytes(size_of(changed.ne, changed.type)))
        parts.tensors[i] = changed

    return edit


def without(name: str) -> Edit:
    return lambda parts: parts.tensors.__setitem__(slice(None), [t for t in parts.tensors if t.name != name])


def with_tensor(name: str, *ne: int, kind: int = 0) -> Edit:
    return lambda parts: parts.tensors.append(Tensor(name, ne, kind, None, bytes(size_of(ne, kind))))


def token(i: int, text: bytes) -> Edit:
    """One token of the vocabulary replaced."""

    def edit(parts: Parts) -> None:
        raw, at, words = parts.keys["tokenizer.ggml.tokens"][1], 12, []
        while at < len(raw):
            (n,) = struct.unpack_from("<Q", raw, at)
            words.append(raw[at + 8 : at + 8 + n])
            at += 8 + n
        words[i] = text
        parts.keys["tokenizer.ggml.tokens"] = ARRAY, strings(words)

    return edit


Q, NORM = "blk.0.attn_q.weight", "blk.0.attn_norm.weight"
NAN = np.array([1, np.nan] * 32, "<f4").tobytes()

HOSTILE: dict[str, tuple[Edit, str]] = {
    "no architecture": (no("general.architecture"), r"general.architecture is None"),
    "architecture a path": (key("general.architecture", STRING, "../llama"), r"architecture is '../llama'"),
    "name not UTF-8": (key("general.name", STRING, b"\xff"), r"general.name is not UTF-8"),
    "name a number": (key("general.name", U32, 1), r"general.name is of type UINT32"),
    "file type a float": (key("general.file_type", F32, 1.0), r"general.file_type is of type FLOAT32"),
    "tensors at odd places": (key("general.alignment", U32, 1), r"token_embd.weight begins at byte \d+, but must begin at a multiple of 32, .* is 1"),
    "a part of several": (key("split.count", 2, 3), r"is one of 3 parts"),
    "split count of 32 bits": (key("split.count", U32, 1), r"split.count is of type UINT32, but must be UINT16"),
    "no layers": (key("block_count", U32, 0), r"llama.block_count is 0"),
    "more layers than llama.cpp has": (key("block_count", U32, 513), r"llama.block_count is 513, but must be 1 to 512"),
    "more layers than tensors": (key("block_count", U32, 2), r"holds no tensor blk.1.attn_q.weight, which a llama model of 2 layers has"),
    "layers of 64 bits": (key("block_count", U64, 1), r"llama.block_count is of type UINT64, but must be UINT32"),
    "width 0": (key("embedding_length", U32, 0), r"embedding_length is 0"),
    "embeddings of another width": (key("embedding_length_out", U32, 32), r"embedding_length_out is 32, but the model gives embeddings of 64"),
    "another width": (key("embedding_length", U32, 128), r"rope.dimension_count is 16, but heads have 32 numbers"),
    "another vocabulary": (key("tokenizer.ggml.model", STRING, "llama"), r"has no token <0x00>"),
    "width of 4 billion": (key("embedding_length", U32, (1 << 32) - 1), r"embedding_length is 4294967295"),
    "no context": (no("llama.context_length"), r"llama.context_length is missing"),
    "context 0": (key("context_length", U32, 0), r"context_length is 0"),
    "no feed-forward": (no("llama.feed_forward_length"), r"llama.feed_forward_length is missing"),
    "heads 0": (key("attention.head_count", U32, 0), r"head_count is 0"),
    "heads that do not divide": (key("attention.head_count_kv", U32, 3), r"head_count is 4, but must be a multiple of head_count_kv 3"),
    "heads for too many layers": (numbers("llama.attention.head_count", U32, 4, 4), r"head_count has 2 values, but the model has 1 layers"),
    "heads that are floats": (numbers("llama.attention.head_count", F32, 4), r"must be an array of integers, not of FLOAT32"),
    "odd heads": (key("attention.key_length", U32, 15), r"keys of 15 and values of 16 numbers, but must have an equal, even number"),
    "keys unlike values": (key("attention.value_length", U32, 32), r"keys of 16 and values of 32"),
    "half rotated": (key("rope.dimension_count", U32, 8), r"rope.dimension_count is 8, but heads have 16"),
    "no epsilon": (no("llama.attention.layer_norm_rms_epsilon"), r"layer_norm_rms_epsilon is missing"),
    "epsilon NaN": (key("attention.layer_norm_rms_epsilon", F32, np.nan), r"epsilon is nan, but must be 0 to 1"),
    "epsilon negative": (key("attention.layer_norm_rms_epsilon", F32, -1e-5), r"epsilon is -\d"),
    "epsilon a double": (key("attention.layer_norm_rms_epsilon", F64, 1e-5), r"epsilon is of type FLOAT64"),
    "rope base 0": (key("rope.freq_base", F32, 0.0), r"rope.freq_base is 0"),
    "rope scaling unknown": (key("rope.scaling.type", STRING, "cubic"), r"rope.scaling.type is 'cubic', but must be one of none, linear"),
    "scaling a number": (key("rope.scaling.type", U32, 1), r"rope.scaling.type is of type UINT32"),
    "not causal": (key("attention.causal", BOOL, False), r"attention.causal is false"),
    "pooling unknown": (key("pooling_type", U32, 77), r"pooling_type is 77"),
    "experts without tensors": (key("expert_count", U32, 4), r"expert_used_count is 0 of 4 experts"),
    "used experts without experts": (key("expert_used_count", U32, 2), r"expert_used_count is 2 of 0 experts"),
    "layers to predict": (key("nextn_predict_layers", U32, 1), r"nextn_predict_layers is 1"),
    "tokenizer unknown": (key("tokenizer.ggml.model", STRING, "none"), r"has no tokenizer"),
    "tokens twice": (token(40, b"!"), r"tokens has the text b'!' twice, as tokens 36 and 40; llama.cpp aborts on it"),
    "tokens twice up to a zero byte": (token(40, b"!\0x"), r"tokens has the text b'!' twice"),
    "token as an empty one is named": (lambda parts: (token(40, b"")(parts), token(41, b"[EMPTY_40]")(parts)), r"\[EMPTY_40\]' twice"),  # type: ignore[dict-item]
    "token of 70,000 bytes": (token(9, b"y" * 70_000), r"has a token 9 of 70000 bytes"),
    "tokens are numbers": (numbers("tokenizer.ggml.tokens", I32, 1, 2), r"has no tokenizer"),
    "fewer tokens than embeddings": (texts("tokenizer.ggml.tokens", b"a", b"b"), r"token_embd.weight at byte \d+ has shape \(300, 64\), .*\(2, 64\)"),
    "no merges": (no("tokenizer.ggml.merges"), r"tokenizer.ggml.merges is missing, but must be an array of STRING"),
    "merges are numbers": (numbers("tokenizer.ggml.merges", U32, 1), r"merges is of UINT32"),
    "types for fewer tokens": (numbers("tokenizer.ggml.token_type", I32, *[1] * 299), r"token_type has 299 elements at byte \d+, but there are 300"),
    "types unsigned": (numbers("tokenizer.ggml.token_type", U32, *[1] * 300), r"token_type is of UINT32, but must be an array of INT32"),
    "scores for fewer tokens": (numbers("tokenizer.ggml.scores", F32, 1), r"scores has 1 elements"),
    "suppressed tokens a number": (key("tokenizer.ggml.suppress_tokens", U32, 1), r"suppress_tokens is of type UINT32"),
    "BOS signed": (key("tokenizer.ggml.bos_token_id", I32, 1), r"bos_token_id is of type INT32, but must be UINT32"),
    "BOS wanted, none there": (
        lambda parts: (key("tokenizer.ggml.add_bos_token", BOOL, True)(parts), texts("tokenizer.ggml.tokens", b"a")(parts),  # type: ignore[dict-item]
                       key("tokenizer.ggml.bos_token_id", U32, 5)(parts), no("tokenizer.ggml.token_type")(parts)),
        r"texts get a BOS token, but tokenizer.ggml.bos_token_id names none of 1",
    ),
    "flag a number": (key("tokenizer.ggml.add_bos_token", U32, 1), r"add_bos_token is of type UINT32, but must be BOOL"),
    "template not UTF-8": (key("tokenizer.chat_template", STRING, b"{{\xff"), r"chat_template is not UTF-8"),
    "I32 matrix": (tensor(Q, type=T_I32), r"attn_q.weight at byte \d+ is of type I32, which llama.cpp cannot multiply with"),
    "F64 matrix": (tensor(Q, type=28), r"of type F64"),
    "Q8_1 matrix": (tensor(Q, type=9), r"of type Q8_1"),
    "F16 norm": (tensor(NORM, type=T_F16), r"attn_norm.weight at byte \d+ is of type F16, but vectors must be F32; llama.cpp aborts"),
    "NaN in a norm": (tensor(NORM, data=NAN), r"attn_norm.weight holds a value that is not finite at byte \d+"),
    "transposed matrix": (tensor("blk.0.attn_k.weight", ne=(32, 64)), r"attn_k.weight at byte \d+ has shape \(64, 32\), .* \(32, 64\)"),
    "3-D matrix": (tensor(Q, ne=(64, 8, 8)), r"has shape \(8, 8, 64\)"),
    "norm missing": (without(NORM), r"holds no tensor blk.0.attn_norm.weight"),
    "embeddings missing": (without("token_embd.weight"), r"holds no tensor token_embd.weight"),
    "tensor of a layer beyond": (with_tensor("blk.1.attn_q.weight", 64, 64), r"blk.1.attn_q.weight at byte \d+ is no tensor of a llama model of 1"),
    "tensor of a path": (with_tensor("../../etc/passwd", 4), r"../../etc/passwd at byte \d+ is no tensor"),
    "adapter tensor in a model": (with_tensor(f"{Q}.lora_a", 64, 4), r"lora_a at byte \d+ is no tensor"),
    "Q/K norms in llama": (with_tensor("blk.0.attn_q_norm.weight", 16), r"is no tensor of a llama"),
    "fused and apart": (with_tensor("blk.0.attn_qkv.weight", 64, 128), r"blk.0.attn_q.weight at byte \d+ is no tensor"),
    "scale without a matrix": (
        lambda parts: (without("output_norm.weight")(parts), with_tensor("output.bias", 300)(parts)),  # type: ignore[dict-item]
        r"output.bias at byte \d+ is no tensor of a llama",
    ),
    "rope factors too short": (with_tensor("rope_freqs.weight", 4), r"rope_freqs.weight at byte \d+ has shape \(4,\), but the metadata needs \(8,\)"),
    "a tensor of 2^62 numbers": (
        lambda parts: parts.tensors.append(Tensor("x.weight", (1 << 31, 1 << 31), 0, None, b"")),
        r"is truncated: x.weight ends at byte \d+, but the file has",
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[Parts, Edit, str]] = {
    "more experts used than there are": (EXPERTS, key("expert_used_count", U32, 5), r"expert_used_count is 5 of 4 experts"),
    "expert groups": (EXPERTS, key("expert_group_count", U32, 2), r"expert_group_count is 2"),
    "another number of experts": (EXPERTS, key("expert_count", U32, 8), r"has shape \(4, 64\), but the metadata needs \(8, 64\)"),
    "byte token in small letters": (WORDS, token(13, b"<0x0a>"), r"has no token <0x0A>; llama.cpp aborts on the first text with that byte"),
    "byte token without a byte": (WORDS, lambda p: numbers("tokenizer.ggml.token_type", I32, *[6] * 300)(p), r"token 0 \(b'<unk>'\) is of type byte"),
    "Q/K norms missing": (QWEN3, without("blk.0.attn_q_norm.weight"), r"holds no tensor blk.0.attn_q_norm.weight, which a qwen3"),
    "pattern of 16 bits": (GEMMA3, lambda p: p.set("gemma3.attention.sliding_window_pattern", 2, 6), r"pattern is of type UINT16, but must be"),
    "experts in qwen3": (QWEN3, lambda p: p.set("qwen3.expert_count", U32, 4), r"qwen3 models have no experts"),
}  # fmt: skip
CORPUS = {**{name: (MODEL, edit, sentence) for name, (edit, sentence) in HOSTILE.items()}, **OTHERS}


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_model_is_refused_in_one_sentence_at_once_and_in_little_memory(name: str, tmp_path: Path) -> None:
    good, edit, sentence = CORPUS[name]
    parts = good.copy()
    edit(parts)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(parts.bytes())
    check_refusal(validate_file, path, sentence)


def boundaries() -> list[int]:
    """Where each key and each tensor's entry ends, and where the data begins."""
    ends = [8, 16, 24]
    for name, (kind, payload) in MODEL.keys.items():
        ends.append(ends[-1] + len(entry(name, kind, payload)))
    for t in MODEL.tensors:
        ends.append(ends[-1] + 8 + len(t.name) + 4 + 8 * len(t.ne) + 4 + 8)
    return [*ends, N_HEAD_BYTES]


def test_a_model_cut_at_or_beside_any_boundary_is_refused(tmp_path: Path) -> None:
    data, path = MODEL.bytes(), tmp_path / "cut.gguf"
    assert boundaries()[-2] + -boundaries()[-2] % 32 == N_HEAD_BYTES
    for n in [*(end + near for end in boundaries() for near in (-1, 0, 1)), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(FileError, match=r"truncated|are left|at most"):
            validate_file(path)


def test_a_not_finite_scale_is_found_only_with_data(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", type="Q4_0")
    with mapped(path) as mapping:
        at = parse_header(mapping, "m", MODEL_LIMITS).tensors[Q].offset + 3 * 18  # the scale of the fourth block
    data = bytearray(path.read_bytes())
    data[at : at + 2] = struct.pack("<H", 0x7C00)
    path.write_bytes(data)
    assert validate_file(path).unchecked == ("whether the matrices' numbers are finite (see --data)",)
    with pytest.raises(FileError, match=rf"attn_q.weight holds a value that is not finite at byte {at}"):
        validate_file(path, data=True)


def test_progress_counts_the_bytes_that_are_looked_at(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    validate_file(write_tiny_llama(tmp_path / "m.gguf"), data=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 400_000


def test_what_of_another_architecture_is_not_known_is_said(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture="falcon")
    assert validate_file(path).unchecked[0] == "the keys and tensor shapes of the architecture 'falcon'"


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(bases.adapter().bytes())
    base = read_model_info(write_tiny_llama(tmp_path / "m.gguf", **{**bases.SIZES, "n_layers": 2, "tied": False}))
    verdict = validate_file(tmp_path / "a.gguf", base=base)
    assert (verdict.kind, verdict.architecture, verdict.n_tensors, verdict.unchecked) == ("adapter", "llama", 26, ())
    assert validate_file(tmp_path / "a.gguf").unchecked == ("whether it fits a model (no base was given)",)
    with pytest.raises(FileError, match=r"m.gguf: is a model, but only an adapter has a base"):
        validate_file(tmp_path / "m.gguf", base=base)
    with pytest.raises(FileError, match=r"adapts blk.1.attn_k.weight, which the base model lacks"):
        validate_file(tmp_path / "a.gguf", base=read_model_info(write_tiny_llama(tmp_path / "s.gguf", **{**bases.SIZES, "tied": False})))
