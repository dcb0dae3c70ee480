"""What the metadata and the tensors of a model must be for llama.cpp to build its graph: it asserts most of this, and an assertion ends the process.

The keys are those that llama.cpp reads for every architecture. The tensors are listed for the dense LLaMA family only; of another architecture
nothing is known here, and `validate` says so instead of guessing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGUFValueType

from gguf_tools.errors import FileError
from gguf_tools.header import Array, Header
from gguf_tools.model import ModelInfo

Kind = Literal["count", "float", "flag", "text"]
_TYPES = {
    "count": GGUFValueType.UINT32, "float": GGUFValueType.FLOAT32, "flag": GGUFValueType.BOOL, "text": GGUFValueType.STRING
}  # fmt: skip
FAMILY = ("llama", "qwen2", "qwen3", "gemma3")


@dataclass(frozen=True)
class Key:
    """What the value of `<architecture>.<name>` may be; `per_layer`: or an array with one for each layer, all the same."""

    kind: Kind
    low: float = 0
    high: float = 1 << 24
    required: bool = False
    per_layer: bool = False


_FINITE = Key("float", -3.4e38, 3.4e38)
KEYS: Mapping[str, Key] = {
    "context_length": Key("count", 1, (1 << 31) - 1, required=True),
    "embedding_length": Key("count", 1, required=True),
    "embedding_length_out": Key("count"),
    "block_count": Key("count", 1, 512, required=True),  # LLAMA_MAX_LAYERS
    "vocab_size": Key("count"),
    "feed_forward_length": Key("count", 1, required=True, per_layer=True),
    "attention.head_count": Key("count", 1, 1 << 16, required=True, per_layer=True),
    "attention.head_count_kv": Key("count", 1, 1 << 16, per_layer=True),
    "attention.key_length": Key("count", 2, 1 << 16),
    "attention.value_length": Key("count", 2, 1 << 16),
    "attention.layer_norm_rms_epsilon": Key("float", 0, 1, required=True),
    "attention.causal": Key("flag"),
    "attention.scale": _FINITE,
    "attention.sliding_window": Key("count", 0, (1 << 31) - 1),
    "rope.dimension_count": Key("count", 2, 1 << 16),
    "rope.freq_base": Key("float", 1e-6, 3.4e38),
    "rope.freq_base_swa": Key("float", 1e-6, 3.4e38),
    "rope.scale_linear": _FINITE,
    "rope.scaling.type": Key("text"),
    "rope.scaling.factor": _FINITE,
    "rope.scaling.attn_factor": _FINITE,
    "rope.scaling.alpha": _FINITE,
    "rope.scaling.original_context_length": Key("count", 1, (1 << 31) - 1),
    "rope.scaling.finetuned": Key("flag"),
    "rope.scaling.yarn_log_multiplier": _FINITE,
    "rope.scaling.yarn_ext_factor": _FINITE,
    "rope.scaling.yarn_attn_factor": _FINITE,
    "rope.scaling.yarn_beta_fast": _FINITE,
    "rope.scaling.yarn_beta_slow": _FINITE,
    "final_logit_softcapping": _FINITE,
    "expert_count": Key("count", 0, 1024),  # LLAMA_MAX_EXPERTS
    "expert_used_count": Key("count", 0, 1024),
    "expert_group_count": Key("count", 0, 1),
    "pooling_type": Key("count", 0, 4),
    "nextn_predict_layers": Key("count", 0, 0),
}
_SCALINGS = ("none", "linear", "yarn", "longrope")
_ELSEWHERE = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")  # for other architectures


def check_keys(header: Header, info: ModelInfo) -> None:
    """Types and ranges of an architecture's own keys.

    Raises:
        FileError: one is missing, of another type than llama.cpp insists on, or out of range.
    """
    for name, rule in KEYS.items():
        key = f"{info.architecture}.{name}"
        if key in header.values:
            _check_key(header, key, rule, info.n_layers)
        elif rule.required:
            raise FileError(f"{header.label}: {key} is missing.")
    scaling = header.text(f"{info.architecture}.rope.scaling.type")
    if scaling is not None and scaling not in _SCALINGS:
        raise FileError(
            f"{header.label}: {info.architecture}.rope.scaling.type is {scaling!r:.80}, but must be one of {', '.join(_SCALINGS)}."
        )
    if header.values.get(f"{info.architecture}.attention.causal", (None, True))[1] is False:
        raise FileError(f"{header.label}: {info.architecture}.attention.causal is false, but a model that writes text looks back only.")


def _check_key(header: Header, key: str, rule: Key, n_layers: int) -> None:
    kind, value = header.values[key]
    values: list[object] = [value]
    if rule.per_layer and isinstance(value, Array):
        if value.count != n_layers:
            raise FileError(f"{header.label}: {key} has {value.count} values, but the model has {n_layers} layers.")
        if value.type not in (GGUFValueType.UINT32, GGUFValueType.INT32):
            raise FileError(f"{header.label}: {key} has values of type {value.type.name}, but they must be UINT32.")
        values = list(header.numbers(key) or ())
    elif kind != _TYPES[rule.kind]:
        raise FileError(f"{header.label}: {key} is of type {kind.name}, but must be {_TYPES[rule.kind].name}.")
    for number in values:
        if isinstance(number, (int, float)) and not (math.isfinite(number) and rule.low <= number <= rule.high):
            raise FileError(f"{header.label}: {key} is {number}, but must be {rule.low:g} to {rule.high:g}.")


def check_sizes(header: Header, info: ModelInfo) -> None:
    """That the sizes of a model of `FAMILY` fit together.

    Raises:
        FileError: they do not.
    """
    label, prefix = header.label, info.architecture
    for name in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        numbers = header.numbers(f"{prefix}.{name}") or [0]
        if len(set(numbers)) != 1:
            raise FileError(f"{label}: {prefix}.{name} differs between layers, but in a {prefix} model all layers are alike.")
    if info.n_head % info.n_head_kv:
        raise FileError(f"{label}: {prefix}.attention.head_count is {info.n_head}, but must be a multiple of head_count_kv {info.n_head_kv}.")
    if info.key_length != info.value_length or info.key_length % 2:
        raise FileError(
            f"{label}: {prefix} heads have keys of {info.key_length} and values of {info.value_length} numbers, but must have an equal, even number."
        )
    rotated = header.number(f"{prefix}.rope.dimension_count") or info.key_length
    if rotated != info.key_length and (prefix != "gemma3" or rotated > info.key_length or rotated % 2):
        raise FileError(f"{label}: {prefix}.rope.dimension_count is {rotated}, but heads have {info.key_length} numbers.")
    n_out = header.number(f"{prefix}.embedding_length_out")
    if n_out not in (None, 0, info.n_embd):
        raise FileError(f"{label}: {prefix}.embedding_length_out is {n_out}, but the model gives embeddings of {info.n_embd} numbers.")
    pattern, value = header.values.get(f"{prefix}.attention.sliding_window_pattern", (GGUFValueType.UINT32, 0))
    if pattern != GGUFValueType.UINT32 and not isinstance(value, Array):
        raise FileError(f"{label}: {prefix}.attention.sliding_window_pattern is of type {pattern.name}, but must be UINT32 or an array.")
    for name in _ELSEWHERE:
        if f"{prefix}.{name}" in header.values:
            raise FileError(f"{label}: {prefix}.{name} is set, but a {prefix} model has the same heads in all layers.")
    n_expert, n_used = (header.number(f"{prefix}.{name}") or 0 for name in ("expert_count", "expert_used_count"))
    if n_expert and prefix != "llama":
        raise FileError(f"{label}: {prefix}.expert_count is {n_expert}, but {prefix} models have no experts.")
    if not (n_used == 0 if n_expert == 0 else 1 <= n_used <= n_expert):
        raise FileError(f"{label}: {prefix}.expert_used_count is {n_used} of {n_expert} experts.")
    if (header.number(f"{prefix}.expert_group_count") or 0) >= max(n_expert, 1):
        raise FileError(f"{label}: {prefix}.expert_group_count must be less than the {n_expert} experts.")


def wanted_tensors(header: Header, info: ModelInfo) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Each tensor of a model of `FAMILY`: its shape in numpy order, and whether it must be there."""
    arch, n_embd, head = info.architecture, info.n_embd, info.key_length
    n_q, n_kv = info.n_head * head, info.n_head_kv * head
    n_ff = (header.numbers(f"{arch}.feed_forward_length") or [header.number(f"{arch}.feed_forward_length") or 0])[0]
    n_expert = header.number(f"{arch}.expert_count") or 0
    rotated = header.number(f"{arch}.rope.dimension_count") or head
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {
        "token_embd.weight": ((info.n_vocab, n_embd), True),
        "output_norm.weight": ((n_embd,), True),
        "output.weight": ((info.n_vocab, n_embd), False),
    }
    if arch == "llama":
        longrope = header.text("llama.rope.scaling.type") == "longrope"
        wanted |= {f"{name}.weight": ((rotated // 2,), False) for name in
                   (("rope_factors_long", "rope_factors_short") if longrope else ("rope_freqs",))}  # fmt: skip
    if arch == "qwen2":
        wanted["output.bias"] = ((info.n_vocab,), False)
    for i in range(info.n_layers):
        fused = f"blk.{i}.attn_qkv.weight" in header.tensors
        matrices: dict[str, tuple[int, ...]] = {
            **({"attn_qkv": (n_q + 2 * n_kv, n_embd)} if fused else {"attn_q": (n_q, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd)}),
            "attn_output": (n_embd, n_q),
        }
        norms = {"attn_norm": n_embd, "ffn_norm": n_embd}
        if arch in ("qwen3", "gemma3"):
            norms |= {"attn_q_norm": head, "attn_k_norm": head}
        if arch == "gemma3":
            norms |= {"post_attention_norm": n_embd, "post_ffw_norm": n_embd}
        if n_expert:
            matrices |= {"ffn_gate_inp": (n_expert, n_embd), "ffn_gate_exps": (n_expert, n_ff, n_embd),
                         "ffn_up_exps": (n_expert, n_ff, n_embd), "ffn_down_exps": (n_expert, n_embd, n_ff)}  # fmt: skip
        else:
            matrices |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
        for name, shape in matrices.items():
            wanted[f"blk.{i}.{name}.weight"] = (shape, True)
            for scale in ("scale", "input_scale"):
                wanted[f"blk.{i}.{name}.{scale}"] = ((n_expert if "exps" in name else 1,), False)
        wanted |= {f"blk.{i}.{name}.weight": ((n,), True) for name, n in norms.items()}
        wanted |= {f"blk.{i}.{name}.bias": (shape[:1], False) for name, shape in matrices.items() if _may_have_bias(arch, name)}
    return wanted


def _may_have_bias(architecture: str, matrix: str) -> bool:
    """What llama.cpp looks for: of queries, keys and values always, of the others in llama only."""
    return matrix in ("attn_q", "attn_k", "attn_v", "attn_qkv") or (
        architecture == "llama" and matrix in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
    )
