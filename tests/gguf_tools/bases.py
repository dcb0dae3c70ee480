"""Good files of many kinds, in parts, for tests that damage them: models of every architecture whose tensors are known, and an adapter."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools.forge import ARRAY, F32, I32, STRING, U32, Parts, Tensor, dissect, strings

SIZES: dict[str, Any] = {"n_layers": 1, "n_embd": 64, "n_head": 4, "n_head_kv": 2, "n_ff": 64, "n_vocab": 300}
N_EMBD, N_HEAD_SIZE, N_FF = 64, 16, 64


def tiny(**options: Any) -> Parts:
    """The parts of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        return dissect(write_tiny_llama(Path(folder) / "m.gguf", **{**SIZES, **options}).read_bytes())


def of_architecture(architecture: str, n_layers: int = 1, **options: Any) -> Parts:
    """A model with the keys and the additional vectors of another architecture of the family."""
    parts = tiny(architecture=architecture, n_layers=n_layers, **options)
    vectors = {
        "qwen2": {"attn_q.bias": N_EMBD, "attn_k.bias": N_EMBD // 2, "attn_v.bias": N_EMBD // 2},
        "qwen3": {"attn_q_norm.weight": N_HEAD_SIZE, "attn_k_norm.weight": N_HEAD_SIZE},
        "gemma3": {"attn_q_norm.weight": N_HEAD_SIZE, "attn_k_norm.weight": N_HEAD_SIZE, "post_attention_norm.weight": N_EMBD,
                   "post_ffw_norm.weight": N_EMBD},
    }  # fmt: skip
    for i in range(n_layers):
        for name, n in vectors.get(architecture, {}).items():
            parts.tensors.append(Tensor(f"blk.{i}.{name}", (n,), data=np.ones(n, np.float32).tobytes()))
    if architecture == "gemma3":
        parts.set("gemma3.attention.sliding_window", U32, 32)
    return parts


def mixture(n_expert: int = 4) -> Parts:
    """A model with experts."""
    parts = tiny()
    parts.set("llama.expert_count", U32, n_expert)
    parts.set("llama.expert_used_count", U32, 2)
    parts.tensors = [tensor for tensor in parts.tensors if ".ffn_" not in str(tensor.name) or "norm" in str(tensor.name)]
    shapes = {"inp": (N_EMBD, n_expert), "gate": (N_EMBD, N_FF, n_expert), "up": (N_EMBD, N_FF, n_expert), "down": (N_FF, N_EMBD, n_expert)}
    for name, ne in shapes.items():
        full = "ffn_gate_inp" if name == "inp" else f"ffn_{name}_exps"
        parts.tensors.append(Tensor(f"blk.0.{full}.weight", ne))
    return parts


def sentencepiece() -> Parts:
    """A model with a vocabulary of bytes and a few words, as of LLaMA 2."""
    parts = tiny()
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    tokens += [b"\xe2\x96\x81%c" % letter for letter in range(97, 97 + 26)]
    tokens += [b"word%d" % i for i in range(300 - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (300 - len(kinds))
    for key in [key for key in parts.keys if key.startswith("tokenizer.ggml.")]:
        del parts.keys[key]
    parts.set("tokenizer.ggml.model", STRING, "llama")
    parts.keys["tokenizer.ggml.tokens"] = ARRAY, strings(tokens)
    parts.keys["tokenizer.ggml.scores"] = ARRAY, struct.pack("<IQ300f", F32, 300, *(-float(i) for i in range(300)))
    parts.keys["tokenizer.ggml.token_type"] = ARRAY, struct.pack("<IQ300i", I32, 300, *map(int, kinds))
    return parts


def models() -> dict[str, Parts]:
    """All of them, by name."""
    return {
        "llama": tiny(),
        "llama of 256": tiny(n_embd=256, n_ff=256, type="F16"),  # K-quants have blocks of 256
        "llama Q4_0": tiny(type="Q4_0"),
        "llama untied Q8_0": tiny(type="Q8_0", tied=False, n_layers=2),
        "llama with experts": mixture(),
        "sentencepiece": sentencepiece(),
        **{name: of_architecture(name) for name in ("qwen2", "qwen3", "gemma3")},
    }


def adapter() -> Parts:
    """An adapter of the first layers of an untied tiny model of three layers, with all of its matrices."""
    rng = np.random.default_rng(1)
    kv = N_EMBD // 2
    shapes = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (kv, N_EMBD), "attn_v": (kv, N_EMBD), "attn_output": (N_EMBD, N_EMBD),
              "ffn_gate": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}  # fmt: skip
    named = {f"blk.{i}.{module}.weight": shape for i in range(2) for module, shape in shapes.items()} | {"output.weight": (300, N_EMBD)}
    tensors = {
        name: (rng.standard_normal((4, n_in)).astype(np.float32), rng.standard_normal((n_out, 4)).astype(np.float32))
        for name, (n_out, n_in) in named.items()
    }
    return dissect(adapter_bytes(Adapter("llama", 16.0, tensors, "answer", (10, 11), {"fwdllama.base.name": "tiny"})))
