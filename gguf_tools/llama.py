"""A LLaMA as Hugging Face describes it: its config.json, and the tensors that such a model has.

Only what llama.cpp computes in the same way is accepted: a setting that is not known here to be harmless is refused, since a
model that loads and answers slightly wrong is worse than one that is not converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import gguf
import numpy as np
from numpy.typing import NDArray

from gguf_tools.document import read_object
from gguf_tools.errors import FileError
from gguf_tools.rotary import llama3_divisors

# What must have this value, or be absent, for the model to be a plain LLaMA.
_PLAIN: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
                          "quantization_config": None, "num_local_experts": None, "sliding_window": None}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """What config.json says. `rope_linear` stretches positions by that factor, `rope_divisors` are (head_dim / 2,)."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    context_length: int
    rms_eps: float
    rope_theta: float
    rope_linear: float | None
    rope_divisors: NDArray[np.float32] | None
    tied: bool
    token_ids: Mapping[str, int]  # "bos", "eos", "pad", where given


@dataclass(frozen=True)
class LlamaTensor:
    """A tensor: its Hugging Face and GGUF names, its shape (n_out, n_in) or (n,), and whether its rows are rotated."""

    source: str
    name: str
    shape: tuple[int, ...]
    rotated: bool = False


def read_llama_config(folder: Path) -> LlamaConfig:
    """Read and check `config.json` of a model folder.

    Raises:
        FileError: it is missing or malformed, or describes something that llama.cpp's LLaMA does not compute.
    """
    path = folder / "config.json"
    config = read_object(path)
    architectures = config.get("architectures") or [config.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["llama"]):
        raise FileError(f"{path}: architectures is {architectures!r:.100}, but only LlamaForCausalLM is converted.")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise FileError(f"{path}: {key} is {config[key]!r:.80}, but only {plain!r} is converted.")
    n_embd, n_head = _count(path, config, "hidden_size"), _count(path, config, "num_attention_heads")
    n_head_kv = _count(path, config, "num_key_value_heads", n_head)
    head_dim = _count(path, config, "head_dim", n_embd // n_head)
    if n_head % n_head_kv or head_dim % 2 or (config.get("head_dim") is None and n_embd % n_head):
        raise FileError(
            f"{path}: {n_embd} values, {n_head} heads of {head_dim} and {n_head_kv} KV heads do not fit together; "
            "heads are of even size, and as many for each KV head."
        )
    theta, linear, divisors = _rope(path, config, head_dim)
    eps = config.get("rms_norm_eps", 1e-6)
    if not _positive(eps):
        raise FileError(f"{path}: rms_norm_eps is {eps!r:.80}, but must be a positive number.")
    ids = {}
    for kind in ("bos", "eos", "pad"):
        value = config.get(f"{kind}_token_id")
        first = value[0] if isinstance(value, list) and value else value  # several: the first is what ends a text
        if type(first) is int and first >= 0:
            ids[kind] = first
    return LlamaConfig(
        n_layers=_count(path, config, "num_hidden_layers"),
        n_embd=n_embd,
        n_ff=_count(path, config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_count(path, config, "vocab_size"),
        context_length=_count(path, config, "max_position_embeddings", 2048),
        rms_eps=float(eps),
        rope_theta=theta,
        rope_linear=linear,
        rope_divisors=divisors,
        tied=config.get("tie_word_embeddings", False) is True,
        token_ids=ids,
    )


def llama_tensors(config: LlamaConfig) -> Iterator[LlamaTensor]:
    """Every tensor that the model must have, in the order of the GGUF file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)

    def tensor(stem: str, *shape: int, rotated: bool = False) -> LlamaTensor:
        name = names.get_name(stem)
        assert name is not None, stem
        return LlamaTensor(f"{stem}.weight", f"{name}.weight", shape, rotated)

    n_q, n_kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    yield tensor("model.embed_tokens", config.n_vocab, config.n_embd)
    for i in range(config.n_layers):
        layer = f"model.layers.{i}"
        yield tensor(f"{layer}.input_layernorm", config.n_embd)
        yield tensor(f"{layer}.self_attn.q_proj", n_q, config.n_embd, rotated=True)
        yield tensor(f"{layer}.self_attn.k_proj", n_kv, config.n_embd, rotated=True)
        yield tensor(f"{layer}.self_attn.v_proj", n_kv, config.n_embd)
        yield tensor(f"{layer}.self_attn.o_proj", config.n_embd, n_q)
        yield tensor(f"{layer}.post_attention_layernorm", config.n_embd)
        yield tensor(f"{layer}.mlp.gate_proj", config.n_ff, config.n_embd)
        yield tensor(f"{layer}.mlp.up_proj", config.n_ff, config.n_embd)
        yield tensor(f"{layer}.mlp.down_proj", config.n_embd, config.n_ff)
    yield tensor("model.norm", config.n_embd)
    if not config.tied:
        yield tensor("lm_head", config.n_vocab, config.n_embd)


def _rope(path: Path, config: dict[str, Any], head_dim: int) -> tuple[float, float | None, NDArray[np.float32] | None]:
    """Theta, the linear factor and LLaMA 3's divisors; newer files keep all in rope_parameters, older in rope_scaling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise FileError(f"{path}: rope_scaling is {scaling!r:.80}, but must be an object.")
    theta = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not _positive(theta):
        raise FileError(f"{path}: rope_theta is {theta!r:.80}, but must be a positive number.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None, None

    def number(key: str) -> float:
        value = scaling.get(key)
        if not _positive(value):
            raise FileError(f"{path}: {key} of rope type {kind} is {value!r:.80}, but must be a positive number.")
        return float(value)

    if kind == "linear":
        return float(theta), number("factor"), None
    if kind != "llama3":
        raise FileError(f"{path}: the rope type is {kind!r:.80}, but only default, linear and llama3 are converted.")
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low >= high:
        raise FileError(f"{path}: low_freq_factor is {low} and high_freq_factor {high}, but the first must be smaller.")
    original = int(number("original_max_position_embeddings"))
    divisors = llama3_divisors(head_dim, float(theta), factor=number("factor"), low_freq_factor=low,
                               high_freq_factor=high, original_context=original)  # fmt: skip
    return float(theta), None, divisors


def _count(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise FileError(f"{path}: {key} is {'missing' if value is None else repr(value)[:80]}, but must be a positive integer.")
    return value


def _positive(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 < value < math.inf
