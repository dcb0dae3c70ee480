"""What a GGUF file is, from its header alone: a model's sizes, quantisation and tokenizer, or an adapter's base, rank and scope.

The file is mapped and its weights are never touched, so a model of many gigabytes takes as long as its vocabulary: about 30 ms for 32,000 tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Literal

from gguf_tools.adapter import INVOCATION_KEY, NAMESPACE, Scope
from gguf_tools.header import MODEL_LIMITS, Header, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import is_adapter, model_info
from gguf_tools.validate import adapter_alpha, base_names, check_adapter_header


@dataclass(frozen=True)
class Role:
    """All tensors of one role, such as `attn_q.weight` in every layer: `types` counts them by quantisation."""

    role: str
    n_tensors: int
    shape: tuple[int, ...]  # of the first, in numpy order: (n_out, n_in)
    types: dict[str, int]
    n_parameters: int
    size_bytes: int


@dataclass(frozen=True)
class Token:
    """A special token: its number and its text."""

    id: int
    text: str


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into tokens; a special token is None where the model has none."""

    model: str
    pre: str | None
    n_tokens: int
    bos: Token | None
    eos: Token | None
    end_of_turn: Token | None
    adds_bos: bool


@dataclass(frozen=True)
class ModelView:
    """A model; `bits_per_weight` counts its tensors' bytes only."""

    path: str
    name: str
    architecture: str
    size_bytes: int
    n_parameters: int
    bits_per_weight: float
    quantisation: str
    n_layers: int
    n_embd: int
    n_ff: int | None
    n_head: int
    n_head_kv: int
    context_length: int
    kv_bytes_per_token: int
    tied_embeddings: bool
    tokenizer: Tokenizer
    chat_template: str | None
    roles: tuple[Role, ...]
    kind: Literal["model"] = "model"


@dataclass(frozen=True)
class AdapterView:
    """A LoRA adapter; `base` is what it says about the model it was made for, `layers` the numbers of those it changes."""

    path: str
    architecture: str
    size_bytes: int
    n_parameters: int
    alpha: float
    ranks: tuple[int, ...]  # the different ones, smallest first
    scope: Scope
    invocation_tokens: tuple[int, ...]
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    base: dict[str, str]
    metadata: dict[str, str]
    roles: tuple[Role, ...]
    kind: Literal["adapter"] = "adapter"


def inspect_file(path: str | os.PathLike[str]) -> ModelView | AdapterView:
    """Describe a model or an adapter.

    Raises:
        FileError: it is damaged, or neither of the two.
    """
    with mapped(path) as data:
        header = parse_header(data, str(path), MODEL_LIMITS)
        if is_adapter(header):
            return _adapter(header)
        return _model(header)


def _model(header: Header) -> ModelView:
    info = model_info(header)
    roles = _roles(header)
    n_parameters, n_bytes = sum(role.n_parameters for role in roles), sum(role.size_bytes for role in roles)
    n_ff = f"{info.architecture}.feed_forward_length"
    numbers = header.numbers(n_ff)
    wanted = {token for token in (info.bos_token, info.eos_token, info.eot_token) if token is not None}
    texts = {
        token: Token(token, raw.decode("utf-8", "replace"))
        for token, raw in enumerate(islice(header.strings("tokenizer.ggml.tokens"), max(wanted, default=-1) + 1))
        if token in wanted
    }
    bos, eos, end = (None if token is None else texts[token] for token in (info.bos_token, info.eos_token, info.eot_token))
    model, pre = header.text("tokenizer.ggml.model") or "", header.text("tokenizer.ggml.pre")
    return ModelView(
        path=header.label,
        name=info.name,
        architecture=info.architecture,
        size_bytes=info.size_bytes,
        n_parameters=n_parameters,
        bits_per_weight=8 * n_bytes / n_parameters,
        quantisation=info.quantisation,
        n_layers=info.n_layers,
        n_embd=info.n_embd,
        n_ff=max(numbers, default=None) if numbers is not None else header.number(n_ff),
        n_head=info.n_head,
        n_head_kv=info.n_head_kv,
        context_length=info.context_length,
        kv_bytes_per_token=info.kv_bytes_per_token(),
        tied_embeddings=info.tied_embeddings,
        tokenizer=Tokenizer(model, pre, info.n_vocab, bos, eos, end, info.add_bos),
        chat_template=info.chat_template,
        roles=roles,
    )


def _adapter(header: Header) -> AdapterView:
    check_adapter_header(header)
    names = base_names(header)
    tokens = tuple(header.numbers(INVOCATION_KEY) or ())
    texts = {
        key: header.text(key) or ""
        for key, (_, value) in header.values.items()
        if isinstance(value, bytes) and not key.startswith(("general.type", "general.architecture", "adapter."))
    }
    return AdapterView(
        path=header.label,
        architecture=header.text("general.architecture") or "",
        size_bytes=len(header.data),
        n_parameters=sum(prod(entry.shape) for entry in header.tensors.values()),
        alpha=adapter_alpha(header),
        ranks=tuple(sorted({header.tensors[f"{name}.lora_a"].shape[0] for name in names})),
        scope="answer" if tokens else "all",
        invocation_tokens=tokens,
        layers=tuple(sorted({int(name.split(".")[1]) for name in names if name.startswith("blk.")})),
        modules=tuple(dict.fromkeys(_role(name).removesuffix(".weight") for name in names)),
        base={key: value for key, value in texts.items() if key.startswith((f"{NAMESPACE}base.", "general.base_model."))},
        metadata={key: value for key, value in texts.items() if not key.startswith((f"{NAMESPACE}base.", "general.base_model."))},
        roles=_roles(header),
    )


def _role(name: str) -> str:
    """A tensor's name without its layer: `blk.3.attn_q.weight` is an `attn_q.weight`."""
    return name.split(".", 2)[2] if name.startswith("blk.") and name.count(".") >= 2 else name


def _roles(header: Header) -> tuple[Role, ...]:
    """Tensors grouped by role, in the order in which the file has them first."""
    groups: dict[str, list[str]] = {}
    for name in header.tensors:
        groups.setdefault(_role(name), []).append(name)
    return tuple(_group(header, role, names) for role, names in groups.items())


def _group(header: Header, role: str, names: Iterable[str]) -> Role:
    entries = [header.tensors[name] for name in names]
    types = Counter(entry.type.name for entry in entries)
    n_parameters, n_bytes = sum(prod(entry.shape) for entry in entries), sum(entry.size_bytes for entry in entries)
    return Role(role, len(entries), entries[0].shape, dict(types), n_parameters, n_bytes)
