"""Hugging Face model folders made from numbers, as small as they can be, and what such a model computes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_tools.safetensors import safetensors_bytes

Weights = dict[str, NDArray[np.float32]]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False,
    "eos_token_id": 299,
}  # fmt: skip
BYTES = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


def byte_level(n_vocab: int = 300) -> dict[str, Any]:
    """The content of a tokenizer.json: byte-level BPE with two merges and an added token, which is the last one."""
    characters = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
    tokens = [*characters, "he", "Ġt", *(f"~{i}~" for i in range(n_vocab - 259))]
    return {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": ["h e", ["Ġ", "t"]]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "added_tokens": [{"id": n_vocab - 1, "content": "<|end|>", "special": True}],
    }


def weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Random weights by Hugging Face's names, on which llama.cpp's logits have a deviation near 1."""
    rng = np.random.default_rng(seed)
    n_embd, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_q, n_kv = (config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads"))

    def matrix(n_out: int, n_in: int) -> NDArray[np.float32]:
        return (rng.standard_normal((n_out, n_in)) * n_in**-0.5).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(n_vocab, n_embd) * 6, "model.norm.weight": 1 + matrix(1, n_embd)[0]}
    for i in range(config["num_hidden_layers"]):
        for name, shape in (("self_attn.q_proj", (n_q, n_embd)), ("self_attn.k_proj", (n_kv, n_embd)),
                            ("self_attn.v_proj", (n_kv, n_embd)), ("self_attn.o_proj", (n_embd, n_q)),
                            ("mlp.gate_proj", (n_ff, n_embd)), ("mlp.up_proj", (n_ff, n_embd)),
                            ("mlp.down_proj", (n_embd, n_ff))):  # fmt: skip
            found[f"model.layers.{i}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = 1 + matrix(1, n_embd)[0]
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(n_vocab, n_embd)
    return found


def write_folder(
    folder: Path, config: Mapping[str, Any] = CONFIG, tensors: Weights | None = None, tokenizer: Mapping[str, Any] | None = None
) -> Path:
    """A whole model in one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights(config) if tensors is None else tensors, {}))
    content = byte_level(config["vocab_size"]) if tokenizer is None else tokenizer
    if content:
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_shards(folder: Path, parts: Sequence[Weights]) -> None:
    """The weights in several files with their index, in place of the single one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    places = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(part, {}))
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def logits(config: Mapping[str, Any], w: Weights, tokens: Sequence[int], slowed: NDArray[Any] | float = 1.0) -> NDArray[np.float64]:
    """What Hugging Face's LLaMA computes, in float64: (n_tokens, n_vocab). `slowed` divides each rotation's frequency."""
    n_head, n_kv, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    position = np.arange(len(tokens))[:, None]
    angle = position * config["rope_theta"] ** -(np.arange(0, d, 2) / d) / slowed
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def turned(x: NDArray[Any]) -> NDArray[Any]:  # (n_tokens, heads, d), number i paired with i + d/2
        left, right = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    x = w["model.embed_tokens.weight"].astype(np.float64)[list(tokens)]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): array for name, array in w.items()}
        h = norm(x, layer["input_layernorm.weight"])
        q, k, v = (h @ layer[f"self_attn.{m}_proj.weight"].T for m in "qkv")
        q = turned(q.reshape(len(x), n_head, d))
        k = np.repeat(turned(k.reshape(len(x), n_kv, d)), n_head // n_kv, 1)
        v = np.repeat(v.reshape(len(x), n_kv, d), n_head // n_kv, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(d) + np.triu(np.full((len(x), len(x)), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(x), -1) @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"])
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
