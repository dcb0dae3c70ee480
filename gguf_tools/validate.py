"""Everything that an adapter file must be before llama.cpp may see it.

llama.cpp believes adapter files: an integer alpha aborts the process, an I32 tensor is a segfault, NaN is loaded.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

from gguf.constants import GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import FileError
from gguf_tools.finite import check_finite
from gguf_tools.header import ADAPTER_LIMITS, Array, Buffer, Header, parse_header
from gguf_tools.mapping import mapped

if TYPE_CHECKING:
    from gguf_tools.model import ModelInfo

_BASE = re.compile(r"(?:blk\.\d{1,5}\.[a-z0-9_]+|output)\.weight")
_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
MAX_RANK = 4096
_MAX_INVOCATION = 256


def validate_adapter(path: str | os.PathLike[str], base: ModelInfo | None = None) -> None:
    """Check everything in a LoRA adapter that llama.cpp would trust, and, given `base`, that it fits that model.

    Raises:
        FileError: the first thing wrong, in one sentence that names the tensor, key or offset.
    """
    with mapped(path) as data:
        check_adapter(data, str(path), base)


def check_adapter(data: Buffer, label: str, base: ModelInfo | None = None) -> Header:
    """`validate_adapter` of bytes that are already at hand; returns the header."""
    header = parse_header(data, label, ADAPTER_LIMITS)
    check_adapter_header(header, base)
    check_adapter_numbers(header)
    return header


def check_adapter_header(header: Header, base: ModelInfo | None = None) -> None:
    """Everything but the numbers of an adapter whose header was read with limits of any size.

    Raises:
        FileError: the first thing wrong.
    """
    label, limits = header.label, ADAPTER_LIMITS
    header_bytes = min((entry.offset for entry in header.tensors.values()), default=header.end)
    for what, n, most in (
        ("metadata values", len(header.values), limits.n_keys),
        ("tensors", len(header.tensors), limits.n_tensors),
        ("bytes of header", header_bytes, limits.header_bytes),
        ("bytes", len(header.data), limits.file_bytes),
    ):
        if n > most:
            raise FileError(f"{label}: has {n} {what}, but at most {most} are accepted in an adapter.")
    _check_metadata(header, base)
    if not header.tensors:
        raise FileError(f"{label}: holds no tensors, but an adapter has at least one pair of lora_a and lora_b.")
    for name, entry in header.tensors.items():
        if entry.type not in _TYPES:
            raise FileError(f"{label}: {name} at byte {entry.offset} is of type {entry.type.name}, but adapter tensors must be F32 or F16.")
        if len(entry.shape) != 2:
            raise FileError(f"{label}: {name} at byte {entry.offset} has {len(entry.shape)} dimensions, but must have 2.")
    for name in base_names(header):
        _check_pair(header, name, base)
    n_after = len(header.data) - header.end
    if n_after > 1 << 16:
        raise FileError(f"{label}: {n_after} bytes follow the last tensor, which ends at {header.end}.")


def check_adapter_numbers(header: Header) -> None:
    """Every number of an adapter whose header is right must be finite.

    Raises:
        FileError: one is not.
    """
    for name, entry in header.tensors.items():
        check_finite(header, name, entry)


def adapter_alpha(header: Header) -> float:
    """Alpha of an adapter whose header was checked."""
    alpha = header.values["adapter.lora.alpha"][1]
    assert isinstance(alpha, float)  # check_adapter_header refuses anything else
    return alpha


def base_names(header: Header) -> list[str]:
    """The base tensors that an adapter changes, such as `blk.3.attn_q.weight`, in the file's order.

    Raises:
        FileError: a tensor is no half of a pair, or its base is one that llama.cpp cannot adapt.
    """
    names: dict[str, None] = {}
    for name in header.tensors:
        stem, _, half = name.rpartition(".lora_")
        where = f"{header.label}: {name}"
        if "norm" in stem or (half not in ("a", "b") and "norm" in name):
            raise FileError(
                f"{where} belongs to a norm, which llama.cpp would ignore; only weight matrices can be adapted."
            )
        if stem.endswith(".bias") or name.endswith(".bias"):
            raise FileError(f"{where} belongs to a bias; only weight matrices can be adapted.")
        if half not in ("a", "b"):
            raise FileError(f"{where} is no part of an adapter; names end in .lora_a or .lora_b.")
        if stem.endswith("token_embd.weight"):
            raise FileError(f"{where} belongs to the token embeddings, which are not adapted: tied models abort on it.")
        if ".lora_" in stem:  # llama.cpp removes every one of them to find the base tensor
            raise FileError(f"{where} has '.lora_' twice, but it only ends a name.")
        if not _BASE.fullmatch(stem):
            raise FileError(f"{where} belongs to {stem}, but only blk.N.(module).weight and output.weight are adapted.")
        other = f"{stem}.lora_{'b' if half == 'a' else 'a'}"
        if other not in header.tensors:
            raise FileError(f"{where} has no partner {other}.")
        names[stem] = None
    return list(names)


def _check_metadata(header: Header, base: ModelInfo | None) -> None:
    label = header.label
    architecture = header.text("general.architecture")
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if header.text(key) != wanted:
            raise FileError(
                f"{label}: is not a LoRA adapter: {key} is {header.text(key)!r:.80}, but must be {wanted!r}."
            )
    if not architecture:
        raise FileError(f"{label}: general.architecture is missing, but an adapter names its model's architecture.")
    if base is not None and architecture != base.architecture:
        raise FileError(
            f"{label}: was made for the architecture {architecture!r:.80}, but the base model is {base.architecture!r}."
        )
    kind, alpha = header.values.get("adapter.lora.alpha", (None, None))
    if kind != GGUFValueType.FLOAT32 or not isinstance(alpha, float) or not math.isfinite(alpha):
        found = "missing" if kind is None else f"{alpha!r:.80} of type {kind.name}"
        raise FileError(f"{label}: adapter.lora.alpha is {found}, but must be a finite FLOAT32.")
    key = "adapter.alora.invocation_tokens"
    if key in header.values:
        array = header.values[key][1]
        if not isinstance(array, Array) or array.type != GGUFValueType.UINT32:
            raise FileError(f"{label}: {key} must be an array of UINT32.")
        if not 1 <= array.count <= _MAX_INVOCATION:
            raise FileError(f"{label}: {key} has {array.count} tokens, but must have 1 to {_MAX_INVOCATION}.")
        n_vocab = base.n_vocab if base is not None else 1 << 31
        for token in header.numbers(key) or []:
            if token >= n_vocab:
                raise FileError(f"{label}: {key} has token {token}, but the vocabulary ends at {n_vocab - 1}.")
    for key, (kind, _) in header.values.items():
        if kind == GGUFValueType.STRING:
            header.text(key)  # refuses what is not UTF-8


def _check_pair(header: Header, name: str, base: ModelInfo | None) -> None:
    (rank, n_in), (n_out, rank_b) = (header.tensors[f"{name}.lora_{half}"].shape for half in "ab")
    if rank != rank_b:
        raise FileError(
            f"{header.label}: {name}.lora_a has shape ({rank}, {n_in}), lora_b ({n_out}, {rank_b}): the ranks differ."
        )
    if rank > MAX_RANK:
        raise FileError(f"{header.label}: {name}.lora_a has rank {rank}, but at most {MAX_RANK} is accepted.")
    if base is None:
        return
    if name not in base.tensors:
        raise FileError(f"{header.label}: adapts {name}, which the base model lacks. Was it trained on another model?")
    wanted = base.tensors[name][0]
    if len(wanted) != 2:
        raise FileError(
            f"{header.label}: adapts {name}, which has {len(wanted)} dimensions; only matrices are adapted."
        )
    for half, shape, fits, form in (
        ("a", (rank, n_in), n_in == wanted[1], f"(rank, {wanted[1]})"),
        ("b", (n_out, rank), n_out == wanted[0], f"({wanted[0]}, rank)"),
    ):
        if not fits:
            raise FileError(
                f"{header.label}: {name}.lora_{half} has shape {shape}, but the base model needs {form}. "
                "Was it trained on another model?"
            )
